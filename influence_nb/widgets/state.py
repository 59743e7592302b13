"""The state of an explorer: what is asked, what is shown, what is chosen. It knows no widget and no array."""

import json

from traitlets import Bool, Dict, Int, List, TraitError, Unicode, validate

from influence_nb.widgets.steps import Steps

FORMAT = "influence_nb explorer 1"
DEPTH = 25  # most neighbours a side, and what is preloaded
COLOURS = ("label", "predicted", "correct")
ASKED = ("test_id", "pinned", "method", "layer", "metric", "projection", "near", "k", "colour_by", "ellipses",
         "class_filter", "misclassified_only", "search", "selected", "removed", "flips")


class ExplorerState(Steps):
    """What an explorer shows; every change of what is asked can be undone, saved and loaded.

    Args:
        test_ids, n_train, classes: the ids of the test points shown, the number of training examples, the class names.
        methods, layers, projections, metrics: the names to choose from; the first of each is the start.
        task: the task's fingerprint, so that the saved state of another task is refused.
        ranges: {projection: (name, low, high, default)} of the projections that look at a chosen number of neighbours.

    Raises:
        ValueError: a trait is set to something that is not there; the message says what is.
    """

    test_id = Int(None, allow_none=True)
    pinned = Int(None, allow_none=True)
    method = Unicode()
    layer = Unicode()
    metric = Unicode()
    projection = Unicode()
    near = Dict(key_trait=Unicode(), value_trait=Int())  # {projection: neighbours}, where it is not the default
    k = Int(10)
    colour_by = Unicode("label")
    ellipses = Bool(False)  # of the points of one colour, on the map
    class_filter = Unicode("")
    misclassified_only = Bool(False)
    search = Unicode("")
    selected = List(Int())
    helpful = List(Int())
    harmful = List(Int())
    removed = List(Int())
    flips = Dict(key_trait=Int(), value_trait=Int())
    status = Unicode("")

    def __init__(self, test_ids, n_train, classes, methods, layers, projections, metrics, task="", ranges=()):
        self.n_train, self.task, self.ranges = int(n_train), task, dict(ranges)
        self.classes = tuple(classes)
        self.test_ids = frozenset(int(i) for i in test_ids)
        self.choices = {"method": tuple(methods), "layer": tuple(layers), "projection": tuple(projections),
                        "metric": tuple(metrics), "colour_by": COLOURS, "class_filter": ("", *classes)}
        super().__init__(**{name: self.choices[name][0] for name in ("method", "layer", "projection", "metric")})
        self.remember(ASKED)

    @validate("method", "layer", "projection", "metric", "colour_by", "class_filter")
    def _one_of(self, proposal):
        known = self.choices[proposal.trait.name]
        if proposal.value not in known:
            names = ", ".join(repr(name) for name in known)
            raise ValueError(f"{proposal.trait.name} must be one of {names}, got {proposal.value!r}")
        return proposal.value

    @validate("test_id", "pinned")
    def _shown(self, proposal):
        if proposal.value is not None and proposal.value not in self.test_ids:
            few = ", ".join(map(str, sorted(self.test_ids)[:5]))
            raise ValueError(f"{proposal.trait.name} must be one of the {len(self.test_ids)} test points shown ({few}, "
                             f"...), got {proposal.value}: Explorer(..., test_ids=[{proposal.value}, ...])?")
        return proposal.value

    @validate("k")
    def _depth(self, proposal):
        if not 1 <= proposal.value <= DEPTH:
            raise ValueError(f"k must lie in 1..{DEPTH}, got {proposal.value}")
        return proposal.value

    @validate("near")
    def _in_range(self, proposal):
        for projection, value in proposal.value.items():
            if projection not in self.ranges:
                raise ValueError(f"near must be {{projection: neighbours}} of {list(self.ranges)}, got {projection!r}")
            name, low, high, _ = self.ranges[projection]
            if not low <= value <= high:
                raise ValueError(f"near: the {name} of {projection} must lie in {low}..{high}, got {value}")
        return proposal.value

    def neighbours(self) -> int | None:
        """How many neighbours the projection looks at; None where it has no such number."""
        return self.near.get(self.projection, self.ranges.get(self.projection, (None,))[-1])

    @validate("selected", "removed", "flips")
    def _train(self, proposal):
        ids = list(proposal.value)
        if bad := [i for i in ids if not 0 <= i < self.n_train]:
            raise ValueError(f"{proposal.trait.name} must hold training ids in 0..{self.n_train - 1}, got {bad[0]}")
        if proposal.trait.name != "flips":
            return list(dict.fromkeys(ids))
        if bad := [c for c in proposal.value.values() if not 0 <= c < len(self.classes)]:
            raise ValueError(f"flips must give class numbers in 0..{len(self.classes) - 1}, got {bad[0]}")
        return proposal.value

    def asked(self) -> dict:
        """All that a reader has chosen, as plain values."""
        return {name: getattr(self, name) for name in ASKED}

    def to_json(self) -> str:
        """The state as JSON text."""
        return json.dumps({"format": FORMAT, "task": self.task, **self.asked()}, indent=1)

    def from_json(self, text: str | bytes) -> None:
        """Take over the state in `text`, all of it or, where something is wrong, none of it.

        Raises:
            ValueError: the text is damaged, is no explorer state, or belongs to another task.
        """
        try:
            saved = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"expected the saved state of an explorer, got a damaged file ({error})") from error
        if not isinstance(saved, dict) or saved.get("format") != FORMAT:
            raise ValueError(f"expected the saved state of an explorer (format {FORMAT!r}), got something else")
        if saved.get("task") != self.task:
            raise ValueError(f"expected a state of task {self.task}, got one of {saved.get('task')}: the model, its "
                             "training data or the loss differ")
        if odd := (set(saved) - {"format", "task"}) ^ set(ASKED):
            raise ValueError(f"expected the entries {', '.join(ASKED)}; missing or unknown: {', '.join(sorted(odd))}")
        if odd := [name for name in ("k", "test_id", "pinned") if isinstance(saved[name], bool)]:
            raise ValueError(f"expected whole numbers as {', '.join(odd)}, got true or false")
        trial = ExplorerState(self.test_ids, self.n_train, self.classes, *(self.choices[name] for name in (
            "method", "layer", "projection", "metric")), self.task, self.ranges)
        try:
            flips = {int(i): label for i, label in saved["flips"].items()}
            for name in ASKED:
                setattr(trial, name, flips if name == "flips" else saved[name])
        except (TraitError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"expected a state of this explorer, got one that does not fit it: {error}") from error
        with self.one_step(), self.hold_trait_notifications():
            for name, value in trial.asked().items():
                setattr(self, name, value)
