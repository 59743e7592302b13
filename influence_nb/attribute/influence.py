"""Influence functions with the curvature inverted to rounding, or to a stated residual.

What a score is, its sign and its unit: see `removal`.
"""

from collections.abc import Callable
from dataclasses import dataclass, is_dataclass, replace

from torch import Tensor

from ..curvature import GGN, Hessian
from ..kronecker import Kronecker
from ..removal import begin, removal_scores, self_influence
from ..scores import Scores
from ..sketch import Sketch
from ..solve import ConjugateGradients, Eigen
from ..task import Split, Task


@dataclass
class Influence:
    """Exact influence: the curvature as a dense matrix, decomposed once.

    Cost: fit, the dense curvature and an O(p^3) decomposition, with p^2 numbers of memory (2,616 parameters: 55 MB);
    scores, one backward pass over the test points and n_train x p multiplications each.

    Args:
        damping: added to the curvature of R; 0 is right where that is positive definite, None for a tenth of the
            GGN's mean eigenvalue.
        curvature: Hessian, or GGN where the Hessian is indefinite or too dear.

    Raises:
        ValueError: (scores) the damped curvature is singular in directions that the gradients need.

    Source: Koh & Liang (2017), eq. 2.
    """

    damping: float | None = 0.0
    curvature: Callable = Hessian

    def fit(self, task: Task) -> "Influence":
        """Compute and decompose the curvature, and keep the training gradients."""
        begin(self, task)
        self.curvature_ = self.curvature_.dense()
        self.solver_ = Eigen.of(self.curvature_)
        return self

    def scores(self, split: Split | None = None) -> Scores:
        """Scores [n_test, n_train] of the task's test points, or of `split`."""
        return removal_scores(self, split)

    def self_influence(self) -> Tensor:
        """The rise [n_train] of each training example's own loss on its removal."""
        return self_influence(self)


@dataclass
class CG:
    """Influence by conjugate gradients on all test points together: no matrix is formed.

    Cost: scores, `curvature products` passes over the training set for all test points together (see the certificate),
    and about as many again, for ten test points, at the certificate's tenfold damping.

    Args:
        damping, curvature: as for `Influence`; GGN products are never indefinite.
        tol: relative residual at which a test point's solve stops.
        max_iterations: after which it stops in any case; the certificate then shows the residual that was reached.
        precondition: an unfitted method whose inverse is cheap and near, for example `Nystroem()`; None for none.

    Raises:
        ValueError: (scores) the damped curvature has a negative direction, or is singular along a gradient.
        TypeError: (fit) `precondition` has no full inverse.

    Source: Koh & Liang (2017), section 3; Martens (2010); block form by O'Leary (1980).
    """

    damping: float | None = 0.0
    curvature: Callable = GGN
    tol: float = 1e-5
    max_iterations: int = 500
    precondition: object = None

    def fit(self, task: Task) -> "CG":
        """Keep the training gradients where they fit into memory."""
        begin(self, task)
        inner = self.precondition
        if is_dataclass(inner) and not isinstance(inner, type):
            inner = getattr(replace(inner).fit(task), "solver_", inner)
        if inner is not None and not isinstance(inner, (Eigen, Kronecker, Sketch)):
            raise TypeError(f"precondition must be a method with a full inverse, such as Nystroem() or EKFAC(), "
                            f"got {self.precondition!r}")
        self.solver_ = ConjugateGradients(self.curvature_, self.tol, self.max_iterations, inner)
        return self

    def scores(self, split: Split | None = None) -> Scores:
        """Scores [n_test, n_train] of the task's test points, or of `split`."""
        return removal_scores(self, split)

    def self_influence(self) -> Tensor:
        """The rise [n_train] of each training example's own loss on its removal."""
        return self_influence(self)
