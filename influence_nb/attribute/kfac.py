"""Influence with the curvature in Kronecker factors. What a score is, its sign and its unit: see `removal`."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..curvature import GGN, Hessian, LeadingGGN
from ..gradients import Gradients, rise_slopes
from ..kronecker import Kronecker, Sums
from ..removal import (
    begin,
    certified,
    kept,
    probe_error,
    probed_residual,
    removal_scores,
    self_influence,
    spread,
    ten_times,
)
from ..scores import Scores
from ..solve import Iterated
from ..task import Split, Task, asked


@dataclass
class KFAC:
    """Influence with K-FAC in place of the GGN: no iteration, whatever the number of test points.

    Cost: fit, one forward and two backward passes over the training set and an eigendecomposition of each layer's two
    factors; scores, about ten products of layer inputs and of output gradients, no gradient formed for a Linear layer.

    Args:
        damping: added to the curvature; None for a tenth of the GGN's mean eigenvalue.
        curvature: what the factors are taken of: LeadingGGN with one backward pass, GGN with c of them, or Fisher.

    The certificate's residual is |(C + damping) x - v| / |v| with C the `curvature` above, not its factors, estimated
    for each test point to about 25 % of itself. Where many classes are in doubt at once, LeadingGGN is far from the
    GGN, and so may the true residual be: curvature=GGN tells.

    Source: Martens & Grosse (2015); Grosse et al. (2023), section 2.3.
    """

    damping: float | None = None
    curvature: Callable = LeadingGGN

    def fit(self, task: Task) -> "KFAC":
        """Decompose the factors, and keep the training gradients' own factors."""
        return factored(self, task, corrected=False)

    def scores(self, split: Split | None = None) -> Scores:
        """Scores [n_test, n_train] of the task's test points, or of `split`."""
        return factored_scores(self, split)

    def self_influence(self) -> Tensor:
        """The rise [n_train] of each training example's own loss on its removal."""
        return factored_self_influence(self)


@dataclass
class EKFAC:
    """Influence with EK-FAC in place of the GGN, and on request refined by a few products with the GGN itself.

    Cost: as `KFAC`, and a second look at the kept gradients; each refinement is one product with the GGN for all test
    points.

    Args:
        damping, curvature: as for `KFAC`.
        refine: steps of conjugate gradients on the GGN, preconditioned by EK-FAC, for each test point by itself; 0 for
            EK-FAC alone.

    Source: George et al. (2018); Grosse et al. (2023); refinement: the idea of ASTRA, Wang et al. (2025), there with
    stochastic Neumann steps.
    """

    damping: float | None = None
    curvature: Callable = LeadingGGN
    refine: int = 0

    def fit(self, task: Task) -> "EKFAC":
        """Decompose the factors, correct the spectrum, and keep the training gradients' own factors."""
        return factored(self, task, corrected=True)

    def scores(self, split: Split | None = None) -> Scores:
        """Scores [n_test, n_train] of the task's test points, or of `split`."""
        return removal_scores(self, split) if self.refine else factored_scores(self, split)

    def self_influence(self) -> Tensor:
        """The rise [n_train] of each training example's own loss on its removal."""
        return self_influence(self) if self.refine else factored_self_influence(self)


def factored(method, task: Task, corrected: bool):
    """The shared `fit`: the factors, and how far they are from the curvature."""
    if getattr(method, "refine", 0) < 0:
        raise ValueError(f"refine must be 0 or more steps, got {method.refine}")
    if method.curvature is Hessian:
        raise TypeError("factors are taken of a GGN's rows, got curvature=Hessian: LeadingGGN, GGN or Fisher")
    sums = Sums(task)
    begin(method, task, see=sums.see)
    method.factors_ = method.solver_ = Kronecker(method.curvature_, corrected, sums)
    if refine := getattr(method, "refine", 0):
        method.curvature_ = GGN(task)
        method.solver_ = Iterated(method.curvature_, method.factors_, refine)
        return method
    method.error_ = probe_error(method, method.factors_)
    return method


def factored_scores(method, split: Split | None) -> Scores:
    """Scores without forming a gradient, where the layers allow it."""
    task, split = asked(method, split)
    test, few = Gradients(task, split, rise_slopes), spread(len(split))
    again = Gradients(task, split.take(few), rise_slopes)
    kron, damping = method.factors_, method.damping_
    both = kron.products(kron.queries(test, damping) + kron.queries(again, ten_times(method)), method.train_)
    values, damped = both[:len(split)] / len(task.train), both[len(split):]
    residual = probed_residual(method.error_, test)
    return certified(method, split, values, residual, kept(values[few], damped))


def factored_self_influence(method) -> Tensor:
    """(1/n) g_j^T (K + damping)^-1 g_j of every training example, [n_train]."""
    task, _ = asked(method, None)
    return method.factors_.self_products(method.train_, method.damping_) / len(task.train)
