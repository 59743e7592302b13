"""Pages without a kernel: the exported one, which answers clicks, and what nbconvert makes of a saved notebook."""

import json
import os

import nbformat
import pytest
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from playwright.sync_api import expect

from .browse import ROOT, Watch
from .problems import DIGITS
from .view import View

WRITE = """
import json
explorer.export_html("page.html")
given = {"influence": scores, "nearness": nearness}
top = {name: [each.top(i, 8)[1::2] for i in range(60)] for name, each in given.items()}
explorer.select(8)
captions = []
for explorer.state.method in given:
    captions.append(explorer.scatter.caption)
print(json.dumps({"top": top, "train_xy": train_xy.tolist(), "captions": captions}))
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The explorer's notebook, run and saved without widget state; its folder; what its last cell says."""
    folder = tmp_path_factory.mktemp("pages")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in (*DIGITS, WRITE)])
    client = NotebookClient(notebook, timeout=120, kernel_name="python3", store_widget_state=False,
                            resources={"metadata": {"path": str(folder)}})
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT)})
    return notebook, folder, json.loads(notebook.cells[-1].outputs[0].text)


def test_the_exported_page_answers_with_no_kernel_and_no_request(ran, browser, shots):
    _, folder, said = ran
    influence, nearness = ([tuple(sides) for sides in said["top"][name]] for name in ("influence", "nearness"))
    page = browser.new_page(viewport={"width": 1400, "height": 1200})
    watch = Watch(page)
    page.goto((folder / "page.html").as_uri())
    view = View(page)
    view.shows(view.map, ready=1, test_id=0)
    for test_id in (3, 17, 59, 8):
        view.click("test", test_id)
        assert view.asked(test_id) == influence[test_id]
        assert (view.cards("helpful"), view.cards("harmful")) == influence[test_id]
    caption = view.scatter.locator(".inb-caption")
    expect(caption).to_have_text(said["captions"][0])
    before = view.all_xy("train", range(400), view.scatter)
    page.get_by_label("Method").focus()
    page.keyboard.press("ArrowDown")
    view.shows(view.map, helpful=",".join(map(str, nearness[8][0])))
    assert view.asked(8) == nearness[8]
    assert view.all_xy("train", range(400), view.scatter) != before
    expect(caption).to_have_text(said["captions"][1])
    painted = """(canvas) => {
        const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return data.some((value) => value);
    }"""
    chosen = view.map.locator(".inb-chosen")
    assert not chosen.evaluate(painted)
    page.get_by_role("button", name="Class ellipses").press("Enter")
    view.until(chosen, painted)
    corners = view.kidney()
    view.drag(corners, key="Shift")
    view.shows(view.map, selected=len(view.within(said["train_xy"], corners)))
    view.canvas(view.map).press("Home")
    view.canvas(view.map).press("Enter")
    assert view.asked(0) == nearness[0]
    page.screenshot(path=shots / "page-light.png", full_page=True)
    page.emulate_media(color_scheme="dark")
    page.screenshot(path=shots / "page-dark.png", full_page=True)
    watch.check()
    assert watch.requests == [page.url]
    page.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_saved_notebook_shows_the_picture(ran, theme, browser, shots):
    notebook, folder, _ = ran
    html, _ = HTMLExporter(theme=theme).from_notebook_node(notebook)
    (folder / f"{theme}.html").write_text(html)
    page = browser.new_page(viewport={"width": 1200, "height": 1000})
    page.goto((folder / f"{theme}.html").as_uri(), wait_until="domcontentloaded")
    picture = page.locator("img[src^='data:image/png']")
    page.wait_for_function("(image) => image.complete && image.naturalWidth >= 800", arg=picture.element_handle())
    colours = picture.evaluate("""(image) => {
        const canvas = document.createElement("canvas"), context = canvas.getContext("2d"), seen = new Set();
        [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
        context.drawImage(image, 0, 0);
        const {data} = context.getImageData(0, 0, canvas.width, canvas.height);
        for (let i = 0; i < data.length; i += 4) seen.add((data[i] << 16) | (data[i + 1] << 8) | data[i + 2]);
        return seen.size;
    }""")
    assert picture.count() == 1 and colours > 20            # points and thumbnails, not an empty frame
    assert page.locator(".inb-cloud").count() == 0          # nothing there that would need a kernel
    picture.screenshot(path=shots / f"static-{theme}.png")
    page.close()
