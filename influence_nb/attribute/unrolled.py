"""Exact unrolled influence: the derivative of the training run itself in every training weight (see `replay`)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil, sqrt

import torch
from torch import Tensor

from ..gradients import Gradients, rise_slopes
from ..newton import move
from ..parameters import theta
from ..removal import reading, repr_of
from ..replay import replayed, run_of, weight_derivatives
from ..scores import Scores
from ..task import Split, Task, asked, cross_entropy, name_of
from ..train import fit

BLOCK = 2**26  # bytes of the adjoint


@dataclass
class Unrolled:
    """The derivative of the training run: S[i, j] = - d loss(test_i; theta_T(w)) / d w_j at w = 1, converged or not.

    The run is `fit(task, epochs, batch_size, optimizer, schedule, seed=seed)` from the weights `start`. It is made
    again here, and must end at the weights of the task's model:

        start = copy.deepcopy(model.state_dict())
        fit(task, 20, batch_size=50, optimizer=sgd, seed=3)
        scores = Unrolled(20, 50, optimizer=sgd, seed=3).fit(task, start).scores()

    Where `Influence` asks what a minimum does without example j, this asks what this very run does: the same initial
    weights, order and steps. Positive = helpful, in nats for one removed example: exact for a small change of w_j,
    first order for a whole removal. Without `start` the run goes on from the model's own weights and must not leave
    them: it is then descent at a minimum, and the scores tend to those of `Influence` as epochs grow.

    The derivative is exact and yet says little where the run is rough: with too large a learning rate, with ReLU, or
    where gradients come near Adam's eps. So `fit` also trains with a random 1 % of the examples at weight 1/2, and
    at 0. The certificate's "smoothness" is the cosine, in -1..1, of the two halves of the way that the outputs of the
    test points take: 1 where w acts linearly, about -1/2 where the ends are three random draws. Below 0.5 the scores
    say that they must not be trusted. On a tanh network at five learning rates it was 0.999, 0.997, 0.97, 0.66 and
    -0.4 where the LDS at 1 % removals was 0.998, 0.99, 0.94, 0.76 and 0.01 (benchmarks/unrolled.py). "error of a
    removal" is |predicted - measured| / |measured| for that 1 %.

    Cost: fit, three trainings; scores, two trainings for each block of test points, and for small networks about half a
    training a test point. Memory: 2 sqrt(steps) states of 2 p numbers (Adam: 3 p), and `BLOCK` bytes a few times.

    Args:
        epochs, batch_size, optimizer, schedule, seed: as of the run; the optimiser is torch.optim.SGD or Adam, and
            batch_size None stands for all examples in each step.

    Raises:
        ValueError: (fit) the run does not end at the model's weights, is no function of w alone (dropout, BatchNorm),
            or its optimiser is none of the two; (scores) the run is so rough that the derivative is not finite.

    Source: Hara, Nitanda & Maehara (2019) for SGD, approximately; Ilyas & Engstrom (2025), whose MAGIC this is, with
    the opposite sign; Engstrom et al. (2025), whose metasmoothness counts equal signs in place of the cosine.
    """

    epochs: int = 200
    batch_size: int | None = None
    optimizer: Callable = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    schedule: Callable | None = None
    seed: int = 0

    def fit(self, task: Task, start: dict | None = None) -> "Unrolled":
        """Make the run again, and twice more with some examples at less weight.

        Args:
            start: a copy of the model's `state_dict` before the run; None for the one it has now.
        """
        self.task_, self.fingerprint_, n = task, task.fingerprint(), len(task.train)
        arguments = self.epochs, self.batch_size or n, self.optimizer, self.schedule
        self.run_ = run = run_of(task, start or task.model.state_dict(), *arguments, self.seed)
        self.every_ = ceil(sqrt(len(run.steps)))
        self.checkpoints_, end = replayed(run, self.every_)
        self.deviation_ = same_end(task, end, len(run.steps), start is not None)
        self.removed_ = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed))[:ceil(n / 100)]
        ways = [task.outputs()]
        for share in (0.5, 0.0):
            w = torch.ones(n).to(end)
            w[self.removed_] = share
            move(run.task, run.start[0])
            fit(run.task, *arguments, w, seed=self.seed)
            ways.append(run.task.outputs())
        self.without_ = theta(run.task)
        first, second = (ways[1] - ways[0]).flatten(), (ways[2] - ways[1]).flatten()
        self.smoothness_ = float(torch.cosine_similarity(first, second, dim=0))
        return self

    def scores(self, split: Split | None = None) -> Scores:
        """Scores [n_test, n_train] of the task's test points, or of `split`."""
        task, split = asked(self, split)
        run, state = self.run_, self.run_.start.nbytes
        slopes = Gradients(task, split, rise_slopes).dense()[0]                             # [n_test, p]
        values = -torch.cat([weight_derivatives(run, self.checkpoints_, self.every_, block)
                             for block in slopes.split(max(1, BLOCK // state))])
        if not torch.isfinite(values).all():
            raise ValueError(f"expected finite derivatives, got infinity or NaN: the run is rough (smoothness "
                             f"{self.smoothness_:.2g}), and they grow from step to step; a smaller learning rate?")
        measured = reading(task, split, self.without_) - reading(task, split, theta(task))
        error = (values[:, self.removed_].sum(1) - measured).norm() / measured.norm()
        of = "nats" if task.measure is None and task.loss is cross_entropy else name_of(task.measure or task.loss)
        return Scores(values, repr_of(self), self.fingerprint_, split.ids, task.train.ids, f"{of} per removed example",
                      {"smoothness": self.smoothness_, "error of a removal": float(error),
                       "examples removed": len(self.removed_), "steps": len(run.steps),
                       "replay off by": self.deviation_, "states kept": len(self.checkpoints_),
                       "bytes kept": state * len(self.checkpoints_)},
                      {"rule": repr(run.rule), "seed": self.seed})


def same_end(task: Task, end: Tensor, steps: int, given: bool) -> float:
    """The largest difference of a weight at the end of the run from the model's.

    Raises:
        ValueError: it is more than rounding.
    """
    weights = theta(task)
    away, size = float((end - weights).abs().max()), float(weights.abs().max())
    if not away <= torch.finfo(weights.dtype).eps ** 0.5 * size:
        cure = ("epochs, batch_size, optimizer, schedule and seed must be those of the run, and start a copy of the "
                "weights before it: copy.deepcopy(model.state_dict())" if given else
                "give fit(task, start) the weights before the run; without them the model must be at a minimum")
        raise ValueError(f"expected the run to end at the weights of the task's model, got weights that differ by up "
                         f"to {away:.2g} (the largest is {size:.2g}) after {steps} steps: {cure}")
    return away
