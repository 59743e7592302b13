"""Exact unrolled influence: the derivative of the training run itself in every training weight (see `replay`)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil, sqrt

import torch
from torch import Tensor

from ..gradients import Gradients, rise_slopes, risk_gradient
from ..newton import move
from ..parameters import theta
from ..removal import reading, refuse_bad_losses, repr_of
from ..replay import replayed, run_of, weight_derivatives
from ..scores import Scores, shown
from ..task import Split, Task, asked, cross_entropy, name_of
from ..train import fit

BLOCK = 2**26  # bytes of the adjoint


@dataclass
class Unrolled:
    """The derivative of the training run: S[i, j] = - d loss(test_i; theta_T(w)) / d w_j at w = 1, converged or not.

    The run is `fit(task, epochs, batch_size, optimizer, schedule, seed=seed)` from the weights `start`. It is made
    again here, and must end at the weights of the task's model, to a small share of the way to them:

        start = copy.deepcopy(model.state_dict())
        fit(task, 20, batch_size=50, optimizer=sgd, seed=3)
        scores = Unrolled(20, 50, optimizer=sgd, seed=3).fit(task, start).scores()

    Where `Influence` asks what a minimum does without example j, this asks what this very run does: the same initial
    weights, order and steps. Positive = helpful, in nats for one removed example: exact for a small change of w_j,
    first order for a whole removal. Without `start` the run goes on from the model's own weights, which must be a
    minimum that it does not leave: the scores then tend to those of `Influence` as epochs grow.

    The derivative is exact and yet says little where the run is rough: with too large a learning rate, with ReLU, or
    where gradients come near Adam's eps. So `fit` also trains with a random 1 % of the examples at weight 1/2, and
    at 0: of those examples that have a gradient at the start. The certificate's "smoothness" is the cosine, in -1..1,
    of the two halves of the way that the outputs of the test points take: 1 where w acts linearly, about -1/2 where
    the ends are three random draws, None where the outputs stay. Below 0.5 the scores say that they must not be
    trusted. On a tanh network at five learning rates it was 0.999, 0.997, 0.97, 0.66 and -0.4 where the LDS at 1 %
    removals was 0.998, 0.99, 0.94, 0.76 and 0.01 (benchmarks/unrolled.py). "error of a removal" is |predicted -
    measured| / |measured| for that 1 %. "replay off by" is the largest difference of a weight from the model's, as a
    share of the longest way of one; for a run that stays at a minimum there is "gradient norm", |grad R|, in its place.

    Cost: fit, three trainings; scores, two trainings for each block of test points, and for small networks about half a
    training a test point. Memory: 2 sqrt(steps) states of 2 p numbers (Adam: 3 p), and `BLOCK` bytes a few times.

    Args:
        epochs, batch_size, optimizer, schedule, seed: as of the run; the optimiser is torch.optim.SGD or Adam, and
            batch_size None stands for all examples in each step.

    Raises:
        ValueError: (fit, which then leaves the method as it was) the run does not end at the model's weights, is no
            function of w alone (dropout, BatchNorm), or its optimiser is none of the two; (scores) the run is so rough
            that the derivative is not finite.

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
        n, arguments = len(task.train), (self.epochs, self.batch_size or len(task.train), self.optimizer, self.schedule)
        run = run_of(task, start or task.model.state_dict(), *arguments, self.seed)
        every = ceil(sqrt(len(run.steps)))
        checkpoints, end = replayed(run, every)
        ended = same_end(task, run.start[0], end, len(run.steps), start is not None)
        move(run.task, run.start[0])
        unfelt = (Gradients(run.task, task.train, keep=0).squared_norms() == 0).cpu()
        order = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed))
        removed, ways = order[unfelt[order].int().argsort(stable=True)][:ceil(n / 100)], [task.outputs()]
        for share in (0.5, 0.0):
            w = torch.ones(n).to(end)
            w[removed] = share
            move(run.task, run.start[0])
            fit(run.task, *arguments, w, seed=self.seed)
            ways.append(run.task.outputs())
        first, second = (ways[1] - ways[0]).flatten(), (ways[2] - ways[1]).flatten()
        smooth = float(torch.cosine_similarity(first, second, dim=0)) if first.any() or second.any() else None
        self.task_, self.fingerprint_, self.run_, self.without_ = task, task.fingerprint(), run, theta(run.task)
        self.every_, self.checkpoints_, self.ended_ = every, checkpoints, ended
        self.removed_, self.smoothness_ = removed, smooth
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
                             f"{shown(self.smoothness_)}), and they grow from step to step; a smaller learning rate?")
        measured = reading(task, split, self.without_) - reading(task, split, theta(task))
        off = float((values[:, self.removed_].sum(1) - measured).norm())
        error = off / float(measured.norm()) if measured.any() else None
        of = "nats" if task.measure is None and task.loss is cross_entropy else name_of(task.measure or task.loss)
        return Scores(values, repr_of(self), self.fingerprint_, split.ids, task.train.ids, f"{of} per removed example",
                      {"smoothness": self.smoothness_, "error of a removal": error,
                       "examples removed": len(self.removed_), "steps": len(run.steps), **self.ended_,
                       "states kept": len(self.checkpoints_), "bytes kept": state * len(self.checkpoints_)},
                      {"rule": repr(run.rule), "seed": self.seed})


def same_end(task: Task, start: Tensor, end: Tensor, steps: int, given: bool) -> dict:
    """What the certificate says of the end of the run, which is compared with the model's weights.

    The measure is the way from the start to the model: a wrong run that goes no way is near the model too. Where there
    is no way, all that can be seen is whether this is a minimum.

    Raises:
        ValueError: the ends differ by more than rounding, or there is neither a way nor a minimum.
    """
    weights, eps = theta(task), torch.finfo(end.dtype).eps
    away, way, size = (float(v.abs().max()) for v in (end - weights, weights - start, weights))
    rounding = eps * size * sqrt(steps)
    if way > rounding and away <= min(0.01 * way, eps**0.5 * way + rounding):
        return {"replay off by": away / way}
    if not torch.isfinite(end).all() and not torch.isfinite(task.losses(task.train)).all():
        refuse_bad_losses(task)
    if way > rounding:
        raise ValueError(f"expected the run to end at the weights of the task's model, got weights that differ by up "
                         f"to {away:.2g}, where the way there is {way:.2g}, after {steps} steps: epochs, batch_size, "
                         "optimizer, schedule and seed must be those of the run, and start a copy of the weights "
                         "before it: copy.deepcopy(model.state_dict()); if they are, rounding grows on the way, and a "
                         "smaller learning rate helps")
    slope = float(risk_gradient(task).norm())
    one = float(Gradients(task, task.train, keep=0).squared_norms().sqrt().mean())
    if not (away <= eps**0.5 * size and slope <= eps**0.5 * one):
        cure = ("start must be a copy of the weights before the run: copy.deepcopy(model.state_dict()); and the steps "
                "larger than rounding: in float64?" if given else
                "give fit(task, start) the weights before the run; without them the model must be at a minimum")
        raise ValueError(f"expected a minimum, or a run that goes from the start to the task's model; got a start at "
                         f"the model, |gradient| {slope:.2g} where that of one example is {one:.2g}, and an end that "
                         f"differs by up to {away:.2g} after {steps} steps: {cure}")
    return {"gradient norm": slope}
