"""The explorer without a browser: answers against the scores, the traits of its views, filters, maps in the worker."""

import threading

import explorers
import numpy as np
import pytest
import torch
from explorers import N_TRAIN, SHOWN, Asked, Maps, made, places
from torch import nn

from influence_nb import Scores, Split, Task
from influence_nb.scores import EFFECT
from influence_nb.widgets import Explorer
from influence_nb.widgets.answers import Answers
from influence_nb.widgets.pictures import picture_shape, thumbnails


@pytest.fixture(scope="module")
def task():
    return explorers.task()


@pytest.fixture
def explorer(task):
    return explorers.explorer(task)


def until(condition):
    done = threading.Event()
    for _ in range(500):
        if condition():
            return
        done.wait(0.01)
    raise AssertionError("not within 5 s")


def float32(raw, *shape):
    return np.frombuffer(raw, "<f4").reshape(*shape)


# answers
@pytest.mark.parametrize("method", ["influence", "likeness"])
def test_preload_and_click_are_the_scores_own_top(explorer, method):
    scores, row = explorer.answers.methods[method], list(explorer.answers.methods).index(method)
    ids, values = explorer.answers.preload(SHOWN)
    explorer.state.method = method
    for at, test_id in enumerate(SHOWN):
        top = scores.top(test_id, 25)
        for side, (expected, strength) in enumerate((top[1:3], top[3:5])):
            found = ids[row, at, side]
            assert found[found >= 0].tolist() == expected
            assert values[row, at, side][found >= 0].tolist() == strength
        explorer.test_id = test_id
        assert (explorer.helpful, explorer.harmful) == (top.helpful[:4], top.harmful[:4])
        assert explorer.map.answer == {"test_id": test_id, "method": row, "k": 4, "helpful": explorer.helpful,
                                       "helpful_scores": top.helpful_scores[:4], "harmful": explorer.harmful,
                                       "harmful_scores": top.harmful_scores[:4]}


def test_what_the_browser_holds_is_what_python_computes(explorer):
    ids = np.frombuffer(explorer.map.topk_ids, "<i4").reshape(2, len(SHOWN), 2, 25)
    assert np.array_equal(ids, explorer.answers.preload(SHOWN)[0])
    assert explorer.map.preloaded == [True, True] and explorer.map.depth == 25
    assert np.frombuffer(explorer.map.test_ids, "<i4").tolist() == SHOWN


def test_float64_scores_are_ranked_before_they_are_rounded(task):
    values = torch.ones(1, N_TRAIN, dtype=torch.float64)
    values[0, 50] += 1e-12  # nothing in float32
    scores = Scores(values, "Fine()", task.fingerprint(), torch.tensor([3]), torch.arange(N_TRAIN))
    answers = Answers(task, {"fine": scores})
    assert answers.top("fine", 3, 3)["helpful"] == scores.top(3, 3).helpful == [50, 0, 1]


def test_a_side_without_scores_of_its_sign_is_empty(task):
    scores = Scores(torch.rand(1, N_TRAIN), "Good()", task.fingerprint(), torch.tensor([3]), torch.arange(N_TRAIN))
    explorer = Explorer(task, {"good": scores}, places(task), k=25)
    assert len(explorer.helpful) == 25 and explorer.harmful == []


def test_a_method_is_asked_once_for_each_click_and_never_ahead(task):
    method = Asked(made(task))
    explorer = Explorer(task, {"asked": method}, places(task), test_ids=SHOWN, k=3)
    start = explorer.test_id
    assert explorer.map.preloaded == [False] and method.asked == [[start]]
    for test_id in (7, 11, 7):
        explorer.select(test_id)
        assert explorer.helpful == method.held.top(test_id, 3).helpful
    assert method.asked == [[start], [7], [11]]


def test_without_preload_the_browser_has_no_neighbours(task):
    explorer = Explorer(task, {"influence": made(task)}, places(task), preload=False)
    assert explorer.map.preloaded == [False] and not explorer.map.topk_ids
    assert explorer.helpful == made(task).top(explorer.test_id, 10).helpful


# views
def test_the_scatter_has_distance_and_score_of_every_training_example(task):
    scores = made(task)
    explorer = Explorer(task, {"influence": scores}, Maps(task))
    for metric in ("cosine", "euclidean"):
        explorer.state.metric = metric
        explorer.select(5)
        xy = float32(explorer.scatter.train_xy, N_TRAIN, 2)
        assert np.array_equal(xy[:, 0], explorer.atlas.distance("first", metric, 5))
        assert np.array_equal(xy[:, 1], scores.row(5).numpy())
        assert explorer.scatter.x_label == f"{metric} distance (units)"
        assert explorer.scatter.y_label == f"influence ({EFFECT})" and explorer.scatter.owner == "5/0"


def test_the_distance_of_a_given_map_is_the_one_on_it(explorer):
    train, test = places(explorer.task)
    explorer.select(7)
    xy = float32(explorer.scatter.train_xy, N_TRAIN, 2)
    assert np.allclose(xy[:, 0], np.linalg.norm(train - test[7], axis=1))
    assert np.array_equal(float32(explorer.map.test_xy, len(SHOWN), 2), test[SHOWN])


def test_colours_follow_label_prediction_and_correctness(explorer):
    task = explorer.task
    wrong = (task.predict(task.train) != task.train.y).numpy()
    assert 0 < wrong.sum() < N_TRAIN
    for by, expected in (("label", task.train.y), ("predicted", task.predict(task.train)), ("correct", wrong)):
        explorer.state.colour_by = by
        for view in (explorer.map, explorer.scatter):
            assert np.array_equal(np.frombuffer(view.train_class, "<u2"), np.asarray(expected))
    assert explorer.map.class_names == ["correct", "mistaken"] and len(explorer.map.palette) == 2


def test_the_gallery_carries_labels_predictions_losses_and_thumbnails(explorer):
    task, gallery = explorer.task, explorer.gallery
    assert np.array_equal(np.frombuffer(gallery.train_predicted, "<u2"), task.predict(task.train))
    assert np.allclose(float32(gallery.test_loss, -1), task.losses(task.test.take(SHOWN)).detach())
    ids = np.frombuffer(gallery.train_picture_ids, "<i4")
    pictures = np.frombuffer(gallery.train_pictures, "u1").reshape(-1, *gallery.picture_shape)
    assert gallery.picture_shape == [4, 5, 1] and set(explorer.helpful + explorer.harmful) <= set(ids.tolist())
    assert np.array_equal(pictures[7, :, :, 0], (task.train.x[ids[7], 0] * 255 + 0.5).byte())
    effect, ranked = gallery.side_names
    assert effect == ["helpful", "harmful"] and ranked == ["highest", "lowest"]  # no effects, so nothing is harmed


def test_thumbnails_keep_colour_and_shrink_large_images():
    x = torch.rand(3, 3, 130, 70) * 2 - 1
    assert picture_shape(x) == [44, 24, 3]
    small = thumbnails(x, [2], (-1.0, 1.0))[0]
    assert np.abs(small[5, 6] / 255 * 2 - 1 - x[2, :, 15, 18].numpy()).max() < 0.01


def test_the_browser_gets_pictures_that_it_asks_for_and_nothing_else(explorer):
    sent = []
    explorer.map.send = lambda content, buffers: sent.append((content, buffers))
    explorer._asked(explorer.map, {"type": "want", "layer": "train", "ids": [80, 4, 4000, "x"]}, [])
    explorer._asked(explorer.map, {"type": "want", "layer": "elsewhere", "ids": [1]}, [])
    (content, (pixels,)), = sent
    assert content["ids"] == [80, 4]
    assert pixels == thumbnails(explorer.task.train.x, [80, 4], (0, 1)).tobytes()


def test_a_selection_of_the_browser_reaches_python(explorer):
    raw = np.array([4, 80], "<i4").tobytes()
    explorer.map.set_state({"selected": memoryview(raw)})  # what a comm delivers, which plain Bytes refuses
    assert explorer.selected == [4, 80] and explorer.map.selected == raw
    explorer.selected = [7]
    assert np.frombuffer(explorer.map.selected, "<i4").tolist() == [7]


def test_a_click_of_the_browser_reaches_python(explorer):
    answer = explorer.answers.top("influence", 11, 4)
    explorer.map.set_state({"test_id": 11, "answer": answer})
    assert explorer.test_id == 11 and explorer.helpful == answer["helpful"]
    assert explorer.scatter.owner == "11/0"


def test_the_pinned_point_keeps_its_own_neighbours(explorer):
    explorer.select(5)
    explorer.controls.pin.click()
    explorer.select(11)
    assert explorer.state.pinned == 5 and explorer.map.pinned_answer["helpful"] == made(explorer.task).top(5, 4).helpful
    explorer.controls.pin.click()
    assert explorer.state.pinned is None and explorer.map.pinned_answer == {}


# filters
def shown(explorer, layer, n):
    raw = getattr(explorer.map, f"{layer}_hidden")
    return np.flatnonzero(np.frombuffer(raw, "u1") == 0).tolist() if raw else list(range(n))


def test_filters_hide_what_does_not_match(explorer):
    task, state = explorer.task, explorer.state
    y, rows = task.train.y.numpy(), len(SHOWN)
    test_y, wrong = task.test.y[SHOWN].numpy(), (task.predict() != task.test.y)[SHOWN].numpy()
    state.class_filter = "owl"
    assert shown(explorer, "train", N_TRAIN) == np.flatnonzero(y == 2).tolist()
    assert shown(explorer, "test", rows) == np.flatnonzero(test_y == 2).tolist()
    state.class_filter, state.misclassified_only = "", True
    assert shown(explorer, "train", N_TRAIN) == list(range(N_TRAIN))
    assert 0 < wrong.sum() < rows and shown(explorer, "test", rows) == np.flatnonzero(wrong).tolist()
    state.misclassified_only, state.search = False, "#5, do"
    assert shown(explorer, "train", N_TRAIN) == np.flatnonzero((y == 1) | (np.arange(N_TRAIN) == 5)).tolist()
    assert explorer.scatter.train_hidden == explorer.map.train_hidden
    state.search = "7"
    assert explorer.test_id == 7  # one test point matches: it is shown
    explorer.controls.clear.click()
    assert explorer.map.train_hidden == explorer.map.test_hidden == b"" and state.search == ""


def test_search_finds_words_in_texts():
    words = ["a good film", "Bad acting", "no opinion", "so-so", "good grief", "BAD luck", "fine"]
    x, y = torch.randn(7, 2), torch.tensor([0, 1, 0, 1, 0, 1, 0])
    split = Split(x, y, ("plus", "minus"), words)
    task = Task(nn.Linear(2, 2), split, split.take([0, 1, 2]))
    scores = Scores(torch.randn(3, 7), "Made()", task.fingerprint(), torch.arange(3), torch.arange(7))
    explorer = Explorer(task, {"made": scores}, (x, x[:3]))
    explorer.state.search = "bad"
    assert shown(explorer, "train", 7) == [1, 5] and shown(explorer, "test", 3) == [1] and explorer.test_id == 1
    assert explorer.gallery.train_texts == [words[i] for i in np.frombuffer(explorer.gallery.train_picture_ids, "<i4")]


# maps in the worker
def test_a_map_is_computed_beside_the_clicks(task):
    maps = Maps(task)
    explorer = Explorer(task, {"influence": made(task)}, maps)
    before = explorer.map.train_xy
    explorer.state.layer = "second"
    assert explorer.state.status == "computing PCA of second" and explorer.map.busy and explorer.map.train_xy == before
    explorer.select(5)
    assert explorer.helpful == made(task).top(5, 10).helpful  # while the map is being made
    near = float32(explorer.scatter.train_xy, N_TRAIN, 2)[:, 0].copy()
    maps.go.set()
    until(lambda: not explorer.map.busy)
    assert np.array_equal(float32(explorer.map.train_xy, -1), -float32(before, -1))
    assert explorer.map.title == "Map: PCA of second" and explorer.state.status == ""
    until(lambda: np.array_equal(float32(explorer.scatter.train_xy, N_TRAIN, 2)[:, 0], 2 * near))


def test_a_cancelled_map_changes_nothing(task):
    maps = Maps(task)
    explorer = Explorer(task, {"influence": made(task)}, maps)
    before, past = explorer.map.train_xy, len(explorer.state.past)
    explorer.state.layer = "second"
    explorer.controls.cancel.click()
    assert explorer.state.layer == "first" and not explorer.map.busy and len(explorer.state.past) == past
    maps.go.set()
    explorer.maps.worker.submit(int).result(10)  # what was begun has ended
    assert explorer.map.train_xy == before and explorer.map.title == "Map: PCA of first"


def test_a_failed_map_says_so_and_goes_back(task):
    explorer = Explorer(task, {"influence": made(task)}, Maps(task))
    explorer.state.projection = "broken"
    until(lambda: not explorer.map.busy)
    until(lambda: explorer.map.note)
    assert explorer.map.note == "broken of first failed: no such luck" and explorer.state.projection == "PCA"


def test_a_method_that_fails_leaves_nothing_of_another_test_point(task):
    class Failing(Asked):
        def scores(self, split=None):
            if int(split.ids[0]) == SHOWN[1]:
                raise RuntimeError("no such luck")
            return super().scores(split)

    explorer = Explorer(task, {"asked": Failing(made(task))}, places(task), test_ids=SHOWN)
    explorer.select(SHOWN[0])
    assert explorer.helpful or explorer.harmful
    with pytest.raises(RuntimeError, match="no such luck"):
        explorer.select(SHOWN[1])
    assert (explorer.helpful, explorer.harmful, explorer.map.answer) == ([], [], {})
    assert explorer.scatter.train_xy == b"" and "failed for test point" in explorer.map.note
    explorer.select(SHOWN[0])
    assert explorer.map.answer["test_id"] == SHOWN[0]


def test_places_that_are_not_finite_are_refused(task):
    train, test = places(task)
    train = np.array(train)
    train[3, 1] = np.nan
    with pytest.raises(ValueError, match="place training points at finite numbers, got .* in row 3"):
        Explorer(task, {"asked": Asked(made(task))}, (train, test), test_ids=SHOWN)


def test_scores_in_half_precision_are_as_good_as_others(task):
    scores = made(task)
    large = Scores(torch.full(scores.shape, 3e4, dtype=torch.float16), "Toy()", scores.task, scores.test_ids,
                   scores.train_ids)
    assert Explorer(task, {"half": large}, places(task), test_ids=SHOWN).helpful


def test_a_search_that_is_undone_or_loaded_does_not_jump(task, tmp_path):
    explorer = Explorer(task, {"asked": Asked(made(task))}, places(task), test_ids=SHOWN)
    explorer.state.search = str(SHOWN[2])
    assert explorer.test_id == SHOWN[2]
    explorer.select(SHOWN[0])
    explorer.save(tmp_path / "state.json")
    explorer.state.search = ""
    explorer.state.undo()
    assert explorer.state.search == str(SHOWN[2]) and explorer.test_id == SHOWN[0]
    explorer.select(SHOWN[1])
    explorer.load(tmp_path / "state.json")
    assert (explorer.state.search, explorer.test_id) == (str(SHOWN[2]), SHOWN[0])


@pytest.mark.parametrize("text", [b"[" * 200_000, b"\xff\xfe{}", b"{", b"[]"])
def test_a_hostile_state_file_is_refused(explorer, tmp_path, text):
    (tmp_path / "state.json").write_bytes(text)
    before = explorer.state.to_json()
    with pytest.raises(ValueError, match="expected the saved state of an explorer"):
        explorer.load(tmp_path / "state.json")
    assert explorer.state.to_json() == before
