"""Influence from a few products with the curvature: a series, a Krylov space, a sketch.

What a score is, its sign and its unit: see `removal`. The certificate's residual says how much of each test point's
system was solved.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..curvature import GGN
from ..parameters import penalty, theta
from ..removal import begin, removal_scores, self_influence
from ..scores import Scores
from ..sketch import Sketch, Subspace, ritz
from ..solve import MARGIN, Eigen, Neumann
from ..task import Split, Task

LOOK = 20  # products for the extreme eigenvalues


def curved(pairs: Eigen, damping: float) -> Eigen:
    """The (Ritz) pairs, refused where all values are 0 and no damping comes on top."""
    if not damping and not pairs.values.any():
        raise ValueError("the curvature is 0 along every direction, as for a model that is sure of every label, and so "
                         "is the damping: set damping > 0, or train with l2 > 0")
    return pairs


@dataclass
class LiSSA:
    """Influence by the Neumann series of the inverse curvature, over random batches of the training set.

    Cost: fit, 20 products with the curvature and, by batches, as many with every batch; scores, `curvature products`
    passes over the training set for all test points together (see the certificate).

    Args:
        damping: added to the curvature of R; None for a tenth of the GGN's mean eigenvalue. The series takes some
            (largest eigenvalue) / (smallest eigenvalue + damping) steps.
        curvature: GGN; or Hessian, where it has no negative eigenvalue.
        batch_size: examples of one step's curvature. The set is cut into such parts once, at random.
        tol: relative residual at which it stops.
        passes: over the training set, after which it stops in any case; the certificate shows the residual reached.
        scale: above the largest eigenvalue of any part; None for 1.1 times the largest that 20 Lanczos steps find.
        seed: of the parts and of the order in which they are drawn.

    Departures: every pass starts anew from the true residual of the passes before it, so that the noise of sampling
    shrinks with the residual. The published recursion keeps its noise and averages repeated runs.

    Raises:
        ValueError: (fit) curvature and damping are 0; (scores) the series diverges: an eigenvalue is negative, or the
            scale too small.

    Source: Agarwal, Bullins & Hazan (2017); Koh & Liang (2017), section 3; restarts from the full residual as in
    Johnson & Zhang (2013).
    """

    damping: float | None = 0.0
    curvature: Callable = GGN
    batch_size: int = 100
    tol: float = 1e-3
    passes: int = 200
    scale: float | None = None
    seed: int = 0

    def fit(self, task: Task) -> "LiSSA":
        """Cut the training set into parts, and find the largest eigenvalue of each."""
        begin(self, task)
        n, like = len(task.train), theta(task)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed)).split(self.batch_size)
        whole = curved(ritz(self.curvature_.__matmul__, like, LOOK, self.seed), self.damping_)
        parts = [self.curvature(replace(task, train=task.train.take(rows))) for rows in order] \
            if len(order) > 1 else [self.curvature_]
        for part in parts:  # together they keep no more than the whole would
            if hasattr(part, "rows"):
                part.rows.keeps = self.curvature_.rows.keeps
        scale = self.scale
        if scale is None:
            of_parts = [ritz(C.__matmul__, like, LOOK, self.seed) for C in parts] if len(parts) > 1 else [whole]
            scale = MARGIN * max(float(pairs.values[-1]) for pairs in of_parts)
        sizes = torch.tensor([float(len(rows)) for rows in order])
        self.solver_ = Neumann(self.curvature_, parts, sizes, whole, scale, self.tol, self.passes, self.seed)
        return self

    def scores(self, split: Split | None = None) -> Scores:
        """Scores [n_test, n_train] of the task's test points, or of `split`."""
        return removal_scores(self, split)

    def self_influence(self) -> Tensor:
        """The rise [n_train] of each training example's own loss on its removal."""
        return self_influence(self)


@dataclass
class Arnoldi:
    """Influence in the span of the curvature's largest eigenvectors, found in one Krylov space; outside it, none.

    A gradient's part outside the span is lost, and its scores with it: small eigenvalues, which the inverse weighs
    most, come last. Exact where `rank` and `iterations` reach the number of parameters p.

    Cost: fit, `iterations` products with the curvature, one after another, and iterations x p numbers of memory;
    scores, none.

    Args:
        damping, curvature: as for `Influence`. The span has done what damping does elsewhere, so 0 as published.
        rank: eigenpairs of largest magnitude that are kept.
        iterations: size of the Krylov space.
        seed: of its first vector.

    Raises:
        ValueError: (fit) curvature and damping are 0.

    Source: Schioppa et al. (2022), algorithm 1.
    """

    damping: float | None = 0.0
    curvature: Callable = GGN
    rank: int = 100
    iterations: int = 200
    seed: int = 0

    def fit(self, task: Task) -> "Arnoldi":
        """Build the Krylov space and keep its Ritz pairs."""
        begin(self, task)
        pairs = ritz(self.curvature_.__matmul__, theta(task), self.iterations, self.seed)
        self.solver_ = Subspace(curved(pairs, self.damping_), self.rank)
        return self

    def scores(self, split: Split | None = None) -> Scores:
        """Scores [n_test, n_train] of the task's test points, or of `split`."""
        return removal_scores(self, split)

    def self_influence(self) -> Tensor:
        """The rise [n_train] of each training example's own loss on its removal."""
        return self_influence(self)


@dataclass
class Nystroem:
    """Influence with a randomised low-rank sketch of the curvature that the data make, and the regulariser kept exact.

    Exact where `rank` reaches that of the data's curvature: p, or n_train (c - 1) where that is less; in float32 take
    a few more, for a random square matrix is nearly singular. As a preconditioner: `CG(precondition=Nystroem())`.

    Cost: fit, one product with `rank` columns and rank x p numbers of memory; scores, p x rank multiplications a point.

    Args:
        damping: added to the curvature of R, and above 0 where parameters have no l2, unless `rank` reaches p; None
            for a tenth of the GGN's mean eigenvalue.
        curvature: GGN; or Hessian, where it is positive semidefinite without its regulariser.
        rank: columns of the sketch. What lies below `smallest eigenvalue sketched` (see the certificate) is taken for
            zero: harmless while that is well below the damping.
        seed: of the random columns.

    Raises:
        ValueError: (fit) the sketch met a negative direction, which a small one may miss; no damping where it is
            needed (at full rank in fit, else in scores).

    Source: Frangella, Tropp & Udell (2023); for influence, Hataya & Yamada (2023).
    """

    damping: float | None = 0.0
    curvature: Callable = GGN
    rank: int = 100
    seed: int = 0

    def fit(self, task: Task) -> "Nystroem":
        """Sketch the curvature; at full rank there is nothing to save, and it is decomposed as it is."""
        begin(self, task)
        whole = self.rank >= len(theta(task))
        self.solver_ = curved(Eigen.of(self.curvature_.dense()), self.damping_) if whole else Sketch.of(
            self.curvature_, penalty(task), self.rank, self.seed)
        return self

    def scores(self, split: Split | None = None) -> Scores:
        """Scores [n_test, n_train] of the task's test points, or of `split`."""
        return removal_scores(self, split)

    def self_influence(self) -> Tensor:
        """The rise [n_train] of each training example's own loss on its removal."""
        return self_influence(self)
