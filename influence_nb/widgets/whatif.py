"""Remove training examples, see what that is predicted to do to a test point, retrain, and see whether it is true."""

import threading

import ipywidgets as w
import numpy as np
from traitlets import dlink, link

from influence_nb.scores import Scores
from influence_nb.widgets import picture, whatifpicture
from influence_nb.widgets.answers import Answers
from influence_nb.widgets.controls import button
from influence_nb.widgets.examples import Examples
from influence_nb.widgets.fixedmap import FixedMap, placed
from influence_nb.widgets.pointcloud import PointCloud, packed
from influence_nb.widgets.state import DEPTH
from influence_nb.widgets.verdict import COLUMNS, Runs, Verdict, listed, said
from influence_nb.widgets.views import map_and_gallery
from influence_nb.widgets.whatifstate import Retraining, WhatIfState, counted

CARDS = 20  # a side
OLDER_SHOWN = ["#8FA3B5", "#009E73"]  # colours of retrainings
NO_NEIGHBOURS = {side: [] for side in ("helpful", "helpful_scores", "harmful", "harmful_scores")}


class WhatIf(w.VBox):
    """Pick training examples on a map and see at once what removing them is predicted to do to a test point; retrain
    without them, and see predicted against actual land on the diagonal, or not.

    The prediction is first order: the sum of the scores of what is removed.

    Args:
        task: a Task of classes.
        scores: Scores of removal effects for this task.
        retrain: callable (ids, progress) -> Tensor [n_test], how much the loss of each test point rises when the model
            is trained again without `ids` (for a task with a measure: the measure's drop). It may return a pair with a
            certificate: a dict with gradient_norm, converged, same_basin or others, or what `converge` returns. It
            runs in a thread, so it must work on a copy of the model. It should call progress(share), 0 to 1, often:
            Cancel takes effect there.
        embedding: an Atlas, or a pair of arrays (train_xy [n_train, 2], test_xy [n_test, 2]).
        test_ids: the test points shown; left out, those that the scores hold.
        k: how many examples a quick pick takes.

    Raises:
        TypeError, ValueError: retrain cannot be called, scores are no removal effects or of another task, targets are
            no classes, an embedding of another length.
    """

    def __init__(self, task, scores, retrain, embedding, test_ids=None, k=10):
        if not callable(retrain):
            raise TypeError(f"retrain must be callable as retrain(ids, progress), got {type(retrain).__name__}")
        if not isinstance(scores, Scores):
            raise TypeError(f"scores must be Scores, got {type(scores).__name__}: method.fit(task).scores()?")
        if not scores.is_effect:
            raise ValueError(f"scores must be removal effects, whose sum predicts a change, got {scores.unit!r}: "
                             "scores of Influence or another method that estimates effects?")
        self.task, self.retrainer, self.scores = task, retrain, scores
        self.answers = Answers(task, {"scores": scores})
        self.test_ids = self.answers.shown(test_ids)
        atlas = embedding if hasattr(embedding, "place") else FixedMap(embedding, task, self.test_ids)
        self.examples = Examples(task, self.test_ids)
        self.state = WhatIfState(scores, self.test_ids, len(task.test))
        unit = scores.unit.removesuffix(" per removed example")
        self.what = f"change of the loss ({unit})" if task.measure is None else f"drop of {unit}"
        self.lock = threading.RLock()
        places = placed(atlas, atlas.layers[0], atlas.projections[0], len(task.train), self.test_ids)
        self.map, self.gallery = map_and_gallery(self.answers, self.examples, self.test_ids, *places, preload=True,
                                                 collect=True)
        self.outcome = PointCloud(name="outcome", source=self.map.source + " outcome", palette=OLDER_SHOWN,
                                  title="Actual against predicted", diagonal=True, legend=True,
                                  kinds=["test point", "retraining"], train_names=packed(self.test_ids, "i4"),
                                  x_label=f"predicted {self.what}", y_label=f"actual {self.what}")
        self.verdict, self.runs = Verdict(), Runs(columns=COLUMNS)
        self._controls(k)
        super().__init__([self.toolbar, beside(self.map, self.outcome),
                          beside(w.VBox([self.verdict, self.action]), self.runs), self.gallery])
        self.add_class("inb-explorer")
        self._bind()
        self.state.test_id = self.test_ids[int(self.examples.groups("correct")["test"].argmax())]  # the first mistake
        self.state.forget()

    @classmethod
    def from_explorer(cls, explorer, retrain, **how) -> "WhatIf":
        """A what-if on the map of an explorer, by the method shown there; the two share test point and selection."""
        scores = explorer.answers.complete(explorer.state.method, explorer.test_ids)
        places = (np.frombuffer(xy, "<f4").reshape(-1, 2) for xy in (explorer.map.train_xy, explorer.map.test_xy))
        whatif = cls(explorer.task, scores, retrain, tuple(places), explorer.test_ids, **how)
        link((explorer.state, "test_id"), (whatif.state, "test_id"))
        link((explorer.state, "selected"), (whatif.state, "removed"))
        whatif.state.forget()
        return whatif

    # what a reader asks of it
    @property
    def test_id(self):
        """The test point shown; set it to show another one."""
        return self.state.test_id

    @test_id.setter
    def test_id(self, test_id):
        self.state.test_id = None if test_id is None else int(test_id)

    @property
    def removed(self) -> list[int]:
        """Ids of the training examples picked; set it to pick others."""
        return list(self.state.removed)

    @removed.setter
    def removed(self, ids):
        self.state.removed = [int(i) for i in ids]

    @property
    def predicted(self) -> float | None:
        """The predicted change for the test point shown; positive: its loss would rise. None: nothing is picked."""
        return self.state.predicted

    @property
    def actual(self) -> float | None:
        """The change that a retraining without these examples found; None where there was none."""
        return self.state.actual

    @property
    def history(self) -> list[Retraining]:
        """All retrainings so far."""
        return list(self.state.history)

    def retrain(self) -> Retraining:
        """Retrain without the examples picked, as the button does, and wait for it."""
        return self.state.run(self.retrainer)

    def figure(self):
        """The present state as a matplotlib Figure."""
        return whatifpicture.figure(self)

    def _repr_mimebundle_(self, **kwargs):
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is not None:
            bundle["image/png"] = picture.png(self)
        return bundle

    # controls
    def _controls(self, k):
        state, n = self.state, len(self.task.train)
        self.point = w.Text(description="Test point", continuous_update=False, layout={"width": "72px"})
        self.k = w.BoundedIntText(min(k, n - 1), min=1, max=n - 1, description="How many", layout={"width": "72px"})

        def quick(label, tip, pick, width="112px"):
            return button(label, tip, lambda: state.test_id is None or pick(self.k.value), width)

        self.lasso = w.ToggleButton(description="Lasso", layout={"width": "64px"}, tooltip="Drag round training points "
                                    "to pick them too, with Alt to let go of them; or hold Shift and drag")
        self.every = w.Checkbox(description="all test points", value=True, indent=False, layout={"width": "130px"},
                                tooltip="Show every test point in the plot of predicted against actual")
        self.undo = button("Undo", "Take back the last step", state.undo)
        self.redo = button("Redo", "Do again what was taken back", state.redo)
        self.toolbar = w.HBox([
            self.point, self.k,
            quick("Most helpful", "Pick the most helpful examples for this test point", state.pick_helpful),
            quick("Most harmful", "Pick the most harmful examples for this test point", state.pick_harmful),
            quick("Random", "A control: what does removing random examples do?", state.pick_random, "80px"),
            self.lasso, self.undo, self.redo,
            button("Clear", "Pick nothing", lambda: setattr(state, "removed", [])), self.every])
        self.toolbar.add_class("inb-toolbar")
        self.start = button("Retrain", "", lambda: state.reason() or state.start(self.retrainer), "110px")
        self.start.button_style = "primary"
        self.cancel = button("Cancel", "Give up this retraining", state.cancel, "80px")
        self.bar = w.FloatProgress(min=0, max=1, tooltip="Share of the retraining done")
        self.status = w.Label()
        self.action = w.HBox([self.start, self.cancel, self.bar, self.status])
        self.action.add_class("inb-action")

    # state -> views -> state
    def _bind(self):
        state = self.state
        w.jslink((self.map, "selected"), (self.gallery, "selected"))
        w.jsdlink((self.lasso, "value"), (self.map, "lasso"))
        link((state, "test_id"), (self.map, "test_id"))
        dlink((state, "undoable"), (self.undo, "disabled"), lambda possible: not possible)
        dlink((state, "redoable"), (self.redo, "disabled"), lambda possible: not possible)
        dlink((state, "progress"), (self.bar, "value"))
        dlink((state, "running"), (self.outcome, "busy"))
        for view in (self.map, self.gallery):
            view.on_msg(lambda view, message, buffers: self.examples.send(view, message))
        self.runs.on_msg(lambda _, message, buffers: self._recalled(message.get("recall")))
        self.map.title, self.map.note = "Training examples", "click, or Shift and drag, to pick"
        self.map.class_names = self.examples.classes
        for layer in ("train", "test"):
            setattr(self.map, f"{layer}_class", packed(self.examples.label[layer], "u2"))
        on = lambda owner, names, act: owner.observe(self._locked(act), names)  # noqa: E731
        on(state, ["test_id"], self._answer)
        on(self.k, ["value"], self._answer)
        on(state, ["test_id", "removed"], self._picked)
        on(state, ["test_id", "predicted", "shown", "history"], self._landed)
        on(self.every, ["value"], self._landed)
        on(state, ["test_id", "removed", "predicted", "actual", "shown", "running", "status", "error"], self._judged)
        on(state, ["removed", "running", "status"], self._ready)
        on(self.map, ["selected"], lambda: setattr(self, "removed", np.frombuffer(self.map.selected, "<i4")))
        on(self.outcome, ["test_id"], lambda: self._recalled(self.outcome.test_id))
        on(self.outcome, ["selected"], self._asked_for)
        on(self.point, ["value"], self._typed)
        for act in (self._landed, self._judged, self._ready):
            act()

    def _locked(self, act):
        def handler(_):
            with self.lock:
                act()
        return handler

    def _answer(self):
        """The strongest examples of the test point, as triangles on the map."""
        state, depth = self.state, min(self.k.value, DEPTH)
        answer = {} if state.test_id is None else self.answers.top("scores", state.test_id, depth)
        state.helpful, state.harmful = answer.get("helpful", []), answer.get("harmful", [])
        with self.map.hold_sync():
            self.map.k, self.map.answer = depth, answer
        self.point.value = "" if state.test_id is None else str(state.test_id)

    def _picked(self):
        """The examples removed, on the map and as cards, by the sign of their scores."""
        state, picked = self.state, np.array(self.state.removed, dtype=np.int64)
        self.map.selected = packed(picked, "i4")
        answer, titles = {} if state.test_id is None else {"test_id": state.test_id}, []
        if state.test_id is not None and len(picked):
            row = self.answers.row("scores", state.test_id)[picked] + 0.0  # no -0
            answer |= {"method": 0}
            names = self.answers.sides(self.scores.unit)[1]
            for side, of, title in zip(("helpful", "harmful"), (row >= 0, row < 0), names, strict=True):
                order = np.flatnonzero(of)[np.argsort(-np.abs(row[of]), kind="stable")]
                answer |= {side: picked[order[:CARDS]].tolist(), f"{side}_scores": row[order[:CARDS]].tolist()}
                more = f"; the strongest {CARDS} shown" if len(order) > CARDS else ""
                titles.append(f"{len(order)} picked, {title[0].lower()}{title[1:]}{more}")
        with self.gallery.hold_sync():
            self.gallery.side_titles, self.gallery.answer = [titles], answer
            self.gallery.headline = "Nothing picked yet" if not len(picked) else (
                f"{counted(len(picked), 'training example')} picked: click a card to let go of it")

    def _landed(self):
        """Every retraining so far, predicted against actual."""
        state, view, n = self.state, self.outcome, len(self.test_ids)
        points = np.array([np.stack([run.predicted, run.actual], 1) for run in state.history]).reshape(-1, n, 2)
        numbers = np.arange(1, len(points) + 1)
        row, every = state.row.get(state.test_id), self.every.value
        with view.hold_sync():
            view.train_xy = packed(points, "f4") if every else b""
            view.train_class = packed(np.repeat(numbers == state.shown, n), "u2") if every else b""
            view.test_xy = b"" if row is None else packed(points[:, row], "f4")
            view.test_ids, view.test_class = packed(numbers, "i4"), packed(numbers == state.shown, "u2")
            view.test_id, view.owner = state.shown, f"{state.shown}/0"
            view.answer = {"test_id": state.shown, "method": 0, "k": view.k, **NO_NEIGHBOURS} if state.shown else {}
            view.guess = None if state.shown else state.predicted
            view.class_names = [  # a legend without what is not there
                f"all {n} test points" if every else "", "" if row is None else f"test point {state.test_id}",
                "these picks" if state.shown else "", "other picks" if len(points) > bool(state.shown) else ""]
            fit = state.agreement(every)
            view.note = f"r {fit[1]:.4f}, slope {fit[2]:.3f}" if fit else ""
        self.runs.rows, self.runs.shown = listed(state), state.shown

    def _judged(self):
        self.verdict.content = said(self.state, self.examples, self.what, self.task.measure is None)

    def _ready(self):
        state, reason = self.state, self.state.reason()
        self.start.disabled = bool(reason)
        self.start.tooltip = reason or "Train again without the examples picked"
        self.cancel.layout.display = self.bar.layout.display = None if state.running else "none"
        self.status.value = state.status or reason

    def _recalled(self, number):
        if isinstance(number, int) and 0 < number <= len(self.state.history):
            self.state.recall(number)
        elif number != self.state.shown:
            self._landed()  # there is no such retraining: back to the one shown

    def _asked_for(self):
        """A click on one of the faint points: that retraining, and that test point."""
        chosen, self.outcome.selected = np.frombuffer(self.outcome.selected, "<i4"), b""
        if len(chosen) == 1:
            run, row = divmod(int(chosen[0]), len(self.test_ids))
            self.state.recall(run + 1, self.test_ids[row])

    def _typed(self):
        typed, state = self.point.value.strip().removeprefix("#"), self.state
        if typed.isdecimal() and int(typed) in state.row:
            state.test_id = int(typed)
        elif typed != str(state.test_id):
            state.status = f"test point {typed} is not among the {len(state.row)} shown" if typed else ""
            self.point.value = "" if state.test_id is None else str(state.test_id)


def beside(*views) -> w.HBox:
    """Views in a row, or below each other where the page is narrow."""
    row = w.HBox(views)
    row.add_class("inb-plots")
    return row
