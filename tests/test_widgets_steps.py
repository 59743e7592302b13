"""Steps of undo round a map that is given up; an explorer that is closed; what the exported page is made of."""

import gc
import json
import re
import threading
import weakref

import explorers
import numpy as np
import pytest
import torch
from explorers import N_TRAIN, SHOWN, Asked, Maps, finished, made, places

from influence_nb import Scores
from influence_nb.widgets import Explorer
from influence_nb.widgets.correlation import caption
from influence_nb.widgets.export import told


@pytest.fixture(scope="module")
def task():
    return explorers.task()


@pytest.fixture
def explorer(task):
    yield from explorers.mapped(task)


# steps round a map that is given up
def test_a_cancelled_map_takes_its_own_steps_and_no_others(explorer):
    state, start = explorer.state, explorer.test_id
    explorer.select(5)
    state.layer = "second"
    explorer.select(11)  # a click while the map is made
    state.projection = "near"
    state.near = {"near": 9}
    explorer.selected = [1, 2]
    explorer.controls.cancel.click()
    assert (state.layer, state.projection, state.near, explorer.test_id) == ("first", "PCA", {}, 11)
    assert [set(step) for step in state.past] == [{"test_id"}, {"test_id"}, {"selected"}]
    seen = []
    while state.undo():
        seen.append((state.layer, explorer.test_id, explorer.selected))
    assert seen == [("first", 11, []), ("first", 5, []), ("first", start, [])] and not explorer.map.busy
    while state.redo():
        pass
    assert (state.layer, explorer.test_id, explorer.selected) == ("first", 11, [1, 2])


def test_a_cancelled_map_after_an_undo_leaves_no_step(explorer):
    state = explorer.state
    with explorer.lock:  # so that the map comes after the click
        state.projection = "near"
        explorer.select(5)
    finished(explorer)
    state.undo()
    state.layer = "second"
    explorer.cancel()
    assert (state.layer, state.projection) == ("first", "near")
    assert [set(step) for step in state.past] == [{"projection"}]


def test_a_number_for_another_projection_is_kept_when_a_map_is_cancelled(explorer):
    explorer.state.near = {"near": 9}  # the map shown looks at no neighbours
    explorer.state.layer = "second"
    explorer.cancel()
    assert (explorer.state.layer, explorer.state.near) == ("first", {"near": 9}) and len(explorer.state.past) == 1


def test_a_cancelled_undo_is_done_again(explorer):
    state = explorer.state
    state.projection = "near"
    explorer.select(5)
    state.layer = "second"
    explorer.maps.atlas.go.set()
    finished(explorer)
    explorer.maps.atlas.go.clear()
    explorer.select(11)
    state.undo()
    busy, made = threading.Event(), explorer.atlas.place

    def wait(*args, **how):
        assert busy.wait(10)
        return made(*args, **how)

    explorer.atlas.place = wait
    state.undo()  # the layer
    assert explorer.map.busy and state.layer == "first"
    explorer.cancel()
    busy.set()
    assert (state.layer, state.projection, explorer.test_id) == ("second", "near", 5)
    assert [set(step) for step in state.past] == [{"projection"}, {"test_id"}, {"layer"}]
    assert [set(step) for step in state.future] == [{"test_id"}]
    state.redo()
    assert (state.layer, explorer.test_id) == ("second", 11)
    state.undo()
    state.undo()
    assert (state.layer, explorer.test_id) == ("first", 5)


def test_a_loaded_state_keeps_the_rest_when_its_map_is_cancelled(explorer, tmp_path):
    asked = json.loads(explorer.state.to_json()) | {"layer": "second", "method": "likeness", "k": 9}
    (tmp_path / "state.json").write_text(json.dumps(asked))
    explorer.load(tmp_path / "state.json")
    explorer.cancel()
    assert (explorer.state.layer, explorer.state.method, explorer.state.k) == ("first", "likeness", 9)
    explorer.state.undo()
    assert (explorer.state.layer, explorer.state.method, explorer.state.k) == ("first", "influence", 4)


def test_going_back_by_hand_needs_no_map(explorer):
    explorer.state.layer = "second"
    explorer.state.layer = "first"
    assert not explorer.map.busy and explorer.state.status == "" and len(explorer.state.past) == 2


# the end
def test_a_closed_explorer_lets_go_of_thread_and_arrays(task):
    explorer = Explorer(task, {"influence": Asked(made(task))}, Maps(task), test_ids=SHOWN)
    explorer.state.projection = "near"
    (thread,) = finished(explorer).maps.worker._threads
    parts = [weakref.ref(part) for part in (explorer, explorer.map, explorer.scatter, explorer.state, explorer.maps)]
    cloud, links, lasso = explorer.map, explorer.links, explorer.controls.lasso
    assert len(cloud.train_xy) == 8 * N_TRAIN and thread.is_alive()
    gc.collect()
    explorer.close()
    explorer.close()  # twice is once
    thread.join(10)
    assert not thread.is_alive() and cloud.train_xy == cloud.topk_ids == b"" and not explorer.answers.cache
    assert all(part.comm is None for part in (explorer, cloud, lasso, lasso.layout, lasso.style, *links))
    del explorer, cloud, links, lasso
    gc.collect()
    assert [part() for part in parts] == [None] * 5


def test_an_explorer_that_was_refused_can_be_collected(task, monkeypatch):
    seen = []
    monkeypatch.setattr("sys.unraisablehook", seen.append)  # ipywidgets closes a widget that is collected
    with pytest.raises(ValueError, match="test_ids"):
        Explorer(task, {"influence": made(task)}, places(task), test_ids=[500])
    gc.collect()
    assert seen == []


# the exported page
def test_the_page_holds_one_test_point_at_a_time():
    distance, near = torch.rand(50).numpy(), np.array([[[3, 7, -1], [9, -1, -1]]])
    scores = [torch.randn(50)]
    columns, ranges, words = told(distance, scores, near, dense=True)
    assert np.allclose(ranges[:, :1] + columns / 65535 * np.diff(ranges), np.stack([distance, scores[0]]), atol=1e-4)
    assert words == [caption(np.stack([distance, scores[0]], 1))]
    assert np.array_equal(told(distance, scores, near, dense=False)[0][0, 0, :2], distance[[3, 7]])


@pytest.mark.parametrize("dense", [True, False])
def test_the_page_has_captions_and_ellipses(task, tmp_path, monkeypatch, dense):
    if not dense:
        monkeypatch.setattr("influence_nb.widgets.export.DENSE", 100)
    methods = {"influence": made(task), "likeness": made(task, "cosine, ranked only", seed=2)}
    explorer = Explorer(task, methods, Maps(task))
    explorer.state.ellipses, explorer.state.class_filter = True, "owl"
    page = explorer.export_html(tmp_path / "page.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    explorer.select(7)
    for row, method in enumerate(methods):
        explorer.state.method = method
        assert data["captions"][SHOWN.index(7)][row] == explorer.scatter.caption
    assert data["map"]["ellipses"] and data["map"]["centres"]["$bytes"][1] == 3 * 24  # all classes: it has no filters
    assert ("columns" in data["points"]) == dense


def test_the_distances_of_many_points_are_never_held_together(task, tmp_path, monkeypatch):
    """With many scored points the page is built of one row at a time: none is kept in float."""
    monkeypatch.setattr("influence_nb.widgets.export.DENSE", 100)
    scores = Scores(torch.randn(len(task.test), N_TRAIN), "Made()", task.fingerprint(), torch.arange(len(task.test)),
                    torch.arange(N_TRAIN))
    explorer, kept = Explorer(task, {"influence": scores}, places(task)), []

    def distance(test_id, layer, metric):
        row = np.ones(N_TRAIN, np.float32).view(Tracked)
        kept.append(weakref.ref(row))
        return row

    class Tracked(np.ndarray):
        pass

    monkeypatch.setattr(explorer, "distance", distance)
    alive = []
    monkeypatch.setattr("influence_nb.widgets.export.told",
                        lambda *row: (alive.append(sum(ref() is not None for ref in kept)), told(*row))[1])
    explorer.export_html(tmp_path / "page.html")
    assert len(alive) == len(task.test) and max(alive) == 1


def test_a_map_that_lands_while_several_traits_are_set_is_not_the_one_to_go_back_to(explorer):
    state, maps = explorer.state, explorer.maps
    state.layer = "second"
    with state.hold_trait_notifications():  # as `load` and `undo` do: the handlers have not been told yet
        state.layer, state.projection = "first", "near"
        explorer.atlas.go.set()
        finished(explorer)
        assert maps.shown == ("first", "PCA", None)
    finished(explorer)
    assert maps.shown == maps.wish() == ("first", "near", 15) and not explorer.map.busy
    assert maps.kept == {"layer": "first", "projection": "near", "near": {}}


def test_a_distance_that_fails_does_not_take_the_map_with_it(explorer, monkeypatch):
    explorer.select(5)

    def fails(layer, metric, test_id):
        raise RuntimeError("no such ruler")

    monkeypatch.setattr(explorer.atlas, "distance", fails)
    explorer.atlas.go.set()
    explorer.state.layer = "second"
    finished(explorer)
    assert explorer.maps.shown == ("second", "PCA", None) and not explorer.map.busy
    assert "no such ruler" in explorer.scatter.note and explorer.scatter.train_xy == b""


def test_a_page_is_of_the_layer_and_distance_with_which_it_was_begun(explorer, tmp_path, monkeypatch):
    def while_told(*row):
        explorer.state.metric = "euclidean"
        return told(*row)

    explorer.select(5)
    first = explorer.export_html(tmp_path / "first.html").read_text()
    monkeypatch.setattr("influence_nb.widgets.export.told", while_told)
    assert explorer.export_html(tmp_path / "second.html").read_text() == first and explorer.state.metric == "euclidean"
