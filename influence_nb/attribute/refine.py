"""Between first order and retraining: follow the removal of an example down its own risk, as far as one can pay for.

Without example j the risk is R_j(theta) = R(theta) - loss_j(theta) / n. At the trained weights its slope is known,
- grad loss_j / n, and its curvature is H - hess loss_j / n. So the first step costs no pass over the training set,

    theta_1 = theta + (H + c |g| I - G_j / n)^-1 g,      g = grad loss_j / n,   G_j = J_j^T L_j J_j, the GGN of j alone:

the step of first-order influence, rescaled by the leverage of j (Woodbury), and shorter along directions so flat that
a slope of this size leads far along them (c = CAUTION; Li et al. 2004). Every further step is a quasi-Newton step on
R_j with this start of the inverse curvature. It costs one pass: the true slope where the last step led. The test losses
are read where the next step leads, true losses and not their slopes. At the end of the path is leave-one-out.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..curvature import Hessian, output_factors
from ..gradients import Gradients
from ..newton import MEMORY, Point, descend, risk_and_slope
from ..parameters import copied, theta
from ..removal import begin, group, reading, removal_scores
from ..scores import Scores
from ..solve import Eigen
from ..task import Split, Task, asked


@dataclass
class Refined:
    """Influence that follows the path of each removal until its next step is too short to matter.

    Exact leave-one-out, in the end: `path` run until its slope vanishes stands at the minimum of R_j. Where the weights
    are no minimum (their slope is not 0, or damping is set) it is the minimum of the risk seen from them that is
    followed, R_j(theta) - slope^T (theta - theta_0) + (damping / 2) |theta - theta_0|^2, the target of damped
    first-order influence.

    Cost: fit, a dense curvature and its decomposition; scores, up to `passes` passes over the training set for each
    example in `ids`, and as many forward passes over the test points.

    Args:
        passes: most passes over the training set for one example (a step that has to be shortened takes a few more);
            0 reads the losses after the first, free step.
        tol: a path ends where its next step is this much shorter than its first, in the metric of the curvature.
        ids: training examples to follow; the scores of all others are of the first, free step. None for all.
        damping: added to the curvature of R.
        curvature: what steps are measured in: Hessian, or GGN where that is too dear; the path ends at the same place.
        progress: show a bar.
        rough: passes are made in float32, at half the cost, while the step that is left is longer than this share of
            the first, and promises a fall above the rounding of float32; 0 for float64 throughout.

    Attributes (after `scores`):
        errors_: Tensor [n_test, n_train], the error bar of each score: what the last step changed in it. It is no
            bound: of most pairs it holds the truth, and where it is large the score is not to be trusted.
            Where a path turns, a few passes tell no more than first order, and may tell less (notebook 08).
        passes_: Tensor [n_train], passes that each example took.
        turned_: Tensor [n_train] of bool, paths that met negative curvature or a step that had to be shortened, and
            may have left the basin of the trained weights.

    Raises:
        TypeError: (fit) the model is not float64: removals are followed below the rounding of float32.
        ValueError: (fit) the damped Hessian has a negative eigenvalue; `passes`, `tol` or `ids` make no sense.

    Source: the rescaled first step is a Newton step as in Rubinstein & Hopkins (2025); the path is that of L-BFGS.
    """

    passes: int = 12
    tol: float = 1e-2
    ids: list | None = None
    damping: float | None = 0.0
    curvature: Callable = Hessian
    progress: bool = True
    rough: float = 0.0

    def fit(self, task: Task) -> "Refined":
        """Decompose the curvature, and keep the training gradients."""
        if self.passes < 0 or self.rough < 0 or not self.tol > 0:
            raise ValueError("passes must be 0 or more, rough must be 0 or more and tol must be above 0, got "
                             f"{self.passes}, {self.rough} and {self.tol}")
        if theta(task).dtype != torch.float64:
            raise TypeError(f"Refined needs float64, got {theta(task).dtype}: use task.to(torch.float64)")
        n = len(task.train)
        self.followed_ = list(range(n)) if self.ids is None else group(self.ids, n).tolist()
        begin(self, task)
        self.curvature_ = self.curvature_.dense()
        self.solver_ = Eigen.of(self.curvature_)
        if (smallest := self.solver_.facts(self.damping_)["smallest eigenvalue"]) < 0:
            del self.task_  # there was no fit
            raise ValueError(f"expected trained weights at a minimum, got a Hessian with eigenvalue {smallest:.3g}: "
                             "converge(task) first, or more damping")
        self.risk_, self.slope_ = risk_and_slope(copied(task), theta(task))
        return self

    def path(self, j: int) -> Iterator[Point]:
        """The points of the removal of training example j, from the trained weights on, each a pass further."""
        task = copied(asked(self, None)[0])
        start, n, one = theta(task), len(task.train), task.train.take(group([j], len(task.train)))
        w = torch.ones(n).to(start)
        w[j] = 0

        def evaluate(task, flat):
            (value, slope), way = risk_and_slope(task, flat, w), flat - start
            pull = self.damping_ * way - self.slope_
            return value + float(way @ (pull - self.slope_)) / 2, slope + pull

        value, push = self.risk_ - float(task.losses(one)) / n, Gradients(task, one).dense()[0, 0] / n
        try:
            factors = Gradients(task, one, output_factors).dense()[:, 0] / n**0.5               # [c - 1, p]
        except ValueError:  # a loss that is not convex in the outputs has no such roots: nothing is rescaled
            factors = torch.zeros(1, len(start)).to(start)
        inverse = without(factors, self.solver_, self.damping_ + CAUTION * float(push.norm()))
        known, pairs = (value, -push), deque(maxlen=MEMORY)
        so_far = Point(start, value, -push, inverse(push[:, None])[:, 0], 0, 0, False)
        if self.rough > 0:
            least = max(self.rough * so_far.decrement, (FLOOR * abs(value)) ** 0.5)
            for so_far in descend(partial(evaluate, task.to(torch.float32)), start, inverse, known, ROUNDING, pairs):
                if so_far.decrement <= least:
                    break
                yield so_far
            known = known if so_far.passes == 0 else None
        for point in descend(partial(evaluate, task), so_far.theta, inverse, known, pairs=pairs):
            yield point._replace(steps=so_far.steps + point.steps, passes=so_far.passes + point.passes,
                                 turned=so_far.turned or point.turned)

    def orders(self, j: int, split: Split | None = None) -> Iterator[tuple[Point, Tensor]]:
        """Every point of the path of j, and the effect [n_test] of its removal as the step from there would have it,
        or, where that step is not `trusted`, as the point itself has it."""
        task, split = asked(self, split)
        before, first = reading(task, split, theta(task)), None
        for point in self.path(j):
            first = first or point
            yield point, reading(task, split, point.theta + trusted(point, first) * point.step) - before

    def scores(self, split: Split | None = None) -> Scores:
        """Scores [n_test, n_train] of the task's test points, or of `split`."""
        first = removal_scores(self, split)
        values, self.errors_ = first.values.clone(), torch.zeros_like(first.values)
        self.passes_, self.turned_ = (torch.zeros(values.shape[1], dtype=kind) for kind in (torch.long, torch.bool))
        for j in tqdm(range(values.shape[1]), desc="following removals", disable=not self.progress, leave=False):
            values[:, j], self.errors_[:, j], point = self.followed(j, split, first.values[:, j])
            self.passes_[j], self.turned_[j] = point.passes, point.turned
        facts = {"passes per followed example": float(self.passes_[self.followed_].double().mean()),
                 "largest error bar": float(self.errors_.max()), "paths that turned": int(self.turned_.sum())}
        return replace(first, values=values, certificate={**first.certificate, **facts})

    def followed(self, j: int, split: Split | None, effect: Tensor) -> tuple[Tensor, Tensor, Point]:
        """The effect [n_test] of removing j, its error bar, and the point of the path where it was read off, from the
        first-order effect on."""
        passes, first, ahead, error = self.passes if j in self.followed_ else 0, None, True, torch.zeros_like(effect)
        for point, new in self.orders(j, split):
            first, was, change = first or point, ahead, (new - effect).abs()
            ahead = trusted(point, first)
            error = torch.maximum(change, error) if was and not ahead else change  # the same place is read once more
            effect = new
            if point.passes >= passes or point.decrement <= self.tol * first.decrement:
                break
        return effect, error, point

    def self_influence(self) -> Tensor:
        """The rise [n_train] of each training example's own loss on its removal."""
        train, none = asked(self, None)[0].train, torch.zeros(1).to(self.slope_)
        return torch.cat([self.followed(j, train.take([j]), none)[0] for j in range(len(train))])


def trusted(point: Point, first: Point) -> bool:
    """Whether the step from a point of a path may be read before it is taken: none was cut, and it does not leap."""
    return not point.turned and bool(point.step.norm() <= LEAP * first.step.norm())


def without(factors: Tensor, solver: Eigen, damping: float) -> Callable:
    """R [p, k] -> (H + damping I - F^T F)^-1 R, F [m, p], by Woodbury; without F^T F where it takes all curvature.

    Source: Woodbury (1950). I - F H^-1 F^T is positive where the leverage of the example is below 1.
    """
    K = solver.inverse_times(factors.T, damping)                                                # [p, m]
    left = torch.eye(len(factors)).to(K) - factors @ K
    if torch.linalg.eigvalsh(left)[0] <= LEAST:
        return lambda R: solver.inverse_times(R, damping)
    return lambda R: solver.inverse_times(R, damping) + K @ torch.linalg.solve(left, K.T @ R)


ROUNDING = 1e-7 # relative, of a risk in float32
FLOOR = 1e-9    # fall of a risk, relative, below which slopes in float32 lead nowhere
LEAP = 3        # times the first step: longer ones mostly lead further from the end than the point itself is
CAUTION = 0.03  # damping of the metric, as a share of |grad R_j|: steps along flat directions would be far too long
LEAST = 1e-2    # curvature that must be left of an example's own directions, as a share, for the rescaled step
