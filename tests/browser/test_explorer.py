"""The explorer in a browser, against what Python computes: mouse, keyboard, lasso, filters, text, exported and static pages.

    pytest tests/browser                       JupyterLab
    pytest tests/browser --frontend all        JupyterLab, Notebook 7 and Voila
"""

import nbformat
import numpy as np
import pytest
from browse import Watch, opened
from matplotlib.path import Path as Polygon
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from playwright.sync_api import expect
from problems import DIGITS, SENTENCES
from view import View, ids

K, START = 8, 3


@pytest.fixture(scope="module")
def digits(browser, server):
    """An explorer of 400 training and 60 test digits: (view, kernel, watch)."""
    server.write("digits.ipynb", DIGITS)
    with opened(browser, server, "digits.ipynb") as (page, kernel, watch):
        yield View(page), kernel, watch


@pytest.fixture
def explorer(digits):
    """The explorer as it is at the start, with test point 3 asked about: (view, kernel). No error, no request elsewhere."""
    view, kernel, watch = digits
    view.page.mouse.move(5, 5)
    kernel.ask("None", before="explorer.state.from_json(start); explorer.select(None)")
    view.asked(None)
    kernel.ask("None", before=f"explorer.select({START}); explorer.state.forget()")
    view.asked(START)
    yield view, kernel
    watch.check()


def top(kernel, test_id, scores="scores"):
    """(helpful, harmful) by the kernel's scores, past the explorer."""
    values = np.array(kernel.ask(f"{scores}.row({test_id})"))
    order = np.argsort(-values, kind="stable")
    helpful, harmful = order[:K], np.argsort(values, kind="stable")[:K]
    if scores == "scores":  # removal effects: only those of the right sign are called so
        helpful, harmful = helpful[values[helpful] > 0], harmful[values[harmful] < 0]
    assert kernel.ask(f"{scores}.top({test_id}, {K})")[1::2] == [helpful.tolist(), harmful.tolist()]
    return helpful.tolist(), harmful.tolist()


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
    expect(view.scatter).not_to_have_class("inb-stale")
    distance = np.linalg.norm(np.array(kernel.ask("train_xy")) - kernel.ask("test_xy[42]"), axis=1)
    points = np.stack([distance, kernel.ask("scores.row(42)"), np.ones(400)], 1)
    pixels = np.array(view.all_xy("train", range(400), view.scatter))
    fit, *_ = np.linalg.lstsq(points, pixels, rcond=None)
    assert np.abs(points @ fit - pixels).max() < 0.1    # pixels are the points, up to one scale and shift an axis
    assert fit[0, 0] > 0 > fit[1, 1] and abs(fit[0, 1]) < 1e-3 * abs(fit[0, 0]) and abs(fit[1, 0]) < 1e-3 * abs(fit[1, 1])


def test_the_map_lies_as_the_embedding_does(explorer):
    view, kernel = explorer
    for layer, n in (("train", 400), ("test", 60)):
        points = np.column_stack([kernel.ask(f"{layer}_xy"), np.ones(n)])
        pixels = np.array(view.all_xy(layer, range(n)))
        fit, *_ = np.linalg.lstsq(points, pixels, rcond=None)
        assert np.abs(points @ fit - pixels).max() < 0.1
        assert fit[0, 0] == pytest.approx(-fit[1, 1], rel=1e-3) and abs(fit[0, 1]) < 1e-3 * fit[0, 0]  # one scale, y upwards


def loop(view, shift=0.0):
    """Corners of a kidney in the middle of the map, in pixels of the page: not convex, so that a box would be caught."""
    box = view.canvas(view.map).bounding_box()
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    radius = 1 + 0.45 * np.cos(angle + shift)
    x = box["x"] + box["width"] * (0.5 + 0.22 * radius * np.cos(angle))
    y = box["y"] + box["height"] * (0.5 + 0.22 * radius * np.sin(angle))
    return np.stack([x, y], 1).round(1).tolist()


def within(view, kernel, corners) -> list[int]:
    """Training points inside a loop of the page's pixels, by the coordinates that Python holds."""
    points = np.column_stack([kernel.ask("train_xy"), np.ones(400)])
    some = [0, 7, 100, 250, 399]
    fit, *_ = np.linalg.lstsq(points[some], np.array(view.all_xy("train", some)), rcond=None)
    return np.flatnonzero(Polygon(corners).contains_points(points @ fit)).tolist()


def test_lasso_selects_what_python_finds_inside_it(explorer):
    view, kernel = explorer
    view.canvas(view.map).scroll_into_view_if_needed()
    corners = loop(view)
    expected = within(view, kernel, corners)
    assert 30 < len(expected) < 370
    view.page.keyboard.down("Shift")
    view.drag(corners)
    view.page.keyboard.up("Shift")
    view.shows(view.map, selected=len(expected))
    view.shows(view.scatter, selected=len(expected))
    kernel.becomes("explorer.selected", expected)
    assert view.gallery.locator(".inb-selected").inner_text().startswith(f"Selected: {len(expected)} training examples")

    kernel.ask("None", before="explorer.selected = []")
    view.shows(view.map, selected=0)
    view.button("Lasso").click()                            # the mode, without a key held
    expect(view.button("Lasso")).to_have_class("mod-active")
    view.canvas(view.map).scroll_into_view_if_needed()
    corners = loop(view, shift=2.0)
    view.drag(corners)
    kernel.becomes("explorer.selected", within(view, kernel, corners))
    view.button("Lasso").click()


def test_a_drag_without_lasso_moves_the_map_and_selects_nothing(explorer):
    view, kernel = explorer
    before = np.array(view.all_xy("train", range(400)))
    x, y = before.mean(0)
    view.drag([(x, y), (x + 30, y + 10), (x + 60, y - 20)])
    view.page.wait_for_function("([canvas, x]) => canvas.__pointcloud.clientXY('train', 0)[0] > x + 59",
                                arg=[view.canvas(view.map).element_handle(), before[0, 0]])
    assert np.allclose(np.array(view.all_xy("train", range(400))) - before, (60, -20), atol=0.5)
    view.canvas(view.map).press("0")
    view.page.wait_for_function("([canvas, x]) => Math.abs(canvas.__pointcloud.clientXY('train', 0)[0] - x) < 0.01",
                                arg=[view.canvas(view.map).element_handle(), before[0, 0]])
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
    name = view.scatter.get_attribute("data-hover")         # points of the scatter may lie on one another
    expect(view.scatter).not_to_have_attribute("data-hover", "")
    name = view.scatter.get_attribute("data-hover")
    view.shows(view.map, hover=name)
    view.shows(view.gallery, hover=name)
    view.page.mouse.move(*view.xy("test", 10))
    view.shows(view.gallery, hover="test 10")
    expect(view.map.locator(".inb-tip")).to_contain_text("test point 10")


def test_the_keyboard_does_what_the_mouse_does(explorer):
    view, kernel = explorer
    canvas = view.canvas(view.map)
    canvas.focus()
    seen = []
    for key in ("Home", "PageDown", "ArrowRight", "ArrowUp", "ArrowLeft", "ArrowDown"):
        canvas.press(key)
        expect(view.map).not_to_have_attribute("data-hover", seen[-1] if seen else "")
        seen.append(view.map.get_attribute("data-hover"))
    assert seen[:2] == ["test 0", "test 1"] and len(set(seen)) >= 4 and all(name.startswith("test ") for name in seen)
    chosen = int(seen[-1].split()[1])
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


def test_the_method_is_changed_by_keyboard(explorer):
    view, kernel = explorer
    before = view.asked(START)
    view.control("Method").focus()
    view.page.keyboard.press("ArrowDown")
    kernel.becomes("explorer.state.method", "nearness")
    expected = top(kernel, START, "nearness")
    view.shows(view.map, helpful=",".join(map(str, expected[0])))
    assert view.asked(START) == expected != before
    view.page.keyboard.press("ArrowUp")
    view.shows(view.map, helpful=",".join(map(str, before[0])))


def test_a_method_that_must_be_asked_answers_through_the_kernel(explorer):
    view, kernel = explorer
    view.control("Method").select_option("asked")
    view.shows(view.map, helpful=",".join(map(str, top(kernel, START)[1])))    # its sign is the other one
    view.click("test", 21)
    helpful, harmful = top(kernel, 21)
    assert view.asked(21) == (harmful, helpful)


def test_a_busy_kernel_does_not_delay_the_answer(explorer):
    view, kernel = explorer
    expected = top(kernel, 30)
    kernel.client.execute("import time; started = True\nwhile started: time.sleep(0.05)", store_history=False)
    try:
        view.click("test", 30)
        view.shows(view.map, test_id=30)
        assert (ids(view.map.get_attribute("data-helpful")), ids(view.map.get_attribute("data-harmful"))) == expected
        view.shows(view.gallery, test_id=30, helpful=",".join(map(str, expected[0])))
    finally:
        kernel.interrupt()
    assert view.asked(30) == expected
