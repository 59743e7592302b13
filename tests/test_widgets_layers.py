"""What the explorer says of an embedding: correlation of score and distance, ellipses of the classes, maps by number of
neighbours."""

import json
import re
import warnings

import explorers
import numpy as np
import pytest
from explorers import N_TRAIN, Maps, finished, made, places
from scipy.stats import spearmanr

from influence_nb.widgets import Explorer
from influence_nb.widgets.correlation import caption, correlations
from influence_nb.widgets.ellipses import ellipses


@pytest.fixture(scope="module")
def task():
    return explorers.task()


@pytest.fixture
def explorer(task):
    yield from explorers.mapped(task)


# correlation
def spoken(value):
    return f"{value:.3f}".replace("-", "\u2212")


def test_the_caption_is_the_correlation_of_what_the_scatter_shows(explorer):
    chosen = [3, 80, 41, 7, 12]
    for test_id, method, metric in ((5, "influence", "cosine"), (11, "likeness", "euclidean")):
        explorer.select(test_id)
        explorer.state.method, explorer.state.metric, explorer.selected = method, metric, []
        distance = explorer.atlas.distance("first", metric, test_id)
        score = explorer.answers.methods[method].row(test_id).numpy()
        words = f"Pearson {spoken(np.corrcoef(distance, score)[0, 1])}, Spearman " \
                f"{spoken(spearmanr(distance, score).statistic)} over all {N_TRAIN}"
        assert explorer.scatter.caption == words
        explorer.selected = chosen
        both = distance[chosen], score[chosen]
        assert explorer.scatter.caption == words + \
            f"; {spoken(np.corrcoef(*both)[0, 1])}, {spoken(spearmanr(*both).statistic)} over the 5 selected"
        explorer.selected = chosen[:2]
        assert explorer.scatter.caption == words
    assert len({spoken(r) for r in (*correlations(distance, score), *correlations(*both))}) == 4  # all different
    explorer.select(None)
    assert explorer.scatter.caption == ""


def test_the_caption_follows_the_layer(task):
    class Rotated(Maps):  # the second layer has other distances, and no other scale alone
        def distance(self, layer, metric, test_id):
            far = super().distance(layer, metric, test_id)
            return far if layer == "first" else np.sort(far)

    maps = Rotated(task)
    maps.go.set()
    explorer = Explorer(task, {"influence": made(task)}, maps)
    explorer.select(5)
    before = explorer.scatter.caption
    explorer.state.layer = "second"
    finished(explorer)
    r = np.corrcoef(maps.distance("second", "cosine", 5), made(task).row(5))[0, 1]
    assert explorer.scatter.caption.startswith(f"Pearson {spoken(r)}, ") and explorer.scatter.caption != before


@pytest.mark.parametrize("x, y", [
    ([1, 1, 1, 1], [1, 2, 3, 4]), ([1, 2, 3, 4], [0, 0, 0, 0]), ([1, 2], [1, 2]), ([1, 2, np.nan], [1, 2, 3])])
def test_where_no_correlation_is_defined_there_is_a_dash_and_no_warning(x, y):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert correlations(np.array(x), np.array(y)) == (None, None)
        xy = np.stack([x, y], 1).astype(np.float32)
        assert caption(xy) == f"Pearson \u2013, Spearman \u2013 over all {len(x)}"
        xy = np.concatenate([xy, [[5, 7], [6, 3], [-1, 8]]])
        if len(x) > 2:
            assert caption(xy, range(len(x))).endswith(f"; \u2013, \u2013 over the {len(x)} selected")


def test_a_distance_that_fails_says_so_and_leaves_no_points(task):
    class Failing(Maps):
        def distance(self, layer, metric, test_id):
            if metric == "euclidean":
                raise ValueError("no such luck")
            return super().distance(layer, metric, test_id)

    explorer = Explorer(task, {"influence": made(task)}, Failing(task))
    assert explorer.scatter.caption
    with pytest.raises(ValueError, match="no such luck"):
        explorer.state.metric = "euclidean"
    assert (explorer.scatter.train_xy, explorer.scatter.caption) == (b"", "")
    assert explorer.scatter.note == "euclidean distance failed: no such luck"
    assert explorer.scatter.owner == f"{explorer.test_id}/0"  # the note is of this point: nothing is waited for
    explorer.state.metric = "cosine"
    assert len(explorer.scatter.train_xy) == 8 * N_TRAIN and explorer.scatter.note == "" != explorer.scatter.caption


# ellipses
def inside(xy, row):
    """Which points lie in an ellipse, by its own axes."""
    _, x, y, long, short, angle = np.float64(row)
    turned = (xy - (x, y)) @ np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return ((turned / (long, short)) ** 2).sum(1) <= 1


def test_the_ellipse_has_the_closed_form_of_its_covariance():
    angle, deviations = 0.7, np.array([3.0, 0.5])
    white = np.random.default_rng(0).normal(size=(41, 2))
    white = white - white.mean(0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white.T))).T  # a covariance of exactly 1
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    (row,) = ellipses(white * deviations @ turn.T + (5, -2), np.full(41, 7))
    assert np.allclose(row[:5], (7, 5, -2, 6, 1), atol=1e-5) and np.isclose(np.tan(row[5]), np.tan(angle), atol=1e-5)


def test_a_gaussian_has_its_share_within_two_deviations():
    random, n = np.random.default_rng(1), 20_000
    both = np.concatenate([random.multivariate_normal(m, C, n) for m, C in (
        ((0, 0), ((4, 3.6), (3.6, 4))), ((9, 1), ((1, -0.9), (-0.9, 1))))])
    groups = np.arange(2 * n) // n
    share, error = 1 - np.exp(-2), np.sqrt(np.exp(-2) * (1 - np.exp(-2)) / n)  # chi-square of 2 degrees at 4
    for row, group in zip(ellipses(both, groups), (0, 1), strict=True):
        xy = both[groups == group]
        assert row[0] == group and abs(inside(xy, row).mean() - share) < 4 * error
        upright = (*row[:3], *(2 * xy.std(0)), 0)  # two deviations along x and y: the axes without the covariance
        assert abs(inside(xy, upright).mean() - share) > 4 * error


@pytest.mark.parametrize("points", [
    [(3, 4)], [(3, 4), (5, 9)], [(1, 1), (2, 3), (3, 5), (9, 17)], [(2, 2)] * 5, [(1e4, 0.1), (2e4, 0.1), (5e4, 0.1)],
    [(0.1, 0.37), (0.2, 0.44), (0.7, 0.79), (0.9, 0.93)]])  # a line, up to float32
def test_a_class_without_width_has_a_centre_and_no_ellipse(points):
    cloud = np.random.default_rng(0).normal(size=(30, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = ellipses(np.float32([*points, *cloud]), np.repeat([4, 1], [len(points), 30]))
    assert rows[:, 0].tolist() == [1, 4] and np.isfinite(rows[0]).all() and np.isnan(rows[1, 3:]).all()
    assert np.allclose(rows[1, 1:3], np.mean(points, 0))


def centres(explorer):
    return np.frombuffer(explorer.map.centres, "<f4").reshape(-1, 6)


def test_ellipses_follow_the_map_the_colours_and_the_filter(explorer):
    task, state = explorer.task, explorer.state
    train, y = places(task)[0], task.train.y.numpy()
    assert np.array_equal(centres(explorer), ellipses(train, y)) and not explorer.map.ellipses
    explorer.controls.ellipses.value = True
    assert explorer.map.ellipses and state.ellipses
    state.colour_by = "correct"
    wrong = (task.predict(task.train) != task.train.y).numpy()
    assert np.array_equal(centres(explorer), ellipses(train, wrong))
    state.colour_by, state.class_filter = "label", "owl"
    assert np.array_equal(centres(explorer), ellipses(train, y)[2:])
    state.class_filter, state.projection, state.near = "", "near", {"near": 3}
    finished(explorer)
    assert np.array_equal(centres(explorer), ellipses(3 * train, y))
    while state.undo():
        pass
    assert not explorer.map.ellipses and not explorer.controls.ellipses.value


def test_the_picture_shows_ellipses_names_and_correlation(explorer):
    def words(figure):
        return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]

    before = explorer.figure()
    explorer.state.ellipses = True
    after = explorer.figure()
    drawn = [[patch for patch in figure.axes[0].patches if hasattr(patch, "get_angle")] for figure in (before, after)]
    assert [len(patches) for patches in drawn] == [0, 3]
    for patch, (_, x, y, long, short, angle) in zip(drawn[1], centres(explorer), strict=True):
        assert np.allclose((*patch.center, patch.width, patch.height), (x, y, 2 * long, 2 * short))
        assert np.isclose(patch.angle, np.degrees(angle))
    assert sum(name in words(after) for name in explorers.CLASSES) == 3
    assert words(after).count("owl") == words(before).count("owl") + 1 and explorer.scatter.caption in words(after)


# maps by number of neighbours
def test_the_number_of_neighbours_makes_another_map(explorer):
    state, train = explorer.state, places(explorer.task)[0]
    slider = explorer.controls.near["near"]
    assert slider.layout.display == "none" and list(explorer.controls.near) == ["near"]
    explorer.selected = [4, 5]
    state.projection = "near"
    assert np.allclose(np.frombuffer(finished(explorer).map.train_xy, "<f4"), 15 * train.ravel())
    assert slider.layout.display is None and (slider.min, slider.max, slider.value) == (2, 40, 15)
    assert slider.description == "Neighbours of near" and not slider.continuous_update and len(state.past) == 2
    slider.value = 30
    assert explorer.state.near == {"near": 30}
    assert np.allclose(np.frombuffer(finished(explorer).map.train_xy, "<f4"), 30 * train.ravel())
    assert explorer.map.title == "Map: near of first, neighbours 30" and explorer.selected == [4, 5]
    state.projection = "PCA"
    assert np.array_equal(np.frombuffer(finished(explorer).map.train_xy, "<f4"), train.ravel())
    assert slider.layout.display == "none" and explorer.map.title == "Map: PCA of first"
    state.projection = "near"  # the number is kept
    assert np.allclose(np.frombuffer(finished(explorer).map.train_xy, "<f4"), 30 * train.ravel())
    for _ in range(3):
        state.undo()
    assert slider.value == 15 and state.near == {} and len(state.past) == 2
    assert np.allclose(np.frombuffer(finished(explorer).map.train_xy, "<f4"), 15 * train.ravel())
    state.redo()
    assert slider.value == 30


def test_the_number_of_neighbours_is_saved_and_loaded(explorer, tmp_path):
    explorer.state.projection, explorer.state.near, explorer.state.ellipses = "near", {"near": 7}, True
    path = finished(explorer).save(tmp_path / "state.json")
    other = Explorer(explorer.task, explorer.answers.methods, Maps(explorer.task))
    other.load(path)
    assert finished(other).maps.shown == ("first", "near", 7) and other.controls.near["near"].value == 7
    assert other.map.train_xy == explorer.map.train_xy and other.map.ellipses
    for near, says in (({"near": 70}, "near: the neighbours of near must lie in 2..40, got 70"), (5, "does not fit"),
                       ({"PCA": 5}, "near must be {projection: neighbours} of ['near'], got 'PCA'")):
        path.write_text(json.dumps(json.loads(explorer.state.to_json()) | {"near": near}))
        with pytest.raises(ValueError, match=re.escape(says)):
            other.load(path)
    assert other.state.near == {"near": 7}


def test_a_map_given_as_arrays_has_no_number(task):
    explorer = Explorer(task, {"influence": made(task)}, places(task))
    assert explorer.controls.near == {} and explorer.state.neighbours() is None
    with pytest.raises(ValueError, match="near must be"):
        explorer.state.near = {"given": 5}
