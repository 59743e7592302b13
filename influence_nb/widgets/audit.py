"""Check labels in the order of suspicion: keep, fix or remove by a key; train again, and see if it was worth it."""

from dataclasses import dataclass, replace

import ipywidgets as w
import numpy as np
import torch
from traitlets import dlink

from influence_nb.fingerprint import digest
from influence_nb.labels import last_layer
from influence_nb.scores import Scores
from influence_nb.task import Split, Task
from influence_nb.widgets import auditpicture
from influence_nb.widgets.auditdesk import Desk, laid
from influence_nb.widgets.auditstate import AuditState
from influence_nb.widgets.controls import button
from influence_nb.widgets.pictures import picture_shape, pixel_range, texts, thumbnails
from influence_nb.widgets.whatifstate import counted


@dataclass(frozen=True)
class Retrained:
    """What a retraining on the corrected labels did to the test examples.

    Attributes:
        fixed, removed: how many labels were changed, and how many examples left out.
        before, after: test accuracy of a model trained on the labels as given, and on the corrected ones.
        right, wrong: how many test examples turned right, and wrong.
    """

    fixed: int
    removed: int
    before: float
    after: float
    right: int
    wrong: int

    def __str__(self):
        changes = [f"{counted(self.fixed, 'label')} fixed", f"{counted(self.removed, 'example')} removed"]
        said = ", ".join(words for words, count in zip(changes, (self.fixed, self.removed)) if count) or "no change"
        return (f"{said}: test accuracy {100 * self.before:.1f} % \u2192 {100 * self.after:.1f} % "
                f"({self.right} turned right, {self.wrong} wrong)")


class LabelAudit(w.VBox):
    """Training examples with their labels, the most suspicious first, to be kept (k), fixed to another class (its
    number), or removed (r), with u to undo and arrows to move. A retraining shows what it did to the test accuracy, and
    ranks the labels that are left by the new model.

    Args:
        task: a Task of classes.
        suspicions: {name: function, task -> [n_train], or numbers [n_train]}; the larger, the earlier. See `labels`.
        retrain: callable (split, progress) -> a Task trained on the corrected split, in a thread; it should call
            progress(share), 0 to 1, often. None: the last layer, fitted again on the features that the model has now;
            it is then the last layer, too, that suspicions are asked of.
        scores: Scores of training examples as test points, such as `method.scores(task.train)`, whose strongest are
            shown beside each; None for none.
        path: a file that keeps the decisions, each as it is made. Where it is there already, they are taken over.
        k: neighbours a side.

    Raises:
        TypeError, ValueError: targets are no classes; suspicions, scores or retrain are not what they should be; the
            file is damaged, or of another split.
    """

    def __init__(self, task, suspicions, retrain=None, scores=None, path=None, k=6):
        check(task, suspicions, retrain)
        self.task, self.suspicions, self.retrainer, self.k = task, suspicions, retrain, k
        self.base = last_layer(task) if retrain is None else None  # trained on the labels as given, as later models are
        start, given, names = self.base or task, task.train, task.train.classes
        self.scores = scores if scores is None else checked_scores(scores, task, start)
        n_classes = max(start.outputs(start.train.take([0])).shape[1], len(names))
        self.classes = [names[c] if c < len(names) else str(c) for c in range(n_classes)]
        self.state = AuditState(given.y.cpu().numpy(), n_classes, digest(given.x, given.y, *names), path)
        self.history, self.predicted, self.limits = [], np.zeros(len(given), int), pixel_range(given.x)
        self.desk = Desk(classes=self.classes, picture_shape=picture_shape(given.x))
        self._seen(start, np.arange(len(given)))
        self._controls()
        super().__init__([self.toolbar, self.desk, self.action])
        self.add_class("inb-explorer")
        self._rank()
        self._bind()

    # what a reader asks of it
    @property
    def decisions(self) -> list[dict]:
        """One dict an example decided on, in order: id, decision ("keep", "fix", "remove"), and its label after it."""
        return [{name: event[name] for name in ("id", "decision", "label")} for event in self.state.final().values()]

    def corrected(self) -> Split:
        """The training split with labels fixed and examples removed; its `ids` are the rows of the split as given."""
        given, gone = self.task.train, [d["id"] for d in self.decisions if d["decision"] == "remove"]
        y = given.y.clone()
        for d in self.decisions:
            if d["decision"] == "fix":
                y[d["id"]] = d["label"]
        left = torch.ones(len(given), dtype=torch.bool)
        left[gone] = False
        return replace(given, y=y).take(left)

    @property
    def shown(self) -> int:
        """The training example on the desk; set it to show another one."""
        return self.state.shown

    @shown.setter
    def shown(self, i):
        self.state.move(self.state.order.index(int(i)) - self.state.order.index(self.state.shown))

    @property
    def seconds(self) -> float:
        """Time spent, from the first decision to the last, a pause counted as a minute at most."""
        return self.state.spent()

    def keep(self) -> None:
        """Keep the label of the example shown, as the key k does."""
        self.state.decide(self.shown, "keep")

    def fix(self, label) -> None:
        """Fix the label of the example shown to a class number, as its key does."""
        self.state.decide(self.shown, "fix", label)

    def remove(self) -> None:
        """Remove the example shown, as the key r does."""
        self.state.decide(self.shown, "remove")

    def undo(self) -> None:
        """Take back the last decision, as the key u does."""
        self.state.undo()

    def retrain(self) -> Retrained:
        """Retrain on the corrected labels, as the button does, and wait for it."""
        return self.state.run(self._again, "retraining")

    def figure(self):
        """The present state as a matplotlib Figure: the example shown, and the next ones."""
        return auditpicture.figure(self)

    def _repr_mimebundle_(self, **kwargs):
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is not None:
            bundle["image/png"] = auditpicture.png(self)
        return bundle

    # the model that is suspicious
    def _seen(self, model, rows):
        """Predictions and suspicions are from now on those of `model`, which was trained on these rows."""
        self.predicted[rows] = model.predict(model.train).cpu().numpy()
        self.model, self.rows, self.known = model, rows, {}

    def _asked(self, name, model, rows) -> np.ndarray:
        """A suspicion [n_train] of a model that was trained on these rows; all other examples come last."""
        given, values = self.suspicions[name], np.full(len(self.task.train), -np.inf)
        rows = rows if callable(given) else slice(None)
        values[rows] = numbers(name, given(model) if callable(given) else given, len(values[rows]))
        return values

    def _rank(self):
        """Rank by the suspicion chosen, of the present model."""
        name = self.score.value
        if name not in self.known:
            self.known[name] = self._asked(name, self.model, self.rows)
        self.by, self.suspicion = name, self.known[name]
        self.state.rank(self.suspicion)

    def _train(self, split, progress):
        trained = last_layer(replace(self.task, train=split)) if self.retrainer is None else self.retrainer(
            split, progress)
        if not isinstance(trained, Task) or len(trained.train) != len(split):
            raise TypeError(f"retrain must return a Task trained on the {len(split)} examples of the split given, got "
                            f"{trained!r:.80}")
        return trained

    def _again(self, progress) -> Retrained:
        """Train on the labels as given (once) and on the corrected ones, then ask the new model for its suspicions."""
        split, decided = self.corrected(), self.decisions
        parts = 1 if self.base is not None else 2
        if self.base is None:
            self.base = self._train(self.task.train, lambda share: progress(share / 2))
        trained = self._train(split, lambda share: progress((parts - 1 + share) / parts))
        progress(1.0)
        right = [model.predict() == model.test.y for model in (self.base, trained)]
        counts = [sum(d["decision"] == name for d in decided) for name in ("fix", "remove")]
        found = Retrained(*counts, *(float(r.double().mean()) for r in right), int((right[1] & ~right[0]).sum()),
                          int((right[0] & ~right[1]).sum()))
        name, rows = self.score.value, split.ids.numpy()
        suspicion = self._asked(name, trained, rows)  # before anything changes: it may take long, or fail
        with self.state.lock:
            self._seen(trained, rows)
            self.known[name] = suspicion
            self.history.append(found)
            self._rank()
        return found

    # controls
    def _controls(self):
        self.score = w.Dropdown(options=list(self.suspicions), description="Suspicion", layout={"width": "190px"})
        self.toolbar = w.HBox([self.score])
        self.toolbar.add_class("inb-toolbar")
        self.start = button("Retrain", "Train again on the corrected labels, and rank what is left by the new model",
                            lambda: self.state.running or self.state.start(self._again, "retraining"), "110px")
        self.start.button_style = "primary"
        self.cancel = button("Cancel", "Give up this retraining", self.state.cancel, "80px")
        self.bar, self.status = w.FloatProgress(min=0, max=1, tooltip="Share of the retraining done"), w.Label()
        self.action = w.HBox([self.start, self.cancel, self.bar, self.status])
        self.action.add_class("inb-action")

    def _bind(self):
        state = self.state
        dlink((state, "progress"), (self.bar, "value"))
        dlink((state, "running"), (self.start, "disabled"))
        dlink((state, "status"), (self.status, "value"))
        state.observe(lambda _: self._lay(), ["turn", "running"])
        self.score.observe(lambda _: self._chosen(), "value")
        self.desk.on_msg(self._told)
        self._lay()

    def _chosen(self):
        """Rank by the suspicion chosen in the menu."""
        try:
            with self.state.lock:
                self._rank()
        except Exception as error:
            failed, self.score.value = self.score.value, self.by
            self.state.refuse(f"{failed} failed: {error}")
            raise

    def _told(self, _, message, buffers):
        """A key or a button of the desk."""
        act, i = message.get("act"), message.get("id")
        try:
            if act == "move":
                self.state.move(int(message.get("step", 0)))
            elif act == "undo":
                self.state.undo()
            elif act in ("keep", "fix", "remove"):
                self.state.decide(i, act, message.get("label"))
        except (TypeError, ValueError) as error:
            self.state.refuse(str(error))

    def _lay(self):
        """Lay the example shown on the desk."""
        with self.state.lock:
            content = laid(self)
            with self.desk.hold_sync():
                if self.desk.picture_shape:
                    ids = [card["id"] for card in (content, *content["helpful"], *content["harmful"])]
                    self.desk.pictures = self.thumbnails(ids).tobytes()
                self.desk.content = content
        self.cancel.layout.display = self.bar.layout.display = None if self.state.running else "none"

    def told(self) -> list[str]:
        """All retrainings in words."""
        return [f"Retraining {number}: {found}" for number, found in enumerate(self.history, 1)]

    def thumbnails(self, ids) -> np.ndarray:
        """uint8 [len(ids), height, width, channels] of training examples that are images."""
        return thumbnails(self.task.train.x, ids, self.limits)

    def words(self, ids) -> list[str]:
        """What is shown of training examples besides an image; empty for images alone."""
        return texts(self.task.train, ids)


def check(task, suspicions, retrain) -> None:
    """Raise where the arguments of a LabelAudit make no sense."""
    if not isinstance(task, Task):
        raise TypeError(f"task must be a Task, got {type(task).__name__}: Task(model, train, test)")
    if task.train.y.is_floating_point():
        raise TypeError(f"a label audit needs class numbers, got targets of {task.train.y.dtype}")
    if not isinstance(suspicions, dict) or not suspicions:
        raise TypeError(f"suspicions must be a dictionary {{name: function or numbers}}, got "
                        f"{type(suspicions).__name__}: {{'loss': labels.loss}}?")
    if retrain is not None and not callable(retrain):
        raise TypeError(f"retrain must be callable as retrain(split, progress), got {type(retrain).__name__}")


def numbers(name, values, n) -> np.ndarray:
    """Suspicions as an array [n], checked."""
    values = torch.as_tensor(values).detach().cpu().double().numpy()
    if values.shape != (n,) or not np.isfinite(values).all():
        raise ValueError(f"suspicion {name!r} must be finite numbers [n_train] = ({n},), got {values.shape}"
                         f"{' with NaN or infinity' * (values.shape == (n,))}")
    return values


def checked_scores(scores, task, model) -> Scores:
    """Scores of training examples on training examples of this task, or of the last layer of it."""
    if not isinstance(scores, Scores):
        raise TypeError(f"scores must be Scores, got {type(scores).__name__}: method.fit(task).scores(task.train)?")
    if scores.task not in (task.fingerprint(), model.fingerprint()):
        raise ValueError(f"scores must belong to this task, or to its last layer, got those of task {scores.task}: "
                         "compute them again")
    every = list(range(len(task.train)))  # scores do not say of which split they are: those of test points are fewer
    if not scores.train_ids.tolist() == scores.test_ids.tolist() == every:
        raise ValueError(f"scores must be of all {len(every)} training examples on all of them, in order, got "
                         f"{tuple(scores.values.shape)}: method.scores(task.train)")
    return scores
