"""What an explorer keeps and gives away: undo, saved state, pictures, the page without a kernel; what it refuses."""

import io
import json
import re

import explorers
import numpy as np
import pytest
import torch
from explorers import SHOWN, Asked, made, places
from PIL import Image
from torch import nn
from torch.nn import functional as F

from influence_nb import Scores, Split, Task
from influence_nb.widgets import Explorer, ExplorerState
from influence_nb.widgets.export import script
from influence_nb.widgets.pointcloud import module


@pytest.fixture(scope="module")
def task():
    return explorers.task()


@pytest.fixture
def explorer(task):
    return explorers.explorer(task)


# undo, save, load
def test_undo_and_redo_walk_through_the_steps(explorer):
    state, start = explorer.state, explorer.test_id
    assert explorer.controls.undo.disabled
    explorer.select(5)
    explorer.select(11)
    for k in (5, 6, 7):  # one drag of the slider
        state.k = k
    explorer.selected = [1, 2]
    seen = []
    while state.undo():
        seen.append((explorer.test_id, state.k, explorer.selected, len(explorer.helpful)))
    assert seen == [(11, 7, [], 7), (11, 4, [], 4), (5, 4, [], 4), (start, 4, [], 4)]
    assert explorer.map.test_id == start and explorer.controls.undo.disabled
    while state.redo():
        pass
    assert (explorer.test_id, state.k, explorer.selected) == (11, 7, [1, 2]) and explorer.controls.redo.disabled
    state.undo()
    explorer.select(3)
    assert not state.redo()  # a new step ends what could be done again


def test_clear_is_one_step(explorer):
    state = explorer.state
    state.class_filter, state.pinned, state.selected = "dog", 5, [3]
    explorer.controls.clear.click()
    assert (state.class_filter, state.pinned, state.selected) == ("", None, [])
    state.undo()
    assert (state.class_filter, state.pinned, state.selected) == ("dog", 5, [3])


def test_saved_state_comes_back(explorer, tmp_path):
    state = explorer.state
    explorer.select(11)
    state.method, state.k, state.selected, state.flips, state.search = "likeness", 7, [3, 80], {4: 2}, "owl"
    path = explorer.save(tmp_path / "state.json")
    other = Explorer(explorer.task, explorer.answers.methods, places(explorer.task))
    other.load(path)
    assert other.state.asked() == state.asked() and other.helpful == explorer.helpful
    assert other.map.answer == explorer.map.answer and other.map.selected == explorer.map.selected


@pytest.mark.parametrize("change, says", [
    (lambda text: text[:40], "damaged file"),
    (lambda text: "[1, 2]", "got something else"),
    (lambda text: text.replace("explorer 1", "explorer 99"), "got something else"),
    (lambda text: re.sub('"task": "[^"]*"', '"task": "other"', text), "expected a state of task"),
    (lambda text: text.replace('"method": "influence"', '"method": "voodoo"'), "method must be one of 'influence'"),
    (lambda text: text.replace('"k": 4', '"k": 400'), "k must lie in 1..25, got 400"),
    (lambda text: text.replace('"k": 4', '"k": "four"'), "does not fit"),
    (lambda text: text.replace('"selected": []', '"selected": [90]'), "training ids in 0..89, got 90"),
    (lambda text: text.replace('"flips": {}', '"flips": {"4": 9}'), "class numbers in 0..2, got 9"),
    (lambda text: text.replace('"search"', '"serach"'), "missing or unknown: search, serach"),
])
def test_a_damaged_or_foreign_state_is_refused_whole(explorer, change, says, tmp_path):
    explorer.select(7)
    text = explorer.state.to_json().replace('"test_id": 7', '"test_id": 11')
    path, before = tmp_path / "state.json", explorer.state.asked()
    assert change(text) != text
    path.write_text(change(text))
    with pytest.raises(ValueError, match=re.escape(says)):
        explorer.load(path)
    assert explorer.state.asked() == before and explorer.test_id == 7


def test_state_alone_refuses_what_is_not_there():
    state = ExplorerState([4, 9], 20, ("a", "b"), ["m"], ["layer"], ["PCA"], ["cosine"])
    for name, value, says in (("test_id", 5, "one of the 2 test points shown (4, 9, ...), got 5"),
                              ("layer", "x", "layer must be one of 'layer', got 'x'"), ("k", 0, "k must lie in 1..25"),
                              ("removed", [20], "removed must hold training ids in 0..19, got 20"),
                              ("class_filter", "c", "class_filter must be one of '', 'a', 'b'")):
        with pytest.raises(ValueError, match=re.escape(says)):
            setattr(state, name, value)
    assert (state.test_id, state.layer, state.k, state.removed, state.past) == (None, "layer", 10, [], [])


# what goes into files
def test_the_display_carries_a_small_opaque_picture(explorer):
    image = Image.open(io.BytesIO(explorer._repr_mimebundle_()["image/png"]))
    pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] == 1100 and (pixels[0] == 255).all() and (pixels != 255).any(-1).mean() > 0.05
    explorer.select(None)
    empty = np.asarray(Image.open(io.BytesIO(explorer._repr_mimebundle_()["image/png"])).convert("RGB"))
    assert len(empty) < len(pixels)  # no gallery without a question


def test_the_figure_names_the_neighbours(explorer):
    explorer.select(5)
    figure = explorer.figure()
    words = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
    assert f"Test point 5: {explorer.examples.words('test', 5)}" in words
    assert explorer.scatter.y_label in words and explorer.scatter.x_label in words
    best = f"{explorer.map.answer['helpful_scores'][0]:+.3g}"
    assert best in words


def test_the_page_asks_nobody_and_holds_text_as_text(tmp_path):
    nasty = "</script><img src=x onerror=alert(1)>"
    x, y = torch.randn(9, 2), torch.arange(9) % 2
    split = Split(x, y, (nasty, "b"), [f"{nasty} {i}" for i in range(9)])
    task = Task(nn.Linear(2, 2), split, split.take([1, 2, 3]))
    method = Asked(Scores(torch.randn(3, 9), "M()", task.fingerprint(), torch.arange(3), torch.arange(9)))
    explorer = Explorer(task, {nasty: method}, (x, x[1:4]), test_ids=[0, 2])
    page = explorer.export_html(tmp_path / "page.html").read_text()
    assert "<img" not in page and page.count("</script>") == 3 and "default-src 'none'" in page
    assert not re.search(r"https?://|['\"(]//[\w-]+\.", page)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert data["gallery"]["test_texts"] == [f"{nasty} 1", f"{nasty} 3"] and data["map"]["preloaded"] == [True]
    assert method.asked[-1] == [0, 2]  # the page answers for every test point shown


def test_modules_import_nothing_at_run_time():
    for name in ("pointcloud.js", "gallery.js"):
        assert not re.search(r"^import ", module(name), re.M) and module(name).count("export default") == 1
    assert "export" not in re.findall(r"^\w+", script(), re.M)


# errors
def refused(error, says, *args, **options):
    with pytest.raises(error, match=re.escape(says)):
        Explorer(*args, **options)


def test_bad_input_is_refused_with_a_cure(task):
    good, xy = made(task), places(task)
    train, test = xy
    torch.manual_seed(5)
    other = Task(nn.Sequential(nn.Flatten(), nn.Linear(20, 3)), task.train, task.test)
    refused(TypeError, "task must be a Task, got str", "task", {"a": good}, xy)
    refused(TypeError, "methods must be a dictionary", task, good, xy)
    refused(TypeError, "method 'a' must be Scores or have .scores(split), got int", task, {"a": 3}, xy)
    refused(ValueError, f"must belong to task {other.fingerprint()}", other, {"a": good}, xy)
    refused(ValueError, "which lack 1 of 2, first 6", task, {"a": good}, xy, test_ids=[3, 6])
    refused(ValueError, "test_ids must be different numbers in 0..19", task, {"a": Asked(good)}, xy, test_ids=[3, 20])
    refused(ValueError, "test_ids must be different numbers", task, {"a": good}, xy, test_ids=[3, 3])
    refused(ValueError, "at least one test point", task, {"a": good}, xy, test_ids=[])
    refused(ValueError, "no test point in common", task, {"a": good, "b": made(task, test_ids=[6])}, xy)
    refused(ValueError, "embedding[0] must be [n_train, 2] = (90, 2), got (8, 2)", task, {"a": good}, (train[:8], test))
    refused(ValueError, "or (6, 2) for the test points shown, got (7, 2)", task, {"a": good}, (train, test[:7]))
    refused(TypeError, "an Atlas or a pair of arrays", task, {"a": good}, train)
    refused(ValueError, "k must lie in 1..25, got 26", task, {"a": good}, xy, k=26)
    line = Split(torch.randn(8, 2), torch.randn(8))
    model = Task(nn.Linear(2, 1), line, line, loss=lambda outputs, y: F.mse_loss(outputs[:, 0], y, reduction="none"))
    refused(TypeError, "needs class numbers", model, {"a": good}, xy)


def test_scores_of_part_of_the_training_set_are_refused(task):
    part = Scores(torch.randn(2, 30), "Part()", task.fingerprint(), torch.tensor([3, 5]), torch.arange(30))
    refused(ValueError, "must cover the 90 training examples in order, got 30 ids", task, {"part": part}, places(task))


def test_the_first_mistake_is_shown_at_the_start(task):
    wrong = [i for i in SHOWN if i in task.mistakes().tolist()]
    explorer = Explorer(task, {"influence": made(task)}, places(task))
    assert explorer.test_ids == SHOWN and explorer.test_id == wrong[0] and explorer.helpful
    asked = Explorer(task, {"asked": Asked(made(task, test_ids=list(range(20))))}, places(task))
    assert asked.test_ids == task.mistakes().tolist()
