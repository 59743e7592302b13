"""The label audit without a browser: its order, its decisions and their file, what a retraining says, what it shows."""

import io
import json
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from problems import digits_task

from influence_nb import Influence, Split, Task, data, labels, models
from influence_nb.widgets import LabelAudit, auditstate
from influence_nb.widgets.auditdesk import KEYS

LOSS = {"loss": labels.loss}


@pytest.fixture(scope="module")
def planted():
    """(task, planted): 60 pictures of 3 x 3 in four classes, 15 with a wrong label; a model fitted to them."""
    task = digits_task(n=60, n_test=90, trained=False)
    flipped, planted = data.flip_labels(task.train, 0.25, seed=1)
    return replace(task, train=flipped), planted


@pytest.fixture
def audit(planted):
    return LabelAudit(planted[0], LOSS)


def press(audit, act, **more):
    """What the browser sends at a key."""
    audit.desk._handle_custom_msg({"act": act, "id": audit.desk.content["id"], **more}, [])


# the order
def test_labels_are_asked_for_by_suspicion_of_the_last_layer(planted):
    task, _ = planted
    audit = LabelAudit(task, {"loss": labels.loss, "numbers": torch.arange(60) % 7, "importance": labels.importance})
    last = labels.last_layer(task)
    assert audit.state.order == labels.ranked(labels.loss(last)).tolist() and audit.shown == audit.state.order[0]
    audit.fix(0)
    audit.score.value = "numbers"
    assert audit.state.order[:3] == [6, 13, 20] and audit.shown == 6 and audit.desk.content["score"] == "numbers 6"
    audit.score.value = "importance"
    assert audit.state.order == labels.ranked(labels.importance(last)).tolist()
    for number, expected in ((-99, 0), (1, 1), (-1, 0), (-5, 0), (59, 59), (7, 59)):
        press(audit, "move", step=number)
        assert audit.shown == audit.state.order[expected] and audit.desk.content["place"] == expected + 1
    audit.shown = 17
    assert audit.desk.content["id"] == 17 and audit.desk.content["predicted"] == int(last.predict(last.train)[17])


def test_a_suspicion_that_fails_is_said_and_the_order_stays(planted):
    audit = LabelAudit(planted[0], {**LOSS, "broken": lambda task: 1 / 0})
    before = audit.state.order
    with pytest.raises(ZeroDivisionError):
        audit.score.value = "broken"
    assert audit.state.order == before and audit.desk.content["error"] == "broken failed: division by zero"
    assert audit.score.value == audit.by == "loss" and audit.retrain().fixed == 0  # and goes on with what works
    assert audit.desk.content["score"].startswith("loss ")


# decisions
def test_keep_fix_remove_and_undo(audit, planted):
    y, order = planted[0].train.y, audit.state.order
    other = (int(y[order[1]]) + 1) % 4
    press(audit, "keep")
    press(audit, "fix", label=other)
    press(audit, "remove")
    press(audit, "fix", label=int(y[order[3]]))                 # to what it is: that is to keep it
    first = [{"id": order[0], "decision": "keep", "label": int(y[order[0]])},
             {"id": order[1], "decision": "fix", "label": other},
             {"id": order[2], "decision": "remove", "label": None},
             {"id": order[3], "decision": "keep", "label": int(y[order[3]])}]
    assert audit.decisions == first and audit.shown == order[4]
    corrected = audit.corrected()
    expected = y.clone()
    expected[order[1]] = other
    assert corrected.ids.tolist() == [i for i in range(60) if i != order[2]]
    assert torch.equal(corrected.y, expected[corrected.ids]) and corrected.classes == planted[0].train.classes
    assert torch.equal(planted[0].train.y, y) and torch.equal(corrected.x, planted[0].train.x[corrected.ids])
    assert audit.desk.content["tally"] == "4 of 60 labels checked: 2 kept, 1 fixed, 1 removed"
    press(audit, "move", step=-2)                               # back to the removed one, and of another mind
    assert audit.shown == order[2] and audit.desk.content["decision"] == "remove"
    press(audit, "keep")
    assert audit.shown == order[4] and audit.decisions == [*first[:2], first[3], {
        "id": order[2], "decision": "keep", "label": int(y[order[2]])}]
    press(audit, "undo")
    assert audit.decisions == first and audit.shown == order[2]
    for _ in range(9):                                          # to the beginning, and no further
        press(audit, "undo")
    assert audit.decisions == [] and audit.shown == order[0] and torch.equal(audit.corrected().y, y)


def test_the_last_undecided_example_is_reached_from_anywhere(audit):
    order = audit.state.order
    for i in order[1:]:
        audit.shown = i
        audit.keep()
    assert audit.shown == order[0] and not audit.desk.content["done"]
    audit.keep()
    assert audit.desk.content["done"] and len(audit.decisions) == 60 and audit.shown == order[0]


def test_what_makes_no_sense_is_said_and_decides_nothing(audit):
    for message, says in (({"act": "fix", "label": 4}, "a label is fixed to a class 0..3, got 4"),
                          ({"act": "fix"}, "a label is fixed to a class 0..3, got None"),
                          ({"act": "fix", "label": True}, "a label is fixed to a class 0..3, got True"),
                          ({"act": "keep", "id": 60}, "a decision is on a training example 0..59, got 60"),
                          ({"act": "keep", "id": "3"}, "a decision is on a training example 0..59, got '3'"),
                          ({"act": "move", "step": []}, "")):
        turn = audit.desk.content["turn"]
        press(audit, **message)
        assert says in audit.desk.content["error"] and audit.decisions == [] and audit.desk.content["turn"] > turn
    press(audit, "keep")
    assert audit.desk.content["error"] == "" and len(audit.decisions) == 1


def test_every_class_has_its_own_key_and_none_that_of_another_act():
    assert KEYS[:10] == "0123456789" and len(set(KEYS)) == len(KEYS) == 33 and not set(KEYS) & set("kru")


# the file
def test_decisions_are_in_the_file_as_they_are_made_and_outlive_the_kernel(planted, tmp_path):
    path = tmp_path / "decisions.json"
    audit = LabelAudit(planted[0], LOSS, path=path)
    assert not path.exists()
    for count, act in enumerate(("keep", "remove", "keep"), start=1):
        press(audit, act)
        assert len(json.loads(path.read_text())["decisions"]) == count
    assert [file.name for file in tmp_path.iterdir()] == ["decisions.json"]
    again = LabelAudit(planted[0], {"importance": labels.importance}, path=str(path))
    assert again.decisions == audit.decisions and torch.equal(again.corrected().ids, audit.corrected().ids)
    assert again.shown == next(i for i in again.state.order if i not in [d["id"] for d in audit.decisions])
    again.undo()
    assert again.shown == audit.decisions[-1]["id"] and again.decisions == audit.decisions[:-1]
    assert LabelAudit(planted[0], LOSS, path=path).decisions == again.decisions


@pytest.mark.parametrize("text, says", [
    ("{", "got a damaged one in decisions.json"), (b"\xff\xfe\x00", "got a damaged one"), ("[" * 100_000, "a damaged"),
    ("[1, 2]", "got something else in decisions.json"), ('{"format": "influence_nb explorer 1"}', "something else"),
    ('{"format": "influence_nb audit 1", "split": "0"}', "expected decisions on split [0-9a-f]{16}, got those on 0"),
])
def test_another_file_is_refused_and_left_alone(planted, tmp_path, text, says):
    path = tmp_path / "decisions.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = path.read_bytes()
    with pytest.raises(ValueError, match=says):
        LabelAudit(planted[0], LOSS, path=path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("event", [
    {"id": 60, "decision": "keep", "label": 0, "time": 0}, {"id": 3, "decision": "burn", "label": 0, "time": 0},
    {"id": 3, "decision": "fix", "label": 4, "time": 0}, {"id": 3, "decision": "fix", "label": 1}, 7])
def test_a_decision_that_does_not_fit_the_split_is_refused(planted, tmp_path, event):
    task, path = planted[0], tmp_path / "decisions.json"
    LabelAudit(task, LOSS, path=path).keep()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"decisions": [event]}))
    with pytest.raises(ValueError, match="expected decisions that fit the split, got others in decisions.json"):
        LabelAudit(task, LOSS, path=path)


def test_the_decisions_on_other_labels_are_refused(planted, tmp_path):
    task, flips = planted
    LabelAudit(task, LOSS, path=tmp_path / "decisions.json").keep()
    clean = replace(task, train=labels.repaired(task.train, flips, range(60)))
    with pytest.raises(ValueError, match="the examples or their labels differ; give another path"):
        LabelAudit(clean, LOSS, path=tmp_path / "decisions.json")


def test_a_write_that_fails_is_said_and_the_old_file_stays_whole(planted, tmp_path, monkeypatch):
    path = tmp_path / "decisions.json"
    audit = LabelAudit(planted[0], LOSS, path=path)
    press(audit, "keep")
    before = path.read_bytes()

    def full(*paths):
        raise OSError("no space left on device")

    monkeypatch.setattr(auditstate.os, "replace", full)
    press(audit, "remove")
    assert audit.desk.content["error"] == "not written to decisions.json, and lost with this session: no space left " \
        "on device" and len(audit.decisions) == 2 and path.read_bytes() == before
    monkeypatch.undo()
    press(audit, "keep")
    assert audit.desk.content["error"] == "" and LabelAudit(planted[0], LOSS, path=path).decisions == audit.decisions


def test_an_audit_does_not_overwrite_what_another_has_written(planted, tmp_path):
    first, second = (LabelAudit(planted[0], LOSS, path=tmp_path / "a.json") for _ in range(2))
    first.keep()
    first.keep()
    kept = (tmp_path / "a.json").read_bytes()
    second.remove()
    assert (tmp_path / "a.json").read_bytes() == kept and "another audit has changed it" in second.state.error
    assert second.decisions[0]["decision"] == "remove" and [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert LabelAudit(planted[0], LOSS, path=tmp_path / "a.json").decisions == first.decisions


def test_time_spent_counts_a_long_pause_as_a_minute(audit, monkeypatch):
    clock = iter([100.0, 102.5, 5000.0, 5001.0])
    monkeypatch.setattr(auditstate.time, "time", lambda: next(clock))
    for _ in range(4):
        audit.keep()
    assert audit.seconds == 2.5 + 60 + 1


# retraining
def test_an_audit_that_knows_the_truth_repairs_the_split_and_says_what_that_changed(planted):
    task, flips = planted
    last, old = labels.last_layer(task), dict(zip(flips.rows.tolist(), flips.old.tolist()))
    audit = LabelAudit(task, LOSS)
    order = audit.state.order
    for _ in range(20):
        audit.fix(old[audit.shown]) if audit.shown in old else audit.keep()
    suspicion = labels.loss(last)
    repaired = labels.repaired(task.train, flips, order[:20])
    assert torch.equal(audit.corrected().y, repaired.y)
    done = audit.retrain()
    assert (done.before, done.after) == tuple(labels.accuracies(last, flips, suspicion, [0, 20]).tolist())
    assert done.fixed == len(set(order[:20]) & set(old)) > 5 and done.removed == 0 and done.after > done.before
    assert (done.right - done.wrong) / 90 == pytest.approx(done.after - done.before) and done.right > 0
    assert audit.desk.content["history"] == [f"Retraining 1: {done}"]
    assert str(done) == (f"{done.fixed} labels fixed: test accuracy {100 * done.before:.1f} % \u2192 "
                         f"{100 * done.after:.1f} % ({done.right} turned right, {done.wrong} wrong)")
    again = labels.asked_again(last, flips, labels.loss, [20, 60])                  # the new model is asked
    left = labels.ranked(again).tolist()[20:]
    assert [i for i in audit.state.order if i not in order[:20]] == left and audit.shown == left[0]
    new = labels.last_layer(replace(task, train=repaired))
    assert audit.predicted.tolist() == new.predict(new.train).tolist()


def test_removed_examples_are_not_trained_on_and_come_last(audit, planted):
    gone = audit.shown
    audit.remove()
    predicted = audit.predicted[gone]
    done = audit.retrain()
    split = audit.corrected()
    model = labels.last_layer(replace(planted[0], train=split))
    assert done.removed == 1 and done.after == float((model.predict() == model.test.y).double().mean())
    assert audit.state.order[-1] == gone and audit.predicted[gone] == predicted
    kept = [i for i in range(60) if i != gone]
    assert audit.state.order[:-1] == [kept[row] for row in labels.ranked(labels.loss(model)).tolist()]
    assert "1 example removed" in str(done) and "fixed" not in str(done)


class Gate:
    """A retrainer that waits halfway until it is let go, and keeps what it was given."""

    def __init__(self, task):
        self.task, self.seen, self.go, self.begun = task, [], threading.Event(), threading.Event()

    def __call__(self, split, progress):
        self.seen.append(split)
        progress(0.5)
        self.begun.set()
        assert self.go.wait(10)
        progress(1.0)
        return labels.last_layer(replace(self.task, train=split))


def test_a_retrainer_of_ones_own_is_first_shown_the_labels_as_given(planted):
    task, _ = planted
    gate, shares = Gate(task), []
    gate.go.set()
    audit = LabelAudit(task, LOSS, gate)
    assert audit.state.order == labels.ranked(task.losses(task.train)).tolist()     # of the task as it is
    audit.state.observe(lambda change: shares.append(change.new), "progress")
    audit.fix((int(task.train.y[audit.shown]) + 1) % 4)
    first = audit.retrain()
    assert [torch.equal(split.y, y) for split, y in zip(gate.seen, (task.train.y, audit.corrected().y))] == [True] * 2
    assert audit.retrain() == first and len(gate.seen) == 3                         # the control was trained once
    assert all(0 <= share <= 1 for share in shares) and 0.25 in shares


def test_labels_are_checked_while_it_trains_and_cancel_ends_it(planted):
    gate = Gate(planted[0])
    audit = LabelAudit(planted[0], LOSS, gate)
    audit.keep()
    audit.start.click()
    assert gate.begun.wait(10) and audit.start.disabled and audit.cancel.layout.display is None
    press(audit, "remove")
    assert len(audit.decisions) == 2
    with pytest.raises(ValueError, match="a retraining is running: wait for it, or cancel it"):
        audit.retrain()
    audit.cancel.click()
    assert audit.status.value == "cancelling at the next step"
    gate.go.set()
    finish(audit)
    assert audit.history == [] and audit.status.value.startswith("cancelled after") and not audit.start.disabled
    assert audit.cancel.layout.display == "none" and len(gate.seen) == 1
    audit.start.click()
    finish(audit)
    assert audit.history[0].removed == 1 and audit.status.value.startswith("done in")


def finish(audit):
    for _ in range(500):
        if not audit.state.running:
            return
        threading.Event().wait(0.01)
    raise AssertionError("not within 5 s")


@pytest.mark.parametrize("retrain, says", [
    (lambda split, progress: 1 / 0, "the retraining failed: ZeroDivisionError: division by zero"),
    (lambda split, progress: 0.9, "expected|must return a Task trained on the 60 examples of the split given, got 0.9"),
])
def test_what_goes_wrong_is_said_on_the_desk(planted, retrain, says):
    audit = LabelAudit(planted[0], LOSS, retrain)
    audit.start.click()
    finish(audit)
    assert says.split("|")[-1] in audit.desk.content["error"] and audit.history == []
    with pytest.raises((ZeroDivisionError, TypeError)):
        audit.retrain()
    audit.keep()
    assert audit.desk.content["error"] == ""


# what is shown
def test_neighbours_speak_for_and_against_a_label_and_are_not_itself(planted):
    task = planted[0]
    last = labels.last_layer(task)
    scores = Influence().fit(last).scores(last.train)
    audit = LabelAudit(task, LOSS, scores=scores, k=3)
    i = audit.state.order[0]
    audit.shown = i
    content, row = audit.desk.content, scores.row(i).clone()
    assert row.argmax() == i                                    # most of all an example speaks for its own label
    row[i] = 0
    for side, best in (("helpful", row.topk(3)), ("harmful", (-row).topk(3))):
        assert [card["id"] for card in content[side]] == best.indices.tolist()
        assert [abs(card["value"]) for card in content[side]] == best.values.tolist()
    assert content["titles"] == ["For this label (nats per removed example)", "Against it (nats per removed example)"]
    pixels = np.frombuffer(audit.desk.pictures, np.uint8).reshape(7, 3, 3, 1)
    ids = [i, *(card["id"] for side in ("helpful", "harmful") for card in content[side])]
    assert np.array_equal(pixels, audit.thumbnails(ids))
    audit = LabelAudit(task, LOSS)                              # no scores, no neighbours
    assert audit.desk.content["helpful"] == [] and audit.desk.content["titles"] == []
    assert len(audit.desk.pictures) == 9


def test_texts_are_shown_as_texts_and_pictured():
    x, y = torch.randn(9, 2).double(), torch.arange(9) % 2
    tag = "<img src=x onerror=alert(1)>"
    split = Split(x, y, ("$a$", "b"), [f"{tag} sentence {i}" for i in range(9)])
    audit = LabelAudit(Task(models.logistic(2, 2).double(), split, split.take([1, 2, 3]), l2=0.1), LOSS)
    assert audit.desk.content["text"] == f"{tag} sentence {audit.shown}" and audit.desk.picture_shape == []
    audit.remove()
    words = " ".join(text.get_text() for text in audit.figure().findobj(lambda artist: hasattr(artist, "get_text")))
    assert f"{tag} sentence {audit.shown}" in words and "1 of 9 labels checked: 1 removed" in words


def test_the_display_carries_a_picture_of_what_comes_next(audit):
    audit.fix((int(audit.task.train.y[audit.shown]) + 1) % 4)
    audit.retrain()
    image = Image.open(io.BytesIO(audit._repr_mimebundle_()["image/png"])).convert("RGB")
    assert image.size[0] == 1100 and (np.asarray(image)[0] == 255).all()
    words = [text.get_text() for text in audit.figure().findobj(lambda artist: hasattr(artist, "get_text"))]
    assert {f"#{i}" for i in audit.state.order[audit.state.order.index(audit.shown):][:16]} <= set(words)
    assert audit.told()[0] in words


def test_the_names_of_classes_reach_as_far_as_the_model():
    split = Split(torch.randn(8, 3).double(), torch.arange(8) % 2)
    audit = LabelAudit(Task(models.logistic(3, 3).double(), split, split, l2=0.1), LOSS)
    assert audit.desk.classes == ["0", "1", "2"]
    audit.fix(2)
    assert audit.corrected().y.max() == 2


# errors
def test_bad_input_is_refused_with_a_cure(planted):
    task, last = planted[0], labels.last_layer(planted[0])
    scores = Influence().fit(last).scores(last.train.take([0]))
    line = Split(torch.randn(8, 2), torch.randn(8))
    numbers = Task(models.mlp([2, 1]), line, line, loss=lambda o, y: (o[:, 0] - y) ** 2)
    for error, says, arguments in [
        (TypeError, "task must be a Task, got Split", (task.train, LOSS)),
        (TypeError, "needs class numbers, got targets of torch.float32", (numbers, LOSS)),
        (TypeError, r"must be a dictionary \{name: function or numbers\}, got function", (task, labels.loss)),
        (TypeError, "suspicions must be a dictionary", (task, {})),
        (TypeError, r"retrain must be callable as retrain\(split, progress\), got int", (task, LOSS, 3)),
        (ValueError, r"'few' must be finite numbers \[n_train\] = \(60,\), got \(9,\)", (task, {"few": torch.ones(9)})),
        (ValueError, r"'bad' must be finite .* with NaN", (task, {"bad": torch.full((60,), torch.nan)})),
        (TypeError, "scores must be Scores, got list", (task, LOSS, None, [1])),
        (ValueError, "scores must belong to this task, or to its last layer", (
            task, LOSS, None, replace(scores, task="another"))),
        (ValueError, "scores must be of all 60 training examples on all of them, in order", (
            task, LOSS, None, replace(scores, train_ids=scores.train_ids.flip(0)))),
        (ValueError, r"on all of them, in order, got \(40, 60\): method.scores\(task.train\)", (
            task, LOSS, None, Influence().fit(task).scores(task.train.take(range(40))))),
    ]:
        with pytest.raises(error, match=says):
            LabelAudit(*arguments)
