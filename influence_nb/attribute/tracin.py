"""Products of gradients, without curvature: at the trained model, or summed over checkpoints of its training."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..gradients import Gradients, loss_slopes, rise_slopes
from ..removal import refuse_bad_losses
from ..scores import Scores
from ..task import Split, Task, asked


def finite(values: Tensor, *sets: Gradients) -> Tensor:
    """Scores [n_test, n_train], or [n_train], if none is NaN or infinite.

    Raises:
        ValueError: a training gradient in one of the sets is not finite, or that of a test point.
    """
    if torch.isfinite(values).all():
        return values
    for train in sets:
        if not torch.isfinite(train.squared_norms()).all():
            refuse_bad_losses(train.task)
    row = int((~torch.isfinite(values)).nonzero()[0, 0])
    raise ValueError(f"expected finite scores, got NaN or infinity in row {row} of the test points: is its loss or "
                     "measure finite?")


@dataclass
class GradDot:
    """The product of test and training gradient, v_i^T g_j: influence with the identity in place of the curvature.

    Positive = helpful, but no removal effect: ranked only. It is the baseline that curvature has to beat.
    Cost: one backward pass over both sets, and the products of the two factors of every layer: no gradient is formed.

    Source: Charpiat et al. (2019), eq. 4, before normalisation.
    """

    def fit(self, task: Task) -> "GradDot":
        """Keep the training gradients."""
        self.task_, self.fingerprint_ = task, task.fingerprint()
        self.train_ = Gradients(task, task.train)
        return self

    def scores(self, split: Split | None = None) -> Scores:
        """Scores [n_test, n_train] of the task's test points, or of `split`."""
        task, split = asked(self, split)
        values = Gradients(task, split, rise_slopes).dot(self.train_)
        return Scores(finite(values, self.train_), "GradDot()", self.fingerprint_, split.ids, task.train.ids,
                      unit="squared nats per unit of theta squared (ranked only)")

    def self_influence(self) -> Tensor:
        """|g_j|^2 of each training example, [n_train]."""
        return finite(self.train_.squared_norms(), self.train_)


@dataclass
class GradCos:
    """The cosine of the angle between test and training gradient, in -1..1: ranked only, no removal effect.

    A training example with a large gradient, such as a mislabelled one, is not preferred for its size. An example
    without any gradient has the cosine 0.

    Cost: as `GradDot`. Source: Charpiat et al. (2019), eq. 4.
    """

    def fit(self, task: Task) -> "GradCos":
        """Keep the training gradients and their lengths."""
        self.task_, self.fingerprint_ = task, task.fingerprint()
        self.train_ = Gradients(task, task.train, level(loss_slopes))
        self.lengths_ = lengths(self.train_)
        return self

    def scores(self, split: Split | None = None) -> Scores:
        """Scores [n_test, n_train] of the task's test points, or of `split`."""
        task, split = asked(self, split)
        test = Gradients(task, split, level(rise_slopes))
        values = test.dot(self.train_) / lengths(test)[:, None] / self.lengths_
        return Scores(finite(values, self.train_), "GradCos()", self.fingerprint_, split.ids, task.train.ids,
                      unit="cosine of gradients (ranked only)")

    def self_influence(self) -> Tensor:
        """The cosine of each training gradient with itself: 1 wherever there is one, [n_train]."""
        return finite(self.train_.squared_norms() / self.lengths_.square(), self.train_)


def level(slopes: Callable) -> Callable:
    """The slopes, each example's scaled to a largest entry of 1: its angles stay, and no square of it underflows."""
    def scaled(task: Task, outputs: Tensor, y: Tensor) -> Tensor:
        v = slopes(task, outputs, y)                                                        # [1, b, ...]
        largest = v.reshape(*v.shape[:2], -1).abs().amax(2).clamp(min=torch.finfo(v.dtype).tiny)
        return v / largest.reshape(*v.shape[:2], *[1] * (v.ndim - 2))

    return scaled


def lengths(gradients: Gradients) -> Tensor:
    """|g_j| [n], kept off 0."""
    squares = gradients.squared_norms()
    return squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()


@dataclass
class TracIn:
    """TracInCP: the products of gradients at checkpoints of the training, sum_k lr_k v_i(theta_k)^T g_j(theta_k).

    A step of plain SGD on a batch of b takes (lr / b) v_i^T g_j nats off test loss i for each example j in it, to first
    order. With one checkpoint an epoch the scores are therefore b times the nats that all visits of j took off, and a
    row adds up to b times the fall of that test loss. That is no removal effect (ranked only): without j, the
    others would have taken over part of its work. Momentum scales all scores alike; steps of Adam are not these.

    Positive = helpful, as in the paper, where such examples are called proponents.
    Cost: that of `GradDot` for every checkpoint. The task's own model is not used but for its shape.

    Args:
        checkpoints: of the training, as `fit(..., keep=...).checkpoints` has them; none: the trained model with a
            learning rate of 1, which makes it `GradDot`.

    Raises:
        ValueError: (fit) a checkpoint is of another model.

    Source: Pruthi et al. (2020), there called TracInCP.
    """

    checkpoints: Sequence = field(default=(), repr=False)

    def fit(self, task: Task) -> "TracIn":
        """Keep the training gradients at every checkpoint, on copies of the model."""
        self.task_, self.fingerprint_ = task, task.fingerprint()
        tasks = [at_checkpoint(task, checkpoint.state) for checkpoint in self.checkpoints] or [task]
        self.rates_ = [checkpoint.lr for checkpoint in self.checkpoints] or [1.0]
        self.train_ = [Gradients(each, task.train, keep=2**30 // len(tasks)) for each in tasks]
        return self

    def scores(self, split: Split | None = None) -> Scores:
        """Scores [n_test, n_train] of the task's test points, or of `split`."""
        task, split = asked(self, split)
        values = sum(lr * Gradients(train.task, split, rise_slopes).dot(train)
                     for lr, train in zip(self.rates_, self.train_))
        return Scores(finite(values, *self.train_), f"TracIn({len(self.checkpoints)} checkpoints)", self.fingerprint_,
                      split.ids, task.train.ids, unit="nats times batch size on visits (ranked only)",
                      provenance={"epochs": [c.epoch for c in self.checkpoints], "learning rates": self.rates_})

    def self_influence(self) -> Tensor:
        """sum_k lr_k |g_j(theta_k)|^2 of each training example, [n_train]."""
        return finite(sum(lr * train.squared_norms() for lr, train in zip(self.rates_, self.train_)), *self.train_)


def at_checkpoint(task: Task, state: dict) -> Task:
    """The task with a copy of its model that has the weights and buffers in `state`."""
    model = copy.deepcopy(task.model)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"expected checkpoints of the task's own model, {type(model).__name__}; got another's "
                         f"({error}): keep them with fit(task, ..., keep=lambda epoch: True)") from error
    return replace(task, model=model)
