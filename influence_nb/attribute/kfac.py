"""Influence with the curvature in Kronecker factors. What a score is, its sign and its unit: see `removal`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..curvature import GGN, LeadingGGN
from ..gradients import Gradients, rise_slopes
from ..kronecker import Kronecker, Sums
from ..parameters import theta
from ..removal import begin, certified, kept, removal_scores, spread, ten_times
from ..scores import Scores
from ..solve import Refined
from ..task import Split, Task, asked


@dataclass
class KFAC:
    """Influence with K-FAC in place of the GGN: one pass over the training set, no iteration.

    Cost: fit, two passes over the training set and an eigendecomposition of each layer's two factors; scores, about
    ten products of layer inputs and of output gradients, and no per-example gradient for a Linear layer.

    Args:
        damping: added to the curvature; None for a tenth of the GGN's mean eigenvalue.
        curvature: what the factors are taken of: LeadingGGN with one backward pass, GGN with c of them, or Fisher.

    The certificate's residual is |(G + damping) x - v| / |v| with G the curvature itself, not its factors, estimated
    for each test point from `PROBES` random vectors, to about 25 % of itself.

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
        return self.solver_.self_products(self.train_, self.damping_) / len(self.task_.train)


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
        """The rise [n_train] of each training example's own loss on its removal, by EK-FAC without refinement."""
        return self.factors_.self_products(self.train_, self.damping_) / len(self.task_.train)


PROBES = 8


def factored(method, task: Task, corrected: bool):
    """The shared `fit`: the factors K, and on random vectors (K^-1 (G + damping) - 1), how far they are from G."""
    sums = Sums(task)
    begin(method, task, see=sums.see)
    method.factors_ = method.solver_ = Kronecker(method.curvature_, corrected, sums)
    if refine := getattr(method, "refine", 0):
        method.curvature_ = GGN(task)
        method.solver_ = Refined(method.curvature_, method.factors_, refine)
        return method
    probes = torch.randn(len(theta(task)), PROBES, generator=torch.Generator().manual_seed(0)).to(theta(task))
    pushed = method.curvature_ @ probes + method.damping_ * probes
    method.error_ = method.factors_.solve(pushed, method.damping_) - probes
    return method


def factored_scores(method, split: Split | None) -> Scores:
    """Scores without forming a gradient, where the layers allow it."""
    task, split = asked(method, split)
    test, few = Gradients(task, split, rise_slopes), spread(len(split))
    again = Gradients(task, split.take(few), rise_slopes)
    kron, damping = method.factors_, method.damping_
    both = kron.products(kron.queries(test, damping) + kron.queries(again, ten_times(method)), method.train_)
    values, damped = both[:len(split)] / len(task.train), both[len(split):]
    error = (test @ method.error_)[0]                                                       # [n_test, PROBES]
    residual = error.square().mean(1).sqrt() / test.squared_norms().sqrt().clamp(min=torch.finfo(error.dtype).tiny)
    return certified(method, split, values, residual, kept(values[few], damped))
