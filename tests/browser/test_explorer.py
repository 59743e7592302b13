"""The explorer in a browser, against what Python computes: mouse, keyboard, lasso, hover, text, themes.

    pytest tests/browser                       JupyterLab
    pytest tests/browser --frontend all        JupyterLab, Notebook 7 and Voila
"""

import shutil

import numpy as np
import pytest
from playwright.sync_api import expect

from .browse import ROOT, opened, themed
from .problems import START, top
from .view import View, ids


def test_a_click_shows_the_ids_that_python_computes(explorer):
    view, kernel = explorer
    for test_id in [*kernel.ask("task.mistakes()"), 0, 17, 59]:
        view.click("test", test_id)
        assert view.asked(test_id) == top(kernel, test_id)
        assert (view.cards("helpful"), view.cards("harmful")) == top(kernel, test_id)
        kernel.becomes("[explorer.test_id, explorer.helpful, explorer.harmful]", [test_id, *top(kernel, test_id)])
        assert float(view.map.get_attribute("data-answered")) >= 0


def test_the_scatter_follows_the_click(explorer):
    view, kernel = explorer
    view.click("test", 42)
    view.asked(42)
    expect(view.scatter).not_to_contain_class("inb-stale")
    distance = np.linalg.norm(np.array(kernel.ask("train_xy")) - kernel.ask("test_xy[42]"), axis=1)
    points = np.stack([distance, kernel.ask("scores.row(42)"), np.ones(400)], 1)
    pixels = np.array(view.all_xy("train", range(400), view.scatter))
    lie, *_ = np.linalg.lstsq(points, pixels, rcond=None)
    assert np.abs(points @ lie - pixels).max() < 0.1  # pixels are the points, up to a scale and a shift of each axis
    assert lie[0, 0] > 0 > lie[1, 1] and abs(lie[0, 1] / lie[0, 0]) < 1e-3 and abs(lie[1, 0] / lie[1, 1]) < 1e-3


def test_the_map_lies_as_the_embedding_does(explorer):
    view, kernel = explorer
    for layer, n in (("train", 400), ("test", 60)):
        points = np.column_stack([kernel.ask(f"{layer}_xy"), np.ones(n)])
        pixels = np.array(view.all_xy(layer, range(n)))
        lie, *_ = np.linalg.lstsq(points, pixels, rcond=None)
        assert np.abs(points @ lie - pixels).max() < 0.1
        assert lie[0, 0] == pytest.approx(-lie[1, 1], rel=1e-3) and abs(lie[0, 1] / lie[0, 0]) < 1e-3  # y grows upwards


def test_lasso_selects_what_python_finds_inside_it(explorer):
    view, kernel = explorer
    corners, train_xy = view.kidney(), kernel.ask("train_xy")
    expected = view.within(train_xy, corners)
    assert 30 < len(expected) < 370
    view.drag(corners, key="Shift")
    view.shows(view.map, selected=len(expected))
    view.shows(view.scatter, selected=len(expected))
    kernel.becomes("explorer.selected", expected)
    expect(view.gallery.locator(".inb-selected")).to_contain_text(f"Selected: {len(expected)} training examples")

    kernel.ask("None", before="explorer.selected = []")
    view.shows(view.map, selected=0)
    view.button("Lasso").click()                            # the mode, without a key held
    expect(view.button("Lasso")).to_contain_class("mod-active")
    corners = view.kidney(turn=2)
    view.drag(corners)
    kernel.becomes("explorer.selected", view.within(train_xy, corners))


def test_a_drag_without_lasso_moves_the_map_and_selects_nothing(explorer):
    view, kernel = explorer
    before = np.array(view.all_xy("train", range(400)))
    x, y = before.mean(0)
    view.drag([(x, y), (x + 30, y + 10), (x + 60, y - 20)])
    canvas = view.canvas(view.map)
    view.until(canvas, "(canvas, x) => canvas.__pointcloud.clientXY('train', 0)[0] > x + 59", before[0, 0])
    assert np.allclose(np.array(view.all_xy("train", range(400))) - before, (60, -20), atol=0.5)
    canvas.press("0")
    view.until(canvas, "(canvas, x) => Math.abs(canvas.__pointcloud.clientXY('train', 0)[0] - x) < 0.01", before[0, 0])
    assert kernel.ask("explorer.selected") == []


def test_hover_goes_from_map_to_gallery_and_back(explorer):
    view, kernel = explorer
    (first, *_), (*_, worst) = top(kernel, START)
    view.card("train", worst).hover()
    for element in (view.map, view.scatter, view.gallery):
        view.shows(element, hover=f"train {worst}")
    view.page.mouse.move(5, 5)
    view.shows(view.map, hover="")
    view.page.mouse.move(*view.xy("train", first, view.scatter))
    view.until(view.scatter, "(scatter) => scatter.dataset.hover !== ''")
    name = view.scatter.get_attribute("data-hover")         # another point may lie on the first one there
    view.shows(view.map, hover=name)
    view.shows(view.gallery, hover=name)
    view.page.mouse.move(*view.xy("test", 10))
    view.shows(view.gallery, hover="test 10")
    expect(view.map.locator(".inb-tip")).to_contain_text("test point 10")


def test_the_keyboard_does_what_the_mouse_does(explorer):
    view, kernel = explorer
    canvas = view.canvas(view.map)
    canvas.focus()
    for key, test_id in (("Home", 0), ("PageDown", 1), ("End", 59), ("PageUp", 58)):
        canvas.press(key)
        view.shows(view.map, hover=f"test {test_id}")
    places = np.array(view.all_xy("test", range(60)))
    middle = int(np.linalg.norm(places - places.mean(0), axis=1).argmin())
    for key, way in (("ArrowRight", (1, 0)), ("ArrowLeft", (-1, 0)), ("ArrowUp", (0, -1)), ("ArrowDown", (0, 1))):
        view.click("test", middle)
        view.shows(view.map, hover=f"test {middle}")
        canvas.press(key)
        view.until(view.map, "(map, before) => map.dataset.hover !== before", f"test {middle}")
        chosen = int(view.map.get_attribute("data-hover").removeprefix("test "))
        assert (places[chosen] - places[middle]) @ way > 0
    canvas.press("Enter")
    assert view.asked(chosen) == top(kernel, chosen)
    kernel.becomes("explorer.test_id", chosen)

    canvas.press("t")                                       # to the training points
    canvas.press("Home")
    view.shows(view.map, hover="train 0")
    canvas.press(" ")
    canvas.press("PageDown")
    view.shows(view.map, hover="train 1")
    canvas.press(" ")
    kernel.becomes("explorer.selected", [0, 1])
    canvas.press("t")
    canvas.press("Escape")                                  # first the selection, then the question
    kernel.becomes("[explorer.test_id, explorer.selected]", [chosen, []])
    canvas.press("Escape")
    view.asked(None)
    kernel.becomes("[explorer.test_id, explorer.helpful, explorer.harmful]", [None, [], []])


def test_cards_are_chosen_by_keyboard_too(explorer):
    view, kernel = explorer
    (first, second, *_), _ = top(kernel, START)
    view.card("train", first).focus()
    view.shows(view.map, hover=f"train {first}")
    view.page.keyboard.press("Tab")
    view.shows(view.map, hover=f"train {second}")
    view.page.keyboard.press("Enter")
    kernel.becomes("explorer.selected", [second])


def test_a_busy_kernel_does_not_delay_the_answer(explorer, tmp_path):
    view, kernel = explorer
    expected, enough = top(kernel, 30), tmp_path / "enough"
    kernel.client.execute(f"import pathlib, time\nwhile not pathlib.Path('{enough}').exists(): time.sleep(0.02)",
                          store_history=False)
    try:
        view.click("test", 30)
        view.shows(view.map, test_id=30)
        assert (ids(view.map.get_attribute("data-helpful")), ids(view.map.get_attribute("data-harmful"))) == expected
        view.shows(view.gallery, test_id=30, helpful=",".join(map(str, expected[0])))
    finally:
        enough.touch()
    assert view.asked(30) == expected
    kernel.becomes("explorer.test_id", 30)


def test_the_explorer_follows_a_dark_theme(explorer, server, shots):
    view, _ = explorer
    bright = """(canvas, light) => {
        const [red, green, blue] = canvas.getContext("2d").getImageData(3, 3, 1, 1).data;
        return light ? red + green + blue > 600 : red + green + blue < 150;
    }"""
    view.until(view.map.locator(".inb-base"), bright, True)
    view.root.screenshot(path=shots / f"{server.frontend}-light.png")
    themed(view.page, server.frontend, "Dark")
    view.until(view.map.locator(".inb-base"), bright, False)
    view.root.screenshot(path=shots / f"{server.frontend}-dark.png")
    themed(view.page, server.frontend, "Light")
    view.until(view.map.locator(".inb-base"), bright, True)


def test_the_first_notebook_explains_a_mistake(browser, server, shots):
    shutil.copy(ROOT / "notebooks" / "00_start_here.ipynb", server.folder)
    with opened(browser, server, "00_start_here.ipynb") as (page, kernel, watch):
        view = View(page)
        assert view.asked(6558) == tuple(kernel.ask("influence.top(6558, explorer.state.k)")[1::2])
        view.root.screenshot(path=shots / f"{server.frontend}-start.png")
        wrong = kernel.ask("task.mistakes()")
        assert 6558 in wrong
        for test_id in [*wrong[::len(wrong) // 4], 6558]:
            view.click("test", test_id)
            helpful, harmful = kernel.ask(f"influence.top({test_id}, explorer.state.k)")[1::2]
            assert view.asked(test_id) == (helpful, harmful)
            assert (view.cards("helpful"), view.cards("harmful")) == (helpful, harmful)
            kernel.becomes("[explorer.test_id, explorer.helpful, explorer.harmful]", [test_id, helpful, harmful])
        watch.check()


def test_text_is_shown_as_text(digits, server, shots):
    page, kernel, watch = digits[0].page, *digits[1:]
    view = View(page, nth=1)
    view.shows(view.map, ready=1)
    view.click("test", 4)
    helpful, harmful = view.asked(4)
    assert [helpful, harmful] == kernel.ask("opinions.top(4, 4)")[1::2]
    tag = "<img src=x onerror='window.broken = 1'><script>window.broken = 1</script>"
    card = view.card("train", helpful[0])
    expect(card).to_contain_text(f"{tag} sentence {helpful[0]}")
    card.hover()
    page.mouse.move(*view.xy("test", 2))
    expect(view.map.locator(".inb-tip")).to_contain_text(f"{tag} question 2")
    view.control("Search ids, classes, text").fill("sentence 21")
    page.keyboard.press("Enter")
    view.hides("train", 20)
    assert view.visible("train", range(30)) == [21]
    assert view.root.locator("img, script, i").count() == 0 and page.evaluate("window.broken") is None
    view.root.screenshot(path=shots / f"{server.frontend}-text.png")
    watch.check()
