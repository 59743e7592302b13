"""Layers, distances and projections in a browser: what is chosen changes map, scatter and correlation, and keeps the
test point and the selection; lasso and click in the scatter; ellipses of the classes."""

import numpy as np
import pytest
from playwright.sync_api import expect
from scipy.stats import pearsonr, spearmanr

from .browse import opened, themed
from .problems import DIGITS, top
from .view import View

ASKED = 7
LAYERS = ["""
from influence_nb import Atlas, cosine, euclidean, pca

def stretched(x, seed=0, near=4):  # as PCA, but so many times as wide
    made, wide = pca(x, seed), [near, 1]
    return made._replace(points=made.points * wide, place=lambda new: made.place(new) * wide)

stretched.near = ("stretch", 2, 9, 4)
atlas = Atlas(task, ["0", "1"], {"PCA": pca, "stretched": stretched}, {"cosine": cosine, "Euclidean": euclidean})
layers = Explorer(task, {"influence": scores, "nearness": nearness}, atlas, test_ids=range(60), k=8)
fresh = layers.state.to_json()
layers
"""]


@pytest.fixture(scope="module")
def page(browser, server):
    """An explorer of two layers: (view, kernel, watch)."""
    server.write("layers.ipynb", [*DIGITS[:2], *LAYERS])
    with opened(browser, server, "layers.ipynb") as (page, kernel, watch):
        yield View(page), kernel, watch


@pytest.fixture
def layers(page):
    """The explorer as at the start, with one test point asked about and nothing selected. Then: no error."""
    view, kernel, watch = page
    view.page.mouse.move(5, 5)
    kernel.ask("None", before="layers.controls.lasso.value = False; layers.state.from_json(fresh)")
    kernel.becomes("layers.maps.shown", ["0", "PCA", None])
    kernel.ask("None", before=f"layers.select({ASKED}); layers.state.forget()")
    view.asked(ASKED)
    view.shows(view.map, selected=0)
    expect(view.scatter).not_to_contain_class("inb-stale")
    yield view, kernel
    watch.check()


def pairs(kernel, layer, metric, method="scores"):
    """Distance and score [400, 2], past the explorer."""
    return np.stack(kernel.ask(f"[atlas.distance('{layer}', '{metric}', {ASKED}), {method}.row({ASKED})]"), 1)


def words(xy, selected):
    """What the line under the scatter should say of distances and scores [n, 2]."""
    def two(xy):
        return [f"{r(*xy.T).statistic:.3f}".replace("-", "\u2212") for r in (pearsonr, spearmanr)]
    return "Pearson {}, Spearman {} over all 400".format(*two(xy)) + "; {}, {} over the {} selected".format(
        *two(xy[selected]), len(selected))


def lies(view, xy, cloud):
    """Whether points [n, 2] lie on the page as they should, up to a scale and a shift of each axis."""
    points, pixels = np.column_stack([xy, np.ones(len(xy))]), np.array(view.all_xy("train", range(len(xy)), cloud))
    fitted, *_ = np.linalg.lstsq(points, pixels, rcond=None)
    return np.abs(points @ fitted - pixels).max() < 0.2


def test_another_layer_and_distance_change_the_scatter_and_keep_point_and_selection(layers):
    view, kernel = layers
    corners = view.kidney()
    view.drag(corners, key="Shift")
    view.until(view.map, "(map) => Number(map.dataset.selected) > 30")
    selected = kernel.ask("layers.selected")
    assert selected == view.within(kernel.ask("atlas.place('0', 'PCA', [0])[0]"), corners) and len(selected) < 370
    caption, seen, held = view.scatter.locator(".inb-caption"), [], []
    for label, choice, layer, metric in (("Layer", "0", "0", "cosine"), ("Layer", "1", "1", "cosine"),
                                         ("Distance", "Euclidean", "1", "Euclidean")):
        view.control(label).select_option(choice)
        xy = pairs(kernel, layer, metric)
        expect(caption).to_have_text(words(xy, selected))
        kernel.becomes("[layers.maps.shown[0], layers.state.metric]", [layer, metric])
        expect(view.scatter).not_to_contain_class("inb-stale")
        places = kernel.ask(f"atlas.place('{layer}', 'PCA', [0])[0]")
        assert lies(view, xy, view.scatter) and lies(view, places, view.map)
        seen.append(caption.text_content())
        held.append(kernel.ask("__import__('hashlib').sha256(layers.scatter.train_xy).hexdigest()"))
        assert view.asked(ASKED) == top(kernel, ASKED) and kernel.ask("[layers.test_id, layers.selected]") == \
            [ASKED, selected]
        for cloud in (view.map, view.scatter):
            view.shows(cloud, selected=len(selected))
    assert len(set(seen)) == len(set(held)) == 3
    view.control("Method").select_option("nearness")
    expect(caption).to_have_text(words(pairs(kernel, "1", "Euclidean", "nearness"), selected))
    view.click("test", 12)
    expect(caption).not_to_contain_text(words(pairs(kernel, "1", "Euclidean", "nearness"), selected))


def test_lasso_in_the_scatter_selects_the_same_ids_in_the_map(layers):
    view, kernel = layers
    xy = pairs(kernel, "0", "cosine")
    pixels, corners = np.array(view.all_xy("train", range(400), view.scatter)), view.kidney(1, view.scatter)
    corners = (corners - np.mean(corners, 0) + np.median(pixels, 0)).tolist()  # round where most points are
    expected = view.within(xy, corners, view.scatter)
    assert 15 < len(expected) < 385 and expected != view.within(kernel.ask("atlas.place('0', 'PCA', [0])[0]"), corners)
    view.button("Lasso").click()
    view.drag(corners)
    kernel.becomes("layers.selected", expected)
    for cloud in (view.map, view.scatter):
        view.shows(cloud, selected=len(expected))
    assert kernel.ask("[list(memoryview(cloud.selected).cast('i')) for cloud in (layers.map, layers.scatter)]") == \
        [expected, expected]
    expect(view.scatter.locator(".inb-caption")).to_have_text(words(xy, expected))
    view.button("Lasso").click()
    apart = np.linalg.norm(pixels[:, None] - pixels, axis=2) + 1e9 * np.eye(400)
    alone = int(apart.min(1).argmax())
    view.click("train", alone, view.scatter)
    kernel.becomes("layers.selected", [alone])
    view.shows(view.map, selected=1)
    expect(view.gallery.locator(f".inb-selected [data-id='{alone}']")).to_have_count(1)


def test_a_projection_with_a_number_has_a_slider_for_it(layers):
    view, kernel = layers
    kernel.ask("None", before="layers.selected = [3, 5, 8]")
    slider = view.root.locator(".inb-toolbar .widget-slider", has_text="Stretch")
    expect(slider).to_be_hidden()

    def width(stretch):  # of the map, in its height
        train = np.array(kernel.ask("atlas.place('0', 'PCA', [0])[0]"))
        return np.ptp(train[:, 0]) * stretch / np.ptp(train[:, 1])

    def measured():
        low, high = (f(np.array(view.all_xy("train", range(400))), 0) for f in (np.min, np.max))
        return (high - low)[0] / (high - low)[1]

    assert measured() == pytest.approx(width(1), rel=1e-3)
    view.control("Projection").select_option("stretched")
    expect(view.map.locator(".inb-title")).to_have_text("Map: stretched of 0, stretch 4")
    assert measured() == pytest.approx(width(4), rel=1e-3)
    expect(slider).to_be_visible()
    slider.locator("[role=slider]").focus()
    view.page.keyboard.press("ArrowRight")
    expect(view.map.locator(".inb-title")).to_have_text("Map: stretched of 0, stretch 5")
    kernel.becomes("[layers.state.near, layers.selected]", [{"stretched": 5}, [3, 5, 8]])
    assert measured() == pytest.approx(width(5), rel=1e-3) and view.asked(ASKED) == top(kernel, ASKED)
    view.button("Undo").click()
    expect(view.map.locator(".inb-title")).to_have_text("Map: stretched of 0, stretch 4")
    expect(slider.locator(".widget-readout")).to_have_text("4")
    view.button("Undo").click()
    expect(view.map.locator(".inb-title")).to_have_text("Map: PCA of 0")
    expect(slider).to_be_hidden()


def test_ellipses_lie_where_the_classes_do_and_catch_no_click(layers, server, shots):
    view, kernel = layers
    train, y = np.array(kernel.ask("atlas.place('0', 'PCA', [0])[0]")), np.array(kernel.ask("train.y"))
    points = np.column_stack([train, np.ones(400)])
    lie, *_ = np.linalg.lstsq(points, np.array(view.all_xy("train", range(400))), rcond=None)
    box = view.canvas(view.map).bounding_box()
    ends, palette = [], kernel.ask("layers.map.palette")
    for digit in range(10):
        values, axes = np.linalg.eigh(np.cov(train[y == digit].T))
        for axis, way in ((0, 1), (0, -1), (1, 1), (1, -1)):
            end = train[y == digit].mean(0) + way * 2 * np.sqrt(values[axis]) * axes[:, axis]
            ends.append([digit, *((*end, 1) @ lie - (box["x"], box["y"]))])
    coloured = """(canvas, [ends, palette]) => {
        const ctx = canvas.getContext("2d"), ratio = canvas.width / canvas.clientWidth, found = palette.map(() => 0);
        for (const [digit, x, y] of ends) {
            const [at, up] = [Math.round(x * ratio) - 2, Math.round(y * ratio) - 2];
            const {data} = ctx.getImageData(at, up, 4, 4), wanted = parseInt(palette[digit].slice(1), 16);
            const near = [0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60].map((i) =>
                (data[i] << 16) | (data[i + 1] << 8) | data[i + 2]);
            found[digit] += near.includes(wanted);
        }
        return found;
    }"""
    chosen = view.map.locator(".inb-chosen")
    assert sum(chosen.evaluate(coloured, [ends, palette])) == 0
    view.control("class ellipses").check()
    view.until(chosen, f"(canvas, given) => ({coloured})(canvas, given).every((found) => found > 0)", [ends, palette])
    kernel.becomes("[layers.state.ellipses, layers.map.ellipses]", [True, True])
    assert sum(chosen.evaluate(coloured, [ends, palette])) >= 30  # the others lie under another class's line or name
    test = np.array(kernel.ask("atlas.place('0', 'PCA', range(60))[1]"))
    means = np.stack([train[y == digit].mean(0) for digit in range(10)])
    near = int(np.linalg.norm(test[:, None] - means, axis=2).min(1).argmin())  # under a name, or almost
    view.click("test", near)
    assert view.asked(near) == top(kernel, near)
    view.root.screenshot(path=shots / f"{server.frontend}-ellipses-light.png")
    themed(view.page, server.frontend, "Dark")
    view.root.screenshot(path=shots / f"{server.frontend}-ellipses-dark.png")
    themed(view.page, server.frontend, "Light")
    view.control("class ellipses").uncheck()
    view.until(chosen, f"(canvas, given) => ({coloured})(canvas, given).every((found) => !found)", [ends, palette])
