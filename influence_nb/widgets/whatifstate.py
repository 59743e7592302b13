"""The state of a what-if: what is removed, what that is predicted to do, what retraining found. It knows no widget."""

import threading
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from traitlets import Bool, Float, Int, List, Unicode, validate

from influence_nb.metrics import pearson, slope
from influence_nb.widgets.steps import Steps

PAUSE = 0.05  # seconds between two reports of progress


class Cancelled(BaseException):
    """Raised in a retrainer by its call of progress, after a cancel. No Exception, so that nothing swallows it."""


@dataclass(frozen=True)
class Retraining:
    """What one retraining found.

    Attributes:
        ids: the training examples removed.
        predicted, actual: [n_test] change of each test point's loss (drop of its measure), in the scores' unit.
        seconds: what it took.
        certificate: what the retrainer says of where it ended, as plain values.
    """

    ids: tuple
    predicted: np.ndarray
    actual: np.ndarray
    seconds: float
    certificate: dict = field(default_factory=dict)


class WhatIfState(Steps):
    """Training examples to remove, the prediction for the test point shown, and all retrainings so far.

    Args:
        scores: Scores of removal effects.
        test_ids: the test points shown.
        n_test: test points of the task; a retrainer may answer for all of them, or for those shown.
    """

    test_id = Int(None, allow_none=True)
    helpful, harmful = List(Int()), List(Int())  # the strongest for the test point shown
    removed = List(Int())
    predicted = Float(None, allow_none=True)  # for the test point shown; None where nothing is removed
    actual = Float(None, allow_none=True)     # the same from the retraining shown
    shown = Int(None, allow_none=True)        # the retraining of these examples, counted from 1
    history = List()
    running = Bool(False)
    progress = Float(0.0)
    status = Unicode("")
    error = Unicode("")

    def __init__(self, scores, test_ids, n_test):
        super().__init__()
        self.scores, self.test_ids, self.n_test = scores, [int(i) for i in test_ids], int(n_test)
        self.n_train = len(scores.train_ids)
        place = {i: row for row, i in enumerate(scores.test_ids.tolist())}
        self.rows = torch.tensor([place[i] for i in self.test_ids])
        self.row = {i: row for row, i in enumerate(self.test_ids)}
        self.lock, self.random = threading.RLock(), np.random.default_rng(0)
        self.stop, self.pending = threading.Event(), set()
        self.remember(("test_id", "removed"))
        self.observe(lambda _: self.reckon(), ["test_id", "removed", "history"])
        self.observe(lambda _: self._settle(), "removed")

    @validate("removed")
    def _train(self, proposal):
        if bad := [i for i in proposal.value if not 0 <= i < self.n_train]:
            raise ValueError(f"removed must hold training ids in 0..{self.n_train - 1}, got {bad[0]}")
        return list(dict.fromkeys(proposal.value))

    @validate("test_id")
    def _test(self, proposal):
        if proposal.value is not None and proposal.value not in self.row:
            few = ", ".join(map(str, self.test_ids[:5]))
            raise ValueError(f"test_id must be one of the {len(self.row)} test points shown ({few}, ...), got "
                             f"{proposal.value}")
        return proposal.value

    # what is removed
    def pick_helpful(self, k) -> None:
        """Remove the k most helpful examples of the test point shown."""
        self.removed = self.scores.top(self.test_id, k).helpful

    def pick_harmful(self, k) -> None:
        """Remove the k most harmful examples of the test point shown."""
        self.removed = self.scores.top(self.test_id, k).harmful

    def pick_random(self, k) -> None:
        """Remove k examples drawn at random, others at every call."""
        self.removed = self.random.choice(self.n_train, min(k, self.n_train - 1), replace=False).tolist()

    def recall(self, number, test_id=None) -> None:
        """Show retraining `number` with its examples again; with `test_id`, what it did to that test point."""
        with self.one_step():
            self.removed = list(self.history[number - 1].ids)
            self.test_id = self.test_id if test_id is None else test_id
        self.reckon(number)

    # what that does
    def changes(self, ids) -> np.ndarray:
        """The first-order prediction [n_test]: the sum of the scores of the examples removed."""
        return self.scores.values[:, list(ids)][self.rows].detach().cpu().double().sum(1).numpy()

    def reckon(self, wanted=None) -> None:
        """Bring `shown`, `predicted` and `actual` up to what is asked now; of several that fit, show `wanted`."""
        with self.lock:
            now = set(self.removed)
            same = [number for number, run in enumerate(self.history, 1) if set(run.ids) == now]
            self.shown = next((number for number in (wanted, self.shown) if number in same), max(same, default=None))
            row = self.row.get(self.test_id)
            self.predicted = None if row is None or not now else float(self.changes(self.removed)[row])
            self.actual = None if row is None or not self.shown else float(self.history[self.shown - 1].actual[row])

    def _settle(self):
        """What was said of the last retraining does not hold for other examples."""
        if not self.running:
            self.status = self.error = ""

    # retraining
    def start(self, retrain) -> threading.Thread:
        """Retrain without the examples removed, in a thread; what goes wrong is said in `error`."""
        thread = threading.Thread(target=self._work, args=(retrain, *self._begin(), True), name="retraining",
                                  daemon=True)
        thread.start()
        return thread

    def run(self, retrain) -> Retraining:
        """The same in the calling thread: returns the Retraining, and raises what the retrainer raises."""
        return self._work(retrain, *self._begin())

    def cancel(self) -> None:
        """Give up the retraining that runs, at its next call of progress; what it may still return is dropped."""
        if self.running:
            self.stop.set()
            self.status = "cancelling at the next step of the retraining"

    def reason(self) -> str:
        """Why there can be no retraining now; empty where there can."""
        if self.running:
            return "a retraining is running: wait for it, or cancel it"
        if not self.removed:
            return "nothing is picked: pick at least one training example"
        return "everything is picked: leave something to train on" if len(self.removed) == self.n_train else ""

    def _begin(self):
        with self.lock:
            if reason := self.reason():
                raise ValueError(reason)
            self.stop, self.error, self.progress = threading.Event(), "", 0.0
            self.status = f"retraining without {counted(len(self.removed), 'example')}"
            self.pending, self.running = set(self.removed), True
            return tuple(self.removed), self.stop

    def _work(self, retrain, ids, stop, quiet=False):
        began, said = time.monotonic(), 0.0

        def progress(share):
            nonlocal said
            if stop.is_set():
                raise Cancelled
            if time.monotonic() - said > PAUSE:
                said = time.monotonic()
                self.progress = min(max(float(share), 0.0), 1.0)

        status = "interrupted"
        try:
            actual, certificate = self._read(retrain(list(ids), progress))
            progress(1.0)
            run = Retraining(ids, self.changes(ids), actual, time.monotonic() - began, certificate)
            with self.lock:
                self.history = [*self.history, run]
                self.reckon(len(self.history))
            status = f"retraining {len(self.history)} done in {seconds(run.seconds)}"
            return run
        except Cancelled:
            status = f"cancelled after {seconds(time.monotonic() - began)}"
        except Exception as error:
            status, self.error = "", f"the retraining failed: {type(error).__name__}: {error}"
            if not quiet:
                raise
        finally:
            with self.lock:
                self.running, self.progress, self.status = False, 0.0, status

    def _read(self, result):
        """The retrainer's answer as ([n_test] of the test points shown, certificate), checked."""
        actual, certificate = result if isinstance(result, tuple) else (result, {})
        actual = torch.as_tensor(actual).detach().cpu().double().numpy()
        if actual.size not in (self.n_test, len(self.test_ids)):
            raise ValueError(f"the retrainer must return the change of every test point's loss, [n_test] = "
                             f"({self.n_test},), or ({len(self.test_ids)},) for those shown, got {actual.shape}")
        actual = actual.reshape(-1)
        actual = actual[self.test_ids] if actual.size == self.n_test else actual
        if not np.isfinite(actual).all():
            raise ValueError(f"the retrainer must return finite changes, got {actual[~np.isfinite(actual)][0]}")
        facts = certificate if isinstance(certificate, dict) else vars(certificate)
        return actual, {name: value for name, value in facts.items() if isinstance(value, (bool, int, float, str))}

    def agreement(self, every) -> tuple[int, float, float] | None:
        """(pairs, Pearson's r, slope) of all retrainings: for every test point, or for the one shown alone."""
        rows = slice(None) if every else [self.row[self.test_id]] if self.test_id is not None else []
        pairs = [np.concatenate([getattr(run, name)[rows] for run in self.history] or [[]])
                 for name in ("predicted", "actual")]
        return agreement(*pairs)


def agreement(predicted, actual) -> tuple[int, float, float] | None:
    """(pairs, Pearson's r, slope of actual on predicted); None for less than 3 pairs, or where one is constant."""
    if len(predicted) < 3 or min(np.ptp(predicted), np.ptp(actual)) == 0:
        return None
    return len(predicted), float(pearson(predicted, actual)), float(slope(predicted, actual))


def counted(n: int, name: str) -> str:
    """ "1 example", "12 examples"."""
    return f"{n} {name}" + ("" if n == 1 else "s")


def seconds(value: float) -> str:
    """ "0.34 s", "12 s", "3 min"."""
    return f"{value:.2g} s" if value < 10 else f"{value:.0f} s" if value < 120 else f"{value / 60:.0f} min"
