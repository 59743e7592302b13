"""Split and Task: what was trained, on what, and what is asked of it.

The meanings that bind the whole library:

* Risk: R(theta; w) = (1/n) sum_j w_j loss(z_j; theta) + (l2/2) |theta_r|^2, with theta_r the regularised
  parameters. Removing example j means w_j = 0; n stays n.
* Score: S[i, j] estimates loss(test_i; theta without j) - loss(test_i; theta), in nats, for removing one training
  example. Positive = helpful: without j the test loss would be higher.
"""

import copy
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import RLock
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .fingerprint import described, digest


# losses: (outputs [b, ...], y [b]) -> [b], one value an example, never reduced
def cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    """Softmax cross-entropy per example, in nats: outputs [b, c] logits, y [b] class numbers -> [b]."""
    return F.cross_entropy(outputs, y, reduction="none")


def squared_error(outputs: Tensor, y: Tensor) -> Tensor:
    """Half the squared error per example: outputs [b] or [b, 1], y [b] -> [b]."""
    return 0.5 * (outputs.reshape(len(y)) - y) ** 2


def weights_only(name: str) -> bool:
    """The default choice of regularised parameters: all but those called bias."""
    return name.rpartition(".")[2] != "bias"


LOCKS, PRINTS = WeakKeyDictionary(), WeakKeyDictionary()  # of a model; of a task, its last stamp and fingerprint


@contextmanager
def as_found(model: nn.Module):
    """Run the body with `model` in eval mode, where it draws no random numbers; then put back its modes and flags.

    One thread at a time has a model: another that asks for it waits.
    """
    with LOCKS.setdefault(model, RLock()):
        found = [(module, "training", module.training) for module in model.modules()]
        found += [(parameter, "requires_grad", parameter.requires_grad) for parameter in model.parameters()]
        model.eval()
        try:
            yield model
        finally:
            for part, name, value in found:
                setattr(part, name, value)


@dataclass(frozen=True, eq=False)
class Split:
    """Examples and their labels; the row index is an example's id.

    Args:
        x: Tensor [n, ...] of finite inputs.
        y: Tensor [n] of class numbers (any integer type) or real targets.
        classes: class names, one for each class number; empty for regression.
        text: what to show of each example where x is not itself an image, [n] strings; empty otherwise.
        ids: Tensor [n]; left out, the row index. `take` keeps it, so that a few test points still know who they are.

    Raises:
        TypeError: x or y is no tensor.
        ValueError: the split is empty, lengths differ, x or y holds NaN or infinity, a label has no class.
    """

    x: Tensor
    y: Tensor
    classes: tuple = ()
    text: tuple = ()
    ids: Tensor | None = None

    def __post_init__(self):
        for name in ("x", "y"):
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}: torch.as_tensor({name})?")
        n = len(self.x) if self.x.ndim else 0
        if n == 0:
            raise ValueError(f"a split needs at least one example, got x of shape {tuple(self.x.shape)}")
        if self.y.shape != (n,):
            raise ValueError(f"y must be [n] = ({n},) like x {tuple(self.x.shape)}, got {tuple(self.y.shape)}")
        for name, value in (("x", self.x), ("y", self.y)):
            if value.is_floating_point() and not torch.isfinite(value.sum()):
                bad = (~torch.isfinite(value.reshape(n, -1)).all(1)).nonzero()[:, 0]
                if len(bad):
                    raise ValueError(f"{name} must be finite, got NaN or infinity in {len(bad)} of {n} examples, "
                                     f"first in row {bad[0]}: drop or repair them")
        object.__setattr__(self, "classes", tuple(str(c) for c in self.classes))
        object.__setattr__(self, "text", tuple(str(t) for t in self.text))
        if not self.y.is_floating_point():
            object.__setattr__(self, "y", self.y.long())
            if self.y.min() < 0:
                raise ValueError(f"class numbers must be 0 or more, got {self.y.min()}")
        elif self.classes:
            raise TypeError(f"labels of {len(self.classes)} classes must be whole numbers, "
                            f"got {self.y.dtype}: y.long()?")
        if self.classes and self.y.max() >= len(self.classes):
            raise ValueError(f"labels must lie in 0..{len(self.classes) - 1} for {len(self.classes)} classes, "
                             f"got {self.y.max()} in row {self.y.argmax()}")
        if self.text and len(self.text) != n:
            raise ValueError(f"text must have one string an example, expected {n}, got {len(self.text)}")
        if self.ids is None:
            object.__setattr__(self, "ids", torch.arange(n))
        elif self.ids.shape != (n,) or len(self.ids.unique()) != n:
            raise ValueError(f"ids must be {n} different numbers, got shape {tuple(self.ids.shape)} "
                             f"with {len(self.ids.unique())} different ones")

    def __len__(self):
        return len(self.x)

    def __repr__(self):
        named = f", {len(self.classes)} classes" if self.classes else ""
        return f"Split(n={len(self)}, x={tuple(self.x.shape)} {self.x.dtype}{named})".replace("torch.", "")

    def take(self, rows) -> "Split":
        """The examples in `rows` (a list, a slice, a tensor or a mask), with the ids they have here."""
        rows = torch.arange(len(self))[rows if isinstance(rows, slice) else torch.as_tensor(rows).cpu()].reshape(-1)
        text = tuple(self.text[i] for i in rows.tolist()) if self.text else ()
        return Split(self.x[rows], self.y[rows], self.classes, text, self.ids[rows])

    def to(self, *args, **kwargs) -> "Split":
        """The same split on another device or in another floating type; class numbers and tokens stay whole."""
        device = self.x.to(*args, **kwargs).device
        x, y = (v.to(*args, **kwargs) if v.is_floating_point() else v.to(device) for v in (self.x, self.y))
        return replace(self, x=x, y=y)


@dataclass(frozen=True, eq=False)
class Task:
    """A trained model, what it was trained on, and what is asked of it.

    Args:
        model: any `nn.Module` that maps a batch of x to outputs. It is used in eval mode and left as found.
        train, test: Splits. Their rows are renumbered from 0: inside a task the row index is the id.
        loss: (outputs [b, ...], y [b]) -> [b], per example.
        l2: lambda of the risk, in units of loss per squared weight.
        measure: what a score is the effect on; None for the loss itself. A measure (outputs, y) -> [b] is
            higher-is-better, and scores are its *drop* on removal.
        regularised: parameter name -> bool, the parameters that l2 acts on (default: all but biases).

    Raises:
        TypeError, ValueError: the first two training examples do not go through model and loss as they should.
    """

    model: nn.Module
    train: Split
    test: Split
    loss: Callable = cross_entropy
    l2: float = 0.0
    measure: Callable | None = None
    regularised: Callable = weights_only

    def __post_init__(self):
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(self.model).__name__}")
        if not self.l2 >= 0:
            raise ValueError(f"l2 must be 0 or more, got {self.l2}")
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ValueError("the model has no parameter with requires_grad=True: nothing was trained")
        for name in ("train", "test"):
            split = getattr(self, name)
            if not isinstance(split, Split):
                raise TypeError(f"{name} must be a Split, got {type(split).__name__}: Split(x, y)?")
            object.__setattr__(self, name, replace(split, ids=None))
        if self.train.x.shape[1:] != self.test.x.shape[1:]:
            raise ValueError(f"train and test examples must have one shape, got {tuple(self.train.x.shape[1:])} "
                             f"and {tuple(self.test.x.shape[1:])}")
        check_split(self, self.train)
        check_split(self, self.test)

    def __repr__(self):
        return f"Task({type(self.model).__name__}, train={self.train}, test={self.test}, l2={self.l2:g})"

    def to(self, *args, **kwargs) -> "Task":
        """The same task on another device or in another floating type, with a copy of the model."""
        model = copy.deepcopy(self.model).to(*args, **kwargs)
        return replace(self, model=model, train=self.train.to(*args, **kwargs), test=self.test.to(*args, **kwargs))

    def outputs(self, split: Split | None = None, batch_size: int = 1000) -> Tensor:
        """The model's outputs [n, ...] on `split` (default: the test points), in eval mode, without gradients."""
        split = self.test if split is None else split
        with as_found(self.model), torch.no_grad():
            return torch.cat([self.model(x) for x in split.x.split(batch_size)])

    def predict(self, split: Split | None = None) -> Tensor:
        """The predicted class [n] of each example of `split` (default: the test points)."""
        return self.outputs(split).argmax(1)

    def losses(self, split: Split | None = None) -> Tensor:
        """The loss [n] of each example of `split` (default: the test points), in nats for cross-entropy."""
        split = self.test if split is None else split
        return self.loss(self.outputs(split), split.y)

    def mistakes(self) -> Tensor:
        """Ids of the test points that the model gets wrong, in order.

        Raises:
            TypeError: the targets are real numbers, of which none is simply right or wrong.
        """
        if self.test.y.is_floating_point():
            raise TypeError(f"mistakes are for classes, got targets of {self.test.y.dtype}: task.losses() ranks them")
        return (self.predict() != self.test.y).nonzero()[:, 0]

    def fingerprint(self) -> str:
        """A digest of the model, of what in it is trained and regularised, of training data, loss, measure and l2."""
        now, named = stamp(self), self.model.named_parameters()
        trained = [(name, bool(self.regularised(name))) for name, p in named if p.requires_grad]
        parts = self.model, trained, self.train.x, self.train.y, self.loss, self.measure, float(self.l2)
        PRINTS[self] = now, digest(*map(described, parts))
        return PRINTS[self][1]


def stamp(task: Task) -> tuple:
    """What is the same while model and training data are: cheap, and blind to writes through `.data` or numpy."""
    with LOCKS.setdefault(task.model, RLock()):
        tensors = (*task.model.parameters(), *task.model.buffers(), task.train.x, task.train.y)
        return tuple((id(t), t.data_ptr(), -1 if t.is_inference() else t._version, t.requires_grad) for t in tensors)


def name_of(function) -> str:
    """The name by which a loss or a measure goes into records."""
    return getattr(getattr(function, "func", function), "__name__", type(function).__name__)


def check_split(task: Task, split: Split) -> None:
    """Raise where the first examples of `split` do not go through model and loss, or a label has no output."""
    if not isinstance(split, Split):
        raise TypeError(f"expected a Split, got {type(split).__name__}: for some test points, task.test.take(ids)")
    x, y = split.x[:2], split.y[:2]
    weight = next(p for p in task.model.parameters() if p.requires_grad)
    if x.device != weight.device:
        raise ValueError(f"data and model must be on one device, got {x.device} and {weight.device}: split.to(device)?")
    if x.is_floating_point() and x.dtype != weight.dtype:
        raise TypeError(f"data and model must have one floating type, got {x.dtype} and {weight.dtype}: "
                        f"model.to({x.dtype}) or split.to({weight.dtype})?")
    found = []
    with as_found(task.model), torch.no_grad():
        for b in (1, len(x)):
            try:
                found.append(outputs := task.model(x[:b]))
            except RuntimeError as error:
                raise ValueError(f"the model does not take examples of shape {tuple(x.shape[1:])}: {error}") from error
            except ValueError as error:  # BatchNorm1d refuses a single example
                raise ValueError(f"the model must take examples one at a time: {error}") from error
            if not isinstance(outputs, Tensor):
                raise TypeError(f"expected a Tensor of outputs, got {type(outputs).__name__}: wrap the model in one "
                                "that returns the Tensor alone")
            if outputs.shape[:1] != (b,):
                raise ValueError(f"the model must give each example its row of outputs, expected shape ({b}, ...) for "
                                 f"{b}, got {tuple(outputs.shape)}: squeeze(-1) in place of squeeze()?")
        alone, among = (rows[0].double() for rows in found)
        if (among - alone).norm() > torch.finfo(weight.dtype).eps ** 0.5 * among.norm():
            raise ValueError("each example must go through the model for itself, but its outputs change with the others"
                             " in the batch, or from call to call: is there BatchNorm without running statistics, a "
                             "mean over the batch, or dropout in eval mode?")
        if task.loss is cross_entropy:
            if split.y.is_floating_point():
                raise TypeError(f"cross_entropy needs class numbers (torch.int64), got y of {split.y.dtype}: y.long()?")
            if outputs.ndim < 2 or outputs.shape[-1] < 2:
                raise ValueError(f"cross_entropy needs at least 2 outputs, got "
                                 f"{outputs[0].numel()}: squared_error, or a loss on one logit?")
            if split.y.max() >= outputs.shape[-1]:
                raise ValueError(f"labels must lie in 0..{outputs.shape[-1] - 1}, the model has {outputs.shape[-1]} "
                                 f"outputs; got {split.y.max()} in row {split.y.argmax()}")
        for name in ("loss", "measure"):
            function = getattr(task, name)
            if function is not None and (got := tuple(function(outputs, y).shape)) != (len(y),):
                raise ValueError(f"{name} must give one value an example, expected shape ({len(y)},), got {got}: "
                                 "reduction='none'?")


def asked(method, split: Split | None) -> tuple[Task, Split]:
    """The task that a method was fitted on, and the examples that its scores are wanted for, checked.

    Raises:
        ValueError: there was no fit, or model or training data have changed since; see `stamp` for what it overlooks.
    """
    if not hasattr(method, "task_"):
        raise ValueError(f"{type(method).__name__} has seen no task yet: call .fit(task) first")
    task = method.task_
    known, fingerprint = PRINTS.get(task, (None, None))
    if (fingerprint if known == stamp(task) else task.fingerprint()) != method.fingerprint_:
        raise ValueError(f"the model has changed since {type(method).__name__} was fitted, or its training data: call "
                         ".fit(task) again")
    split = task.test if split is None else split
    check_split(task, split)
    return task, split
