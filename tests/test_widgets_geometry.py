"""The geometry of the point cloud, run by node as it stands and compared with numpy."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib.path import Path as Polygon

import influence_nb.widgets

GEOMETRY = Path(influence_nb.widgets.__file__).with_name("geometry.js")
AREA = {"left": 80, "top": 6, "width": 420, "height": 300}
FLOATS = "const floats = (xy) => Float32Array.from(xy, (v) => v ?? NaN);\n"  # JSON has no NaN
VIEW = {"x": 1.5, "y": -2.0, "sx": 70.0, "sy": 30.0}


@pytest.fixture(scope="module")
def js(tmp_path_factory):
    """Run an expression of the names of geometry.js and of the values given; its value comes back by way of JSON."""
    node = shutil.which("node")
    assert node, "these tests run the widgets' geometry with node, which was not found: install nodejs"
    folder = tmp_path_factory.mktemp("geometry")
    (folder / "package.json").write_text('{"type": "module"}')
    shutil.copy(GEOMETRY, folder)

    def run(expression, **values):
        given = "".join(f"const {name} = {json.dumps(value)};\n" for name, value in values.items())
        (folder / "run.js").write_text(f'import * as g from "./geometry.js";\n{FLOATS}{given}'
                                       f"console.log(JSON.stringify({expression}));")
        done = subprocess.run([node, "run.js"], cwd=folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="module")
def cloud():
    """[n, 2] points of very uneven density, as scores are, with a few that have no place."""
    rng = np.random.default_rng(0)
    xy = np.concatenate([rng.normal(0, 1, (600, 2)), rng.normal(2, 0.01, (300, 2)), rng.standard_cauchy((100, 2))])
    xy = np.float32(xy)
    xy[[3, 77, 950]] = np.nan
    return xy


def listed(xy):
    return [None if np.isnan(v) else float(v) for v in xy.ravel()]


def pixels(xy, view=VIEW, area=AREA):
    x = area["left"] + area["width"] / 2 + (xy[..., 0] - view["x"]) * view["sx"]
    y = area["top"] + area["height"] / 2 - (xy[..., 1] - view["y"]) * view["sy"]
    return np.stack([x, y], -1)


def test_to_screen_and_back(js):
    points = np.array([[0, 0], [1.5, -2], [-3, 4.25]])
    screen, back = js("[points.map(([x, y]) => g.toScreen(view, area, x, y)), "
                      "points.map(([x, y]) => g.toData(view, area, ...g.toScreen(view, area, x, y)))]",
                      points=points.tolist(), view=VIEW, area=AREA)
    assert np.allclose(screen, pixels(points)) and np.allclose(back, points)


@pytest.mark.parametrize("equal", [True, False])
def test_the_first_view_shows_everything(js, cloud, equal):
    view = js("g.fitted(g.bounds(floats(xy)), area, equal)", xy=listed(cloud), area=AREA, equal=equal)
    placed = pixels(cloud[np.isfinite(cloud).all(1)], view)
    low, high = placed.min(0), placed.max(0)
    assert (low >= (AREA["left"], AREA["top"])).all()
    assert (high <= (AREA["left"] + AREA["width"], AREA["top"] + AREA["height"])).all()
    margins = np.array([low[0] - AREA["left"], low[1] - AREA["top"]])
    assert np.isclose(margins / (AREA["width"], AREA["height"]), 0.05).any() if equal else \
        np.allclose(margins, (0.05 * AREA["width"], 0.05 * AREA["height"]))
    assert (view["sx"] == view["sy"]) == equal


def test_predicted_and_actual_have_one_range(js):
    assert js("g.squared([0.1, 0.4, -0.2, 0.3], 0.7)") == [-0.2, 0.7, -0.2, 0.7]
    assert js("[g.squared([0.1, 0.4, 0.2, 0.3], null), g.squared(null, -2), g.squared(null, null)]") == [
        [0, 0.4, 0, 0.4], [-2, 0, -2, 0], [-1, 1, -1, 1]]


def test_zoom_keeps_what_is_under_the_pointer(js):
    pointer = [200, 90]
    view, before, after = js("((closer) => [closer, g.toData(view, area, ...at), g.toData(closer, area, ...at)])"
                             "(g.zoomed(view, area, ...at, 3, 0.5))", view=VIEW, area=AREA, at=pointer)
    assert np.allclose(before, after) and view["sx"] == 210 and view["sy"] == 15


def test_pan_moves_points_with_the_pointer(js):
    view = js("g.panned(view, 31, -12)", view=VIEW)
    points = np.array([[0.0, 0.0], [5.0, -1.0]])
    assert np.allclose(pixels(points, view) - pixels(points), (31, -12))


@pytest.mark.parametrize("low, high", [(0, 1), (-3e-4, 11e-4), (-2e-7, 9e-7), (-99, 9876), (3.01, 3.02), (-5e6, 2e7)])
def test_ticks_are_round_inside_and_named_truly(js, low, high):
    ticks = js("g.ticks(low, high, 5)", low=low, high=high)
    values = np.array([tick["value"] for tick in ticks])
    steps = np.diff(values)
    assert 3 <= len(ticks) <= 9 and np.allclose(steps, steps[0])
    assert np.isclose(steps[0] / 10 ** np.floor(np.log10(steps[0] * 1.0001)), [1, 2, 5]).any()
    assert values[0] >= low - 1e-9 * steps[0] and values[-1] <= high + 1e-9 * steps[0]
    spoken = [float(tick["text"].replace("\u2212", "-")) for tick in ticks]
    assert np.allclose(spoken, values, rtol=0, atol=1e-6 * steps[0]) and max(len(tick["text"]) for tick in ticks) <= 9


def test_no_ticks_without_a_range(js):
    assert js("[g.ticks(1, 1), g.ticks(0, Infinity), g.ticks(NaN, 1)]") == [[], [], []]


def test_hit_test_finds_the_nearest_point_that_is_shown(js, cloud):
    rng = np.random.default_rng(1)
    hidden = (rng.random(len(cloud)) < 0.3).astype(int)
    spots = np.concatenate([rng.normal(0, 1.5, (150, 2)), np.nan_to_num(cloud[600:650]) + 0.002])
    reach = (0.11, 0.07)
    found = js("((grid) => spots.map(([x, y]) => grid.nearest(x, y, ...reach, hidden)))(new g.Grid(floats(xy)))",
               xy=listed(cloud), spots=spots.tolist(), reach=reach, hidden=hidden.tolist())
    far = (((cloud[None] - spots[:, None]) / reach) ** 2).sum(-1)
    far[:, hidden == 1] = np.inf
    far[np.isnan(far)] = np.inf
    nearest = np.where(far.min(1) <= 1, far.argmin(1), -1)
    assert (nearest >= 0).sum() > 60 and (nearest < 0).sum() > 5
    same = np.array(found) == nearest
    tied = [far[i, found[i]] - far[i].min() < 1e-6 for i in np.flatnonzero(~same)]  # equal to float32
    assert all(tied) and same.mean() > 0.95


def test_lasso_takes_what_is_inside_and_shown(js, cloud):
    angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    radius = 110 * (1 + 0.6 * np.cos(3 * angle))  # three lobes: a bounding box or a hull would take too much
    loop = np.stack([250 + radius * np.cos(angle), 130 + radius * np.sin(angle)], 1)
    hidden = np.arange(len(cloud)) % 4 == 0
    rows = js("g.lassoed(floats(xy), hidden, view, area, loop)", xy=listed(cloud), hidden=hidden.astype(int).tolist(),
              view=VIEW, area=AREA, loop=loop.tolist())
    at = pixels(np.float64(cloud))
    inside = Polygon(loop).contains_points(at) & (at[:, 1] >= AREA["top"]) & ~hidden
    assert rows == np.flatnonzero(inside).tolist() and 20 < len(rows) < 700


def test_a_lasso_past_the_edge_takes_nothing_from_outside_the_plot(js, cloud):
    loop = [[20, -60], [300, -60], [300, 400], [20, 400]]  # beyond the plot on the left, above and below
    rows = js("g.lassoed(floats(xy), [], view, area, loop)", xy=listed(cloud), view=VIEW, area=AREA, loop=loop)
    at = pixels(np.float64(cloud))
    inside = Polygon(loop).contains_points(at)
    shown = ((at >= (AREA["left"], AREA["top"])) & (at[:, 1:] <= AREA["top"] + AREA["height"])).all(1)
    assert rows == np.flatnonzero(inside & shown).tolist() and 500 < len(rows) <= inside.sum() - 20


def test_a_lasso_replaces_adds_or_removes(js):
    assert js("['replace', 'add', 'remove'].map((how) => g.combined(Int32Array.of(9, 2, 4), [4, 1], how))") == \
        [[4, 1], [1, 2, 4, 9], [2, 9]]


def test_arrows_go_to_the_nearest_point_that_way(js):
    points = [[0, 0], [1, 0.1], [2, 0], [-1, 0], [0.1, 1], [0, -1.5], [0.5, 0]]
    hidden = [0, 0, 0, 0, 0, 0, 1]
    keys = ["ArrowRight", "ArrowLeft", "ArrowUp", "ArrowDown"]
    moves = js("keys.map((key) => g.towards(floats(xy), hidden, view, area, g.toScreen(view, area, 0, 0), key))",
               keys=keys, xy=np.ravel(points).tolist(), hidden=hidden, area=AREA, view={**VIEW, "sy": 70.0})
    assert moves == [1, 3, 4, 5]
    assert js("g.towards(Float32Array.of(5, 5), [], view, area, g.toScreen(view, area, 5, 5), 'ArrowUp')", view=VIEW,
              area=AREA) == -1


def test_preloaded_answers_are_cut_from_the_right_place(js):
    methods, rows, depth = 2, 3, 4
    ids = np.arange(methods * rows * 2 * depth).reshape(methods, rows, 2, depth)
    ids[1, 2, 1, 2:] = -1  # a side with two examples only
    ask = "g.answered(Int32Array.from(ids), Float32Array.from(ids, (i) => -i), shape, %s)"
    given = {"ids": ids.ravel().tolist(), "shape": {"methods": methods, "rows": rows, "depth": depth}}
    answer = js(ask % "1, 2, 3", **given)
    assert answer["helpful"] == ids[1, 2, 0, :3].tolist() and answer["harmful"] == ids[1, 2, 1, :2].tolist()
    assert answer["helpful_scores"] == [-i for i in answer["helpful"]]
    assert [js(ask % where, **given) for where in ("2, 0, 1", "0, 3, 1", "0, -1, 1")] == [None, None, None]
