"""The what-if without a browser: its predictions are sums of scores, its retraining the truth, its state its own."""

import io
import threading
from dataclasses import replace

import explorers
import numpy as np
import pytest
import torch
from explorers import N_TRAIN, SHOWN, Maps, made, places
from PIL import Image
from problems import digits_task
from torch.nn import functional as F

from influence_nb import GradDot, Influence, Scores, Split, Task, converge, leave_group_out
from influence_nb.widgets import WhatIf
from influence_nb.widgets.verdict import certified, share, signed
from influence_nb.widgets.whatifstate import Cancelled, WhatIfState, agreement


@pytest.fixture(scope="module")
def task():
    return explorers.task()


def nine_tenths(scores):
    """A retrainer that finds nine tenths of what is predicted, and for every test point of the task another number."""
    def retrain(ids, progress):
        effects = torch.full((20,), 7.0).double()
        effects[scores.test_ids] = 0.9 * scores.values[:, ids].double().sum(1)
        return effects, {"gradient_norm": 3e-11, "converged": True}
    return retrain


@pytest.fixture
def whatif(task):
    scores = made(task)
    whatif = WhatIf(task, scores, nine_tenths(scores), places(task), k=4)
    whatif.test_id = 5
    whatif.state.forget()
    return whatif


class Gate:
    """A retrainer that waits at every tenth until it is let go."""

    def __init__(self, effects):
        self.effects, self.go, self.begun, self.ended = effects, threading.Event(), threading.Event(), None

    def __call__(self, ids, progress):
        try:
            for step in range(10):
                progress(step / 10)
                self.begun.set()
                assert self.go.wait(10)
        except Cancelled:
            self.ended = "cancelled"
            raise
        self.ended = "done"
        return self.effects


# numbers
def test_the_prediction_is_the_sum_of_scores_and_retraining_is_the_truth():
    task = digits_task(n=60, n_test=14)
    base = converge(task)
    scores = Influence(damping=0.0).fit(task).scores()

    def retrain(ids, progress):
        there, w = task.to(torch.float64), torch.ones(60).double()
        w[ids] = 0
        end = converge(there, w, base=base.eigen, watch=lambda point: progress(point.steps / 20))
        return there.losses() - task.losses(), end

    xy = (task.train.x.flatten(1)[:, :2], task.test.x.flatten(1)[:, :2])
    whatif = WhatIf(task, scores, retrain, xy, test_ids=[9, 2, 13])
    ids, whatif.test_id = [5, 33, 48], 13
    whatif.removed = ids
    assert whatif.predicted == pytest.approx(float(scores.row(13)[ids].sum()), rel=1e-12) and whatif.actual is None
    run = whatif.retrain()
    truth = leave_group_out(task, [ids], progress=False)[:, 0]
    assert np.allclose(run.actual, truth[[9, 2, 13]], atol=1e-9, rtol=0)
    assert whatif.actual == pytest.approx(float(truth[13]), abs=1e-9)
    # first order: three of sixty examples change the weights by a few percent. A product of gradients is far off
    assert whatif.predicted == pytest.approx(whatif.actual, rel=0.25)
    products = GradDot().fit(task).scores().row(13)[ids].sum()
    assert float(products) != pytest.approx(whatif.actual, rel=0.25)
    assert run.certificate["gradient_norm"] <= 1e-10 and "eigen" not in run.certificate
    assert "|gradient|" in whatif.verdict.content["certificate"]
    whatif.retrainer = lambda ids, progress: leave_group_out(task, [ids], progress=False)  # [n_test, 1]
    assert np.allclose(whatif.retrain().actual, run.actual, atol=1e-9) and len(whatif.history) == 2


def test_every_retraining_lands_in_the_plot(whatif):
    scores = whatif.scores
    for ids in ([3, 8], [1, 2, 40, 41], [77]):
        whatif.removed = ids
        whatif.retrain()
    every = np.frombuffer(whatif.outcome.train_xy, "<f4").reshape(3, len(SHOWN), 2)
    expected = np.stack([scores.values[:, ids].sum(1) for ids in ([3, 8], [1, 2, 40, 41], [77])])
    assert np.allclose(every[..., 0], expected) and np.allclose(every[..., 1], 0.9 * expected)
    own = np.frombuffer(whatif.outcome.test_xy, "<f4").reshape(3, 2)
    assert np.array_equal(own, every[:, SHOWN.index(5)])
    assert np.frombuffer(whatif.outcome.test_ids, "<i4").tolist() == [1, 2, 3] and whatif.outcome.test_id == 3
    assert whatif.outcome.note == "r 1.0000, slope 0.900"
    assert [row["cells"][0] for row in whatif.runs.rows] == ["2", "4", "1"]
    assert whatif.runs.rows[1]["cells"][1:5] == [signed(own[1, 0]), signed(own[1, 1]), "1.0000", "0.90"]
    whatif.every.value = False
    assert whatif.outcome.train_xy == b"" and whatif.outcome.note == "r 1.0000, slope 0.900"
    whatif.test_id = 7
    assert np.array_equal(np.frombuffer(whatif.outcome.test_xy, "<f4").reshape(3, 2), every[:, SHOWN.index(7)])


def test_agreement_needs_pairs_that_vary():
    assert agreement([1.0, 2.0], [1.0, 3.0]) is None and agreement([1.0, 2, 3], [4.0, 4, 4]) is None
    pairs, r, slope = agreement([1.0, 2, 3, 4], [1.0, 3, 2, 4])
    assert (pairs, round(r, 12), round(slope, 12)) == (4, 0.8, 0.8)


# picks
def test_quick_picks_are_the_scores_own_top(whatif):
    top = whatif.scores.top(5, 4)
    buttons = {child.description: child for child in whatif.toolbar.children}
    buttons["Most helpful"].click()
    assert whatif.removed == top.helpful and whatif.predicted == pytest.approx(sum(top.helpful_scores))
    assert whatif.gallery.answer["helpful"] == top.helpful and whatif.gallery.answer["harmful"] == []
    buttons["Most harmful"].click()
    assert whatif.removed == top.harmful and whatif.gallery.answer["harmful_scores"] == top.harmful_scores
    buttons["Random"].click()
    first = whatif.removed
    buttons["Random"].click()
    assert len(set(first)) == len(set(whatif.removed)) == 4 and whatif.removed != first
    buttons["Clear"].click()
    assert whatif.removed == [] and whatif.predicted is None
    buttons["Undo"].click()
    buttons["Undo"].click()
    assert whatif.removed == first
    buttons["Redo"].click()
    assert len(whatif.removed) == 4 and whatif.removed != first


def test_a_pick_of_the_browser_reaches_python_and_the_cards(whatif):
    whatif.map.set_state({"selected": memoryview(np.array([4, 80, 17], "<i4").tobytes())})
    row = whatif.scores.row(5)
    assert whatif.removed == [4, 80, 17] and whatif.predicted == pytest.approx(float(row[[4, 80, 17]].sum()))
    answer = whatif.gallery.answer
    cards = dict(zip(answer["helpful"] + answer["harmful"], answer["helpful_scores"] + answer["harmful_scores"]))
    assert cards == {i: float(row[i]) for i in (4, 80, 17)}
    assert all(score >= 0 for score in answer["helpful_scores"]) and all(s < 0 for s in answer["harmful_scores"])
    whatif.removed = list(range(60))
    answer = whatif.gallery.answer
    assert len(answer["helpful"]) == 20 and "the strongest 20 shown" in whatif.gallery.side_titles[0][0]
    assert answer["helpful_scores"] == sorted(answer["helpful_scores"], reverse=True)


def test_a_retraining_is_recalled_from_the_table_the_diamond_or_a_faint_point(whatif):
    for ids in ([3, 8], [1, 2, 40]):
        whatif.removed = ids
        whatif.retrain()
    whatif.removed = [9]
    assert whatif.state.shown is None and whatif.outcome.guess == whatif.predicted
    whatif.runs._handle_custom_msg({"recall": 1}, [])
    assert (whatif.removed, whatif.state.shown, whatif.outcome.guess) == ([3, 8], 1, None)
    assert whatif.actual == pytest.approx(0.9 * whatif.predicted)
    whatif.outcome.set_state({"test_id": 2})  # a click on a diamond
    assert (whatif.removed, whatif.state.shown, whatif.runs.shown) == ([1, 2, 40], 2, 2)
    place = 0 * len(SHOWN) + SHOWN.index(11)
    whatif.outcome.set_state({"selected": memoryview(np.array([place], "<i4").tobytes())})
    assert (whatif.removed, whatif.test_id, whatif.outcome.selected) == ([3, 8], 11, b"")
    whatif.state.undo()
    assert (whatif.removed, whatif.test_id) == ([1, 2, 40], 5)  # both in one step
    for nonsense in ({"recall": 9}, {"recall": "x"}, {}):
        whatif.runs._handle_custom_msg(nonsense, [])
    whatif.outcome.set_state({"test_id": None})
    assert whatif.state.shown == whatif.outcome.test_id == 2


def test_of_two_retrainings_of_one_pick_the_one_asked_for_stays(whatif):
    for _ in range(2):
        whatif.removed = [3, 8]
        whatif.retrain()
    assert whatif.state.shown == 2
    whatif.state.recall(1)
    whatif.test_id = 7
    assert whatif.state.shown == 1
    whatif.removed = [8]
    whatif.removed = [8, 3]
    assert whatif.state.shown == 2


def test_the_test_point_is_typed(whatif):
    whatif.point.value = "#11"
    assert whatif.test_id == 11 and whatif.point.value == "11"
    whatif.point.value = "6"
    assert whatif.test_id == 11 and whatif.point.value == "11"
    assert whatif.status.value == "test point 6 is not among the 6 shown"


# the thread
def test_retraining_runs_beside_the_clicks(task, whatif):
    gate = whatif.retrainer = Gate(torch.zeros(20))
    whatif.removed = [4, 5]
    whatif.start.click()
    assert gate.begun.wait(10) and whatif.state.running and whatif.start.disabled and whatif.outcome.busy
    assert whatif.verdict.content["rows"][2]["texts"][0] == "retraining \u2026"
    whatif.removed = [6]  # while it runs
    assert whatif.predicted == float(whatif.scores.row(5)[6]) and whatif.history == []
    assert whatif.verdict.content["rows"][2]["texts"][0] == "not yet retrained"
    with pytest.raises(ValueError, match="a retraining is running"):
        whatif.retrain()
    gate.go.set()
    until(lambda: not whatif.state.running)
    (run,) = whatif.history
    assert run.ids == (4, 5) and whatif.state.shown is None and whatif.state.status.startswith("retraining 1 done in")
    whatif.removed = [5, 4]
    assert whatif.actual == 0.0 and not whatif.start.disabled


def until(condition):
    for _ in range(500):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("not within 5 s")


def test_progress_is_seen_and_cancel_works(whatif):
    seen = []
    whatif.bar.observe(lambda change: seen.append(change.new), "value")
    gate = Gate(torch.zeros(20))
    whatif.removed = [4, 5]
    thread = whatif.state.start(gate)
    assert gate.begun.wait(10)
    whatif.cancel.click()
    assert whatif.state.running and whatif.status.value == "cancelling at the next step of the retraining"
    gate.go.set()
    thread.join(10)
    assert gate.ended == "cancelled" and not whatif.state.running and whatif.history == []
    assert whatif.status.value.startswith("cancelled after") and whatif.verdict.content["doubts"] == []
    slow = iter(range(1, 4))

    def retrain(ids, progress):
        for step in slow:
            threading.Event().wait(0.06)
            progress(step / 4)
        return torch.zeros(20)

    whatif.state.run(retrain)
    assert seen[-4:] == [0.25, 0.5, 0.75, 0.0] and len(whatif.history) == 1


def test_a_retrainer_that_never_reports_is_dropped_when_it_ends(whatif):
    go = threading.Event()
    whatif.removed = [4]
    thread = whatif.state.start(lambda ids, progress: go.wait(10) and torch.zeros(20))
    whatif.cancel.click()
    go.set()
    thread.join(10)
    assert whatif.history == [] and whatif.status.value.startswith("cancelled after")


@pytest.mark.parametrize("retrain, says", [
    (lambda ids, progress: 1 / 0, "ZeroDivisionError: division by zero"),
    (lambda ids, progress: torch.zeros(7), r"\[n_test\] = \(20,\), or \(6,\) for those shown, got \(7,\)"),
    (lambda ids, progress: torch.full((20,), float("nan")), "must return finite changes, got nan"),
    (lambda ids, progress: (torch.zeros(20), {}, 3), "too many values to unpack"),
])
def test_what_goes_wrong_is_said_in_the_widget(whatif, retrain, says):
    whatif.removed = [4]
    whatif.state.start(retrain).join(10)
    (doubt,) = whatif.verdict.content["doubts"]
    with pytest.raises(Exception, match=says):
        raise RuntimeError(doubt)
    assert not whatif.state.running and whatif.history == [] and not whatif.start.disabled
    whatif.removed = [4, 5]
    assert whatif.verdict.content["doubts"] == []
    with pytest.raises(Exception, match=says.removeprefix("ZeroDivisionError: ")):
        whatif.state.run(retrain)  # in a cell it is raised


def test_without_picks_the_button_says_why_it_is_disabled(whatif):
    assert whatif.start.disabled and whatif.start.tooltip == whatif.status.value == (
        "nothing is picked: pick at least one training example")
    whatif.removed = range(N_TRAIN)
    assert whatif.start.disabled and "leave something to train on" in whatif.start.tooltip
    whatif.removed = [3]
    assert not whatif.start.disabled
    with pytest.raises(ValueError, match="nothing is picked"):
        WhatIfState(whatif.scores, SHOWN, 20).run(whatif.retrainer)


# words
def test_the_verdict_says_the_numbers(whatif):
    whatif.removed = [4, 80]
    whatif.retrain()
    content, row = whatif.verdict.content, whatif.examples.row[5]
    loss, change = float(whatif.examples.loss[row]), float(whatif.scores.row(5)[[4, 80]].sum())
    assert (content["predicted"], content["actual"]) == (whatif.predicted, whatif.actual)
    now, predicted, actual = content["rows"]
    assert now["texts"] == ["", f"{loss:.3g}".ljust(4, "0"), share(loss)]
    assert predicted["texts"] == [signed(change), signed(loss + change).removeprefix("+"), share(loss + change)]
    assert actual["texts"][0] == signed(0.9 * change) and actual["change"] == pytest.approx(0.9 * change)
    assert content["line"].startswith("First order: the sum of 2 scores")
    assert content["certificate"] == "Retrained: |gradient| 3e\u221211, converged." and content["doubts"] == []


def test_a_certificate_that_fails_is_flagged(whatif):
    effects = torch.zeros(20)
    whatif.removed = [4]
    whatif.state.run(lambda ids, progress: (effects, {"gradient_norm": 0.3, "converged": False, "same_basin": False}))
    assert [doubt.split(":")[0] for doubt in whatif.verdict.content["doubts"]] == [
        "the retraining did not converge", "the retraining ended in another basin"]
    assert "did not converge" in whatif.runs.rows[0]["doubt"]
    assert certified({"smallest_eigenvalue": -0.1})[1] == ["it ended at a saddle, not at a minimum"]
    assert certified({}) == ("", []) and certified({"smallest eigenvalue": 0.1, "passes": 7}) == (
        "Retrained: smallest eigenvalue 0.1, passes 7.", [])


def test_numbers_in_words():
    assert [signed(x) for x in (0.25449, -0.3, 12.0, -1e-5, 0.0, 1234.0, 123.4)] == [
        "+0.254", "\u22120.300", "+12.0", "\u22121.00e\u221205", "0", "+1.23e+03", "+123"]
    assert (share(0.0), share(-0.1)) == ("100 %", "\u2014")


def test_a_measure_has_a_drop_and_no_loss(task):
    other = replace(task, measure=lambda outputs, y: outputs.gather(1, y[:, None])[:, 0])
    scores = made(other, "logit per removed example")
    whatif = WhatIf(other, scores, nine_tenths(scores), places(other))
    whatif.removed = [3]
    assert whatif.outcome.x_label == "predicted drop of logit"
    assert whatif.verdict.content["columns"] == ["drop of logit"]
    assert [len(row["texts"]) for row in whatif.verdict.content["rows"]] == [1, 1, 1]


# with an explorer, with an atlas, as a picture
def test_it_takes_the_explorers_map_method_and_selection(task):
    explorer = explorers.explorer(task)
    explorer.selected, explorer.test_id = [4, 80], 7
    scores = made(task)
    whatif = WhatIf.from_explorer(explorer, nine_tenths(scores))
    assert (whatif.removed, whatif.test_id) == ([4, 80], 7) and not whatif.state.undoable
    assert whatif.map.train_xy == explorer.map.train_xy and whatif.map.test_xy == explorer.map.test_xy
    explorer.selected, whatif.test_id = [5], 11
    assert whatif.removed == [5] and explorer.test_id == 11
    whatif.removed = [1, 2]
    assert explorer.selected == [1, 2]
    explorer.state.undo()
    assert whatif.removed == [5]
    explorer.state.method = "likeness"
    with pytest.raises(ValueError, match="must be removal effects, whose sum predicts a change, got 'cosine, ranked"):
        WhatIf.from_explorer(explorer, nine_tenths(scores))


def test_the_first_map_of_an_atlas_is_shown(task):
    whatif = WhatIf(task, made(task), print, Maps(task), test_ids=[5, 11])
    assert np.array_equal(np.frombuffer(whatif.map.train_xy, "<f4").reshape(-1, 2), places(task)[0])


def test_the_display_carries_a_picture_with_the_numbers(whatif):
    whatif.removed = [4, 80, 17]
    whatif.retrain()
    image = Image.open(io.BytesIO(whatif._repr_mimebundle_()["image/png"])).convert("RGB")
    assert image.size[0] == 1100 and (np.asarray(image)[0] == 255).all()
    words = [text.get_text() for text in whatif.figure().findobj(lambda artist: hasattr(artist, "get_text"))]
    assert {signed(whatif.predicted), signed(whatif.actual), whatif.outcome.x_label} <= set(words)
    whatif.test_id = None
    assert whatif.figure() and whatif.predicted is None


def test_texts_are_pictured_as_texts():
    x, y = torch.randn(9, 2), torch.arange(9) % 2
    split = Split(x, y, ("a", "b"), [f"sentence {i}" for i in range(9)])
    task = Task(torch.nn.Linear(2, 2), split, split.take([1, 2, 3]))
    scores = Scores(torch.randn(3, 9), "M()", task.fingerprint(), torch.arange(3), torch.arange(9))
    whatif = WhatIf(task, scores, print, (x, x[1:4]))
    whatif.removed = [4, 7]
    words = [text.get_text() for text in whatif.figure().findobj(lambda artist: hasattr(artist, "get_text"))]
    assert {"sentence 4", "sentence 7"} <= set(words)


# errors
def test_bad_input_is_refused_with_a_cure(task, whatif):
    good, xy = made(task), places(task)
    with pytest.raises(TypeError, match=r"retrain must be callable as retrain\(ids, progress\), got int"):
        WhatIf(task, good, 3, xy)
    with pytest.raises(TypeError, match="scores must be Scores, got dict"):
        WhatIf(task, {"a": good}, print, xy)
    with pytest.raises(ValueError, match="must be removal effects"):
        WhatIf(task, made(task, "cosine"), print, xy)
    with pytest.raises(ValueError, match="must belong to task"):
        WhatIf(replace(task, l2=0.3), good, print, xy)
    with pytest.raises(ValueError, match=r"removed must hold training ids in 0..89, got 90"):
        whatif.removed = [90]
    with pytest.raises(ValueError, match="test_id must be one of the 6 test points shown"):
        whatif.test_id = 6
    line = Split(torch.randn(8, 2), torch.randn(8))
    model = Task(torch.nn.Linear(2, 1), line, line, loss=lambda o, y: F.mse_loss(o[:, 0], y, reduction="none"))
    with pytest.raises(TypeError, match="needs class numbers"):
        WhatIf(model, good, print, xy)
