"""Minimising the risk to a certified stationary point: quasi-Newton steps in the metric of its own curvature.

A step is theta <- theta - a B^-1 grad R. B starts as Q |values| Q^T + |grad R| I of a Hessian, so that steps lead away
from a saddle (Dauphin et al. 2014, "saddle-free Newton") and are short where the gradient is large (Li et al. 2004),
and learns from every step by the updates of L-BFGS (Nocedal & Wright 2006, algorithm 7.4). One step costs one pass over
the training set.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .curvature import Hessian
from .gradients import batches
from .parameters import parameters, penalty, pieces, theta, unflatten, weights
from .removal import refuse_bad_losses
from .solve import Eigen
from .task import Task, as_found


@dataclass
class Convergence:
    """Where `converge` stopped, and what certifies it.

    Attributes:
        risk: R(theta; w), in the loss's unit.
        gradient_norm: |grad R|.
        decrement: sqrt(grad^T H^-1 grad), the length of the Newton step that is left, in the metric of H; estimated
            from the steps taken where no Hessian certifies the end. The effect of a removal is measured well where its
            own, sqrt(g_j^T H^-1 g_j) / n, is far larger.
        turned: whether the path met negative curvature, or a step that had to be shortened. From a base it may then
            have left the basin of where it began.
        smallest_eigenvalue: of the Hessian here, off its null directions; None where it was not computed: with a base,
            in float32, or with certify=False. Then |grad| alone is certified.
        null: the null directions in words: which parameters they move.
        steps, passes: quasi-Newton steps, and the passes over the training set that they took.
        eigen: the decomposition of the Hessian here, the base for retraining nearby; None as above.
    """

    risk: float
    gradient_norm: float
    decrement: float
    turned: bool
    smallest_eigenvalue: float | None
    null: list[str]
    steps: int
    passes: int
    eigen: Eigen | None = field(repr=False, default=None)


def converge(task: Task, w: Tensor | None = None, tol: float = 1e-10, max_steps: int = 500, base: Eigen | None = None,
             curvature: Callable = Hessian, certify: bool = True, watch: Callable | None = None) -> Convergence:
    """Bring `task.model`, in place, to a minimum of R(theta; w), and certify it.

    Steps are taken in the metric of a dense curvature matrix, which is computed anew after every REFRESH of them.
    Where a stationary point turns out to be a saddle, the search goes on along its most negative curvature.

    Args:
        w: Tensor [n] of training weights; None for all 1.
        tol: stop at |gradient| <= tol.
        max_steps: quasi-Newton steps in all.
        base: decomposition of the Hessian at a nearby minimum. No dense matrix is then formed, and none certifies the
            end: the cheap way to retrain with one example less.
        curvature: (task, w) -> what the metric is made from; GGN is the cheaper one, far from the minimum.
        certify: whether to decompose the Hessian at the end, which for a few thousand parameters takes a while; False
            takes any stationary point, and float32 certifies nothing.
        watch: watch(point) is called after every step, with a `Point`.

    Cost: a pass over the training set a step; a dense Hessian (p products) every REFRESH steps and one at the end.

    Raises:
        TypeError: the model is not float64, which tol < 1e-4 needs.
        ValueError: w or base have another shape; a training loss is not finite; tol is not reached in max_steps, or is
            below rounding; or there is no minimum: the risk is flat where its gradient vanishes.
    """
    if theta(task).dtype != torch.float64 and tol < 1e-4:
        raise TypeError(f"converge to {tol:g} needs float64, got {theta(task).dtype}: use task.to(torch.float64)")
    if base is not None and len(base.values) != len(theta(task)):
        raise ValueError(f"base must decompose the Hessian of these {len(theta(task))} parameters, got one of "
                         f"{len(base.values)}")
    certify = certify and base is None and theta(task).dtype == torch.float64
    noise, w = 10 * torch.finfo(theta(task).dtype).eps, weights(task, w)
    evaluate, left, passes, turned, eigen = partial(risk_and_slope, task, w=w), max_steps, 0, False, base
    while True:
        start = theta(task).double()
        value, slope = evaluate(start)
        if not torch.isfinite(slope).all():
            refuse_bad_losses(task)
        metric = absolute(eigen or Eigen.of(curvature(task, w).dense()),
                          DAMPING * float(slope.norm()) if base is None else 0.0)
        most = left if base is not None else min(left, REFRESH)
        for point in descend(evaluate, start, metric.inverse_times, (value, slope), noise):
            if watch is not None:
                watch(point)
            if point.slope.norm() <= tol or point.steps == most:
                break
        move(task, point.theta)
        left, passes, turned, eigen = left - point.steps, passes + 1 + point.passes, turned or point.turned, None
        if point.slope.norm() > tol:
            again = base is None and left > 0 and (point.steps == most or point.slope.norm() < slope.norm() / 2)
            if not again:
                cure = "start nearer (train first), or raise l2 or max_steps" if left == 0 else \
                    "no step lowers the risk beyond its rounding: raise tol, or l2"
                raise ValueError(f"expected |gradient| <= {tol:g} after {max_steps - left} steps, got "
                                 f"{point.slope.norm():.3g}: {cure}")
            continue
        found = Convergence(point.value, float(point.slope.norm()), point.decrement, turned, None, [], max_steps - left,
                            passes)
        if not certify:
            return found
        eigen = Eigen.of(Hessian(task, w).dense())
        found.smallest_eigenvalue = eigen.facts(0.0)["smallest eigenvalue"]
        if found.smallest_eigenvalue > 0:
            inverse = eigen.inverse_times(point.slope[:, None])[:, 0]
            found.decrement, found.eigen = max(0.0, float(point.slope @ inverse)) ** 0.5, eigen
            found.null = null_directions(task, eigen)
            return found
        move(task, point.theta + along_negative_curvature(task, evaluate, point, eigen))
        eigen = None


REFRESH = 100  # quasi-Newton steps, after which the metric is computed anew
DAMPING = 0.1  # of the metric, as a share of |gradient|
MEMORY = 100   # steps that the metric learns from
IDLE = 10      # steps within rounding, one after the other, that end a descent


class Point(NamedTuple):
    """One step of a descent.

    Attributes:
        theta, value, slope: where it is, Tensor [p]; what is minimised, there; and its gradient [p].
        step: Tensor [p], the quasi-Newton step from here, not yet taken.
        steps, passes: taken so far, and evaluations so far.
        turned: whether the path met negative curvature, or a step that had to be shortened, by more than rounding.
    """

    theta: Tensor
    value: float
    slope: Tensor
    step: Tensor
    steps: int
    passes: int
    turned: bool

    @property
    def decrement(self) -> float:
        """The length of the step that is left, in the metric of the curvature: sqrt(-slope^T step)."""
        return max(0.0, -float(self.slope @ self.step)) ** 0.5


def descend(evaluate: Callable, start: Tensor, inverse: Callable, at_start: tuple | None = None,
            noise: float = 1e-15, pairs: deque | None = None) -> Iterator[Point]:
    """`start` and the points of a quasi-Newton descent from it, each one pass further (or more, where a step was too
    long).

    It ends where no step along the direction lowers the value beyond its rounding, or the last few did not bring the
    slope down either.

    Args:
        evaluate: theta [p] -> (value, slope [p]), one pass.
        inverse: R [p, k] -> B^-1 R, the positive definite start of the inverse curvature.
        at_start: (value, slope) at the start, where they are known.
        noise: relative rounding of the value. Below it a step counts as good where the slope along it has shrunk.
        pairs: what an earlier descent learned nearby, (step, change of slope) each; new pairs are added.

    Source: Nocedal & Wright (2006), algorithm 7.4; judging by the slope where values are rounded, after Hager & Zhang
    (2005), section 4.
    """
    pairs = deque(maxlen=MEMORY) if pairs is None else pairs
    here, passes, steps, turned, idle = start, int(at_start is None), 0, False, 0
    value, slope = at_start or evaluate(start)
    least = slope.norm()
    while idle < IDLE:
        d = -inverse_times(pairs, inverse, slope)
        yield Point(here, value, slope, d, steps, passes, turned)
        fall, length, level = float(slope @ d), 1.0, noise * abs(value)
        for _ in range(20):
            new, new_slope = evaluate(here + length * d)
            passes += 1
            if new <= value + 1e-4 * length * fall:
                break
            if new <= value + level and abs(float(new_slope @ d)) <= 0.9 * abs(fall):
                break
            turned = turned or not new <= value + level
            bend = 2 * (new - value - length * fall)             # the minimum of the parabola through both values
            shorter = -fall * length**2 / bend if bend > 0 else 0.0
            length = min(max(shorter, 0.1 * length), 0.5 * length)
        else:
            return
        s, y = length * d, new_slope - slope
        if s @ y > 1e-10 * s.norm() * y.norm():
            pairs.append((s, y))
        else:
            turned = turned or -fall > level
        idle = 0 if new < value - level or new_slope.norm() < 0.9 * least else idle + 1
        here, value, slope, steps, least = here + s, new, new_slope, steps + 1, min(least, new_slope.norm())


def inverse_times(pairs, inverse: Callable, r: Tensor) -> Tensor:
    """B^-1 r [p] with the L-BFGS updates of (step, change of slope) pairs on top of a base inverse."""
    r, shares = r.clone(), []
    for s, y in reversed(pairs):
        shares.append((s @ r) / (s @ y))
        r -= shares[-1] * y
    r = inverse(r[:, None])[:, 0]
    for s, y in pairs:
        r += (shares.pop() - (y @ r) / (s @ y)) * s
    return r


def absolute(eigen: Eigen, more: float = 0.0) -> Eigen:
    """The positive definite |H| + more I of a decomposition; with more > 0 no direction is null."""
    return Eigen(eigen.values.abs() + more, eigen.vectors, 0.0 if more else eigen.rounding)


def along_negative_curvature(task: Task, evaluate: Callable, point: Point, eigen: Eigen) -> Tensor:
    """A move [p] along the most negative eigenvector that lowers the value, the longest of a few."""
    u = eigen.vectors[:, 0]
    for length in (1.0, 0.3, 0.1, 0.03, 0.01, 1e-3):
        for move_by in (length * u, -length * u):
            if evaluate(point.theta + move_by)[0] < point.value:
                return move_by
    move(task, point.theta)
    raise ValueError(f"expected a minimum where the gradient vanishes, got a Hessian with eigenvalues "
                     f"{eigen.values[0]:.3g} to {eigen.values[-1]:.3g}, and no step along the lowest brings the risk "
                     "down: it is flat, or falls for ever; raise l2")


def null_directions(task: Task, eigen: Eigen) -> list[str]:
    """The null directions of the Hessian in words, for example "a constant added to linear2.bias"."""
    null = eigen.vectors[:, eigen.null()]                                                       # [p, k]
    named, found, rest = pieces(task, null), [], null
    for name, piece in named.items():
        constant = piece.sum(0) / len(piece) ** 0.5                                             # its part in null [k]
        if constant.norm() > 1 - 1e-6:
            found.append(f"a constant added to {name}")
            rest = rest - null @ constant[:, None] @ (constant[None] / constant.norm() ** 2)
    if further := null.shape[1] - len(found):
        moved = [name for name, piece in pieces(task, rest).items() if piece.square().sum() > 1e-6]
        found.append(f"{further} within " + " and ".join(moved))
    return found


def risk_and_slope(task: Task, flat: Tensor, w: Tensor | None = None, batch_size: int = 100) -> tuple[float, Tensor]:
    """R(theta; w) and its gradient [p], float64 sums over batches in the model's own precision; theta = flat is left in
    the model."""
    move(task, flat)
    named, n, w = list(parameters(task).values()), len(task.train), weights(task, w)
    ridge = penalty(task).double()
    value, slope = 0.5 * float((ridge * flat.square()).sum()), ridge * flat
    with as_found(task.model), torch.enable_grad():
        for (x, y), wb in zip(batches(task.train, batch_size), w.split(batch_size), strict=True):
            part = (wb * task.loss(task.model(x), y)).sum()
            found = torch.autograd.grad(part, named, allow_unused=True, materialize_grads=True)
            value += float(part.detach()) / n
            slope = slope + torch.cat([piece.reshape(-1) for piece in found]).double() / n
    return value, slope


def move(task: Task, flat: Tensor) -> None:
    """Write a flat parameter vector [p] into the model."""
    named = parameters(task)
    with torch.no_grad():
        for name, piece in unflatten(task, flat).items():
            named[name].copy_(piece)
