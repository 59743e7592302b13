"""The state of a label audit: in which order labels are checked, and what was decided. It knows no widget."""

import json
import os
import threading
import time
from pathlib import Path

import numpy as np
from traitlets import Bool, Float, HasTraits, Int, List, Unicode

from influence_nb.widgets.whatifstate import PAUSE, Cancelled, counted, seconds

FORMAT = "influence_nb audit 1"
DECISIONS = ("keep", "fix", "remove")
LONGEST = 60.0  # seconds between two decisions that count as time spent on the second


class AuditState(HasTraits):
    """Decisions on the labels of a split, each kept in a file as it is made, and the order in which they are asked for.

    Args:
        labels: [n] class numbers as given.
        n_classes: how many classes there are.
        split: a digest of the examples and their labels, so that the decisions on others are refused.
        path: the file; None for none. Where it is there already, its decisions are taken over.

    Raises:
        ValueError: the file is damaged, is no file of decisions, or is of another split.
    """

    shown = Int(0)           # the training example to be decided on
    order = List(Int())      # all training examples, the most suspicious first
    events = List()          # every decision: a dict with id, decision, label (after it; None if removed) and time
    turn = Int(0)            # grows with everything that was asked, when it is done
    running = Bool(False)
    progress = Float(0.0)
    status = Unicode("")
    error = Unicode("")

    def __init__(self, labels, n_classes, split, path=None):
        super().__init__()
        self.labels, self.n_classes, self.split = np.asarray(labels), int(n_classes), split
        self.path = None if path is None else Path(path).expanduser()
        self.stop, self.lock, self.saved = threading.Event(), threading.RLock(), None  # saved: the file as last seen
        self.order = list(range(len(self.labels)))
        if self.path is not None and self.path.exists():
            self.events = self.read()

    # decisions
    def decide(self, i, decision, label=None) -> None:
        """Keep the label of training example i, fix it to class `label`, or remove the example; then show the next one
        that is undecided."""
        event = self.checked({"id": i, "decision": decision, "label": label, "time": time.time()})
        self.error = ""
        self.write([*self.events, event])
        self.shown = self.following(i)
        self.turn += 1

    def undo(self) -> None:
        """Take back the last decision, if there is one, and show its example again."""
        self.error = ""
        if self.events:
            last = self.events[-1]
            self.write(self.events[:-1])
            self.shown = last["id"]
        self.turn += 1

    def refuse(self, why) -> None:
        """Say why something asked for was not done."""
        self.error = why
        self.turn += 1

    def final(self) -> dict:
        """The last decision on each example, by its id, in the order in which they were made."""
        found = {}
        for event in self.events:
            found.pop(event["id"], None)
            found[event["id"]] = event
        return found

    def spent(self) -> float:
        """Seconds from decision to decision, a pause counted as a minute at most."""
        return float(np.clip(np.diff([event["time"] for event in self.events]), 0, LONGEST).sum())

    # the order
    def rank(self, suspicion) -> None:
        """Ask for the labels in falling order of suspicion [n], ties by id, from the first one undecided on."""
        with self.lock:
            self.order = np.argsort(-np.asarray(suspicion, dtype=float), kind="stable").tolist()
            decided = self.final()
            self.shown = next((i for i in self.order if i not in decided), self.order[0])
            self.turn += 1

    def following(self, i) -> int:
        """The next example after i that is undecided, round to the first; i where there is none."""
        decided, at = self.final(), self.order.index(i)
        return next((j for j in self.order[at + 1:] + self.order[:at] if j not in decided), i)

    def move(self, step) -> None:
        """Show the example that is `step` places further down the order, or up, as far as there are any."""
        at = self.order.index(self.shown) + step
        self.shown = self.order[min(max(at, 0), len(self.order) - 1)]
        self.turn += 1

    # the file
    def checked(self, event) -> dict:
        """An event with plain values that make sense; to fix a label to what it is is to keep it."""
        i, decision, label, when = (event[name] for name in ("id", "decision", "label", "time"))
        if not whole(i) or not 0 <= i < len(self.labels):
            raise ValueError(f"a decision is on a training example 0..{len(self.labels) - 1}, got {i!r}")
        if decision not in DECISIONS:
            raise ValueError(f"a decision is one of {', '.join(DECISIONS)}, got {decision!r}")
        if decision == "fix" and not (whole(label) and 0 <= label < self.n_classes):
            raise ValueError(f"a label is fixed to a class 0..{self.n_classes - 1}, got {label!r}")
        given = int(self.labels[i])
        after = {"keep": given, "remove": None}.get(decision, label)
        decision = "keep" if after == given else decision
        return {"id": int(i), "decision": decision, "label": after if after is None else int(after),
                "time": float(when)}

    def write(self, events) -> None:
        """Make these the decisions: in the file, whole or not at all, and here. A file that cannot be written, or that
        another audit has written meanwhile, is left as it is, and `error` says so."""
        self.events = events
        if self.path is None:
            return
        text = json.dumps({"format": FORMAT, "split": self.split, "decisions": events}, indent=1)
        temporary = self.path.with_name(f".{self.path.name}-{os.getpid()}")
        try:
            if self.path.exists() and self.path.read_bytes() != self.saved:
                raise OSError("another audit has changed it; open the audit anew to go on from there")
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, self.path)
            self.saved = text.encode()
        except OSError as error:
            temporary.unlink(missing_ok=True)
            self.error = f"not written to {self.path.name}, and lost with this session: {error}"

    def read(self) -> list:
        """The decisions in the file."""
        name = self.path.name
        try:
            self.saved = self.path.read_bytes()
            saved = json.loads(self.saved)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"expected a file of decisions on labels, got a damaged one in {name} ({error}): give "
                             "another path") from error
        if not isinstance(saved, dict) or saved.get("format") != FORMAT:
            raise ValueError(f"expected a file of decisions on labels (format {FORMAT!r}), got something else in "
                             f"{name}: give another path")
        if saved.get("split") != self.split:
            raise ValueError(f"expected decisions on split {self.split}, got those on {saved.get('split')} in {name}: "
                             "the examples or their labels differ; give another path")
        try:
            return [self.checked(event) for event in saved["decisions"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"expected decisions that fit the split, got others in {name} ({error}): give another "
                             "path") from error

    # long work
    def start(self, job, what) -> threading.Thread:
        """job(progress) in a thread; what goes wrong is said in `error`."""
        thread = threading.Thread(target=self.work, args=(job, self.begin(what), True), name=what, daemon=True)
        thread.start()
        return thread

    def run(self, job, what):
        """The same in the calling thread: returns what the job does, and raises what it raises."""
        return self.work(job, self.begin(what))

    def cancel(self) -> None:
        """Give up the job that runs, at its next call of progress."""
        if self.running:
            self.stop.set()
            self.status = "cancelling at the next step"

    def begin(self, what) -> threading.Event:
        with self.lock:
            if self.running:
                raise ValueError("a retraining is running: wait for it, or cancel it")
            self.stop, self.error, self.progress, self.status = threading.Event(), "", 0.0, what
            self.running = True
            return self.stop

    def work(self, job, stop, quiet=False):
        began, said, status = time.monotonic(), 0.0, "interrupted"

        def progress(share):
            nonlocal said
            if stop.is_set():
                raise Cancelled
            if time.monotonic() - said > PAUSE:
                said = time.monotonic()
                self.progress = min(max(float(share), 0.0), 1.0)

        try:
            result = job(progress)
            status = f"done in {seconds(time.monotonic() - began)}"
            return result
        except Cancelled:
            status = f"cancelled after {seconds(time.monotonic() - began)}"
        except Exception as error:
            status, self.error = "", f"the retraining failed: {type(error).__name__}: {error}"
            if not quiet:
                raise
        finally:
            with self.lock:
                self.running, self.progress, self.status = False, 0.0, status


def whole(value) -> bool:
    """Whether this is a whole number, and not true or false."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def tally(decided, n) -> str:
    """ "12 of 400 checked: 7 kept, 4 fixed, 1 removed"."""
    counts = [sum(event["decision"] == name for event in decided.values()) for name in DECISIONS]
    parts = [f"{count} {name}" for count, name in zip(counts, ("kept", "fixed", "removed")) if count]
    return f"{len(decided)} of {counted(n, 'label')} checked" + (f": {', '.join(parts)}" if parts else "")
