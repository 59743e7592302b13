"""Solves with a symmetric matrix: each returns X and the true relative residual of each column."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class Eigen:
    """H = Q diag(values) Q^T, for exact solves at any damping.

    Directions whose eigenvalue is zero to rounding are called null. They are left out of a solve (pseudo-inverse),
    which is exact for right-hand sides without a part in them: adding a constant to all output biases of a softmax
    is one.
    """

    values: Tensor     # [p] ascending
    vectors: Tensor    # [p, p]
    rounding: float    # of the arithmetic that made H

    @classmethod
    def of(cls, H: Tensor) -> "Eigen":
        """Decompose a symmetric matrix [p, p], in float64."""
        return cls(*torch.linalg.eigh(H.double()), torch.finfo(H.dtype).eps)

    def null(self, damping: float = 0.0) -> Tensor:
        """Which directions [p] are null: |eigenvalue + damping| within sqrt(p) x rounding of the largest."""
        shifted = self.values + damping
        return shifted.abs() <= len(shifted) ** 0.5 * self.rounding * shifted.abs().max()

    def solve(self, B: Tensor, damping: float = 0.0) -> Tensor:
        """(H + damping I)^+ B for B [p, m].

        Raises:
            ValueError: a column of B has a part in a null direction, so that no solution exists.
        """
        null = self.null(damping)
        lost = (self.vectors[:, null].T @ B.double()).norm(dim=0) / B.double().norm(dim=0).clamp(min=1e-300)
        if null.any() and lost.max() > 1e-4:
            raise ValueError(f"the curvature is singular in {int(null.sum())} of {len(null)} directions that the "
                             f"gradients need (share {lost.max():.2g}): set damping > 0, or train with l2 > 0")
        return self.inverse_times(B, damping)

    def inverse_times(self, B: Tensor, damping: float = 0.0) -> Tensor:
        """`solve` without its check, for a preconditioner."""
        null = self.null(damping)
        inverse = torch.where(null, 0.0, 1 / torch.where(null, 1.0, self.values + damping))
        return (self.vectors @ (inverse[:, None] * (self.vectors.T @ B.double()))).to(B)


def cg(matvec: Callable, B: Tensor, tol: float = 1e-6, max_iterations: int = 1000,
       precondition: Callable | None = None):
    """Conjugate gradients on all columns at once; each column has its own step and stops by itself.

    Args:
        matvec: V [p, k] -> A V, A symmetric positive definite.
        B: Tensor [p, m].
        tol: stop a column at |A x - b| <= tol |b|.
        precondition: R [p, k] -> M^-1 R with M symmetric positive definite; None for none.

    Returns:
        X [p, m], the true relative residual [m] (recomputed, not the recurrence's), the number of products with A.

    Raises:
        ValueError: a direction of negative curvature was met: A is not positive definite.

    Source: Hestenes & Stiefel (1952).
    """
    precondition = precondition or (lambda R: R)
    size = B.norm(dim=0).clamp(min=torch.finfo(B.dtype).tiny)
    X, R = torch.zeros_like(B), B.clone()
    Z = precondition(R)
    P, rz, products = Z.clone(), (R * Z).sum(0), 0
    for _ in range(max_iterations):
        live = (R.norm(dim=0) > tol * size) & (rz > 0)  # rz = 0: R lies where M^-1 is null
        if not live.any():
            break
        A_P, products = matvec(P[:, live]), products + 1
        curvature = (P[:, live] * A_P).sum(0)
        if (curvature <= 0).any():
            worst = (curvature / P[:, live].square().sum(0)).min()
            raise ValueError(f"conjugate gradients met curvature {worst:.3g} along a direction: the matrix is not "
                             f"positive definite; raise damping by at least {max(0.0, -float(worst)):.3g}, or use "
                             "curvature=GGN")
        step = rz[live] / curvature
        X[:, live] += step * P[:, live]
        R[:, live] -= step * A_P
        Z = precondition(R[:, live])
        new = (R[:, live] * Z).sum(0)
        P[:, live] = Z + (new / rz[live]) * P[:, live]
        rz[live] = new
    return X, (matvec(X) - B).norm(dim=0) / size, products + 1
