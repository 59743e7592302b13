"""Solvers for (C + damping I) X = B, with C a symmetric matrix that is dense or known by its products C @ V.

Each has `solve(B [p, m], damping) -> X [p, m]` and `facts(damping)`, what a certificate should say of the solve. Those
that know C only in part, by its largest eigenvectors or by a low-rank sketch, are in `sketch`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import scipy.linalg
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
            least = len(null) ** 0.5 * self.rounding * float(self.values.abs().max())
            raise ValueError(f"the curvature is singular in {int(null.sum())} of {len(null)} directions that the "
                             f"gradients need (share {lost.max():.2g}): set damping > {least:.2g}, or train with "
                             "l2 > 0")
        return self.inverse_times(B, damping)

    def facts(self, damping: float) -> dict:
        """The smallest eigenvalue of the damped matrix off its null directions, and how many those are."""
        null = self.null(damping)
        smallest = float((self.values + damping)[~null].min()) if not null.all() else 0.0
        return {"smallest eigenvalue": smallest, "indefinite": smallest < 0, "null directions": int(null.sum())}

    def inverse_times(self, B: Tensor, damping: float = 0.0) -> Tensor:
        """`solve` without its check, for a preconditioner."""
        null = self.null(damping)
        inverse = torch.where(null, 0.0, 1 / torch.where(null, 1.0, self.values + damping))
        return (self.vectors @ (inverse[:, None] * (self.vectors.T @ B.double()))).to(B)


class Solution(NamedTuple):
    """X [p, m], the products with A that it took, and the smallest curvature d^T A d of a unit direction met."""

    X: Tensor
    products: int
    smallest: float


def cg(matvec: Callable, B: Tensor, tol: float = 1e-6, max_iterations: int = 1000,
       precondition: Callable | None = None) -> Solution:
    """Block conjugate gradients: every column is solved in the search space of all of them.

    Args:
        matvec: V [p, k] -> A V, A symmetric positive definite.
        B: Tensor [p, m].
        tol: a column is done at |A x - b| <= tol |b|, by the recurrence.
        precondition: R [p, k] -> M^-1 R with M symmetric positive definite; None for none.

    Raises:
        ValueError: a direction of negative curvature was met; or the whole space was searched, and a column is further
            from b than X = 0.

    Source: O'Leary (1980); directions orthogonalised and dependent ones dropped as in Ji & Li (2017).
    """
    precondition = precondition or (lambda R: R)
    size = B.norm(dim=0).clamp(min=torch.finfo(B.dtype).tiny)
    X, R, products, smallest = torch.zeros_like(B), B.clone(), 0, float("inf")
    P = orthonormal(precondition(R[:, R.norm(dim=0) > tol * size]))
    while products < max_iterations and P.shape[1]:
        A_P, products = matvec(P), products + 1
        curvatures, U = torch.linalg.eigh((P.T @ A_P + A_P.T @ P).double() / 2)            # conjugate directions
        flat, smallest = torch.finfo(B.dtype).eps * curvatures.abs().max(), min(smallest, float(curvatures[0]))
        if curvatures[0] < -flat:
            raise ValueError(f"conjugate gradients met curvature {smallest:.3g} along a direction: the matrix is not "
                             f"positive definite; raise damping by at least {-smallest:.3g}, or use curvature=GGN")
        U = (U[:, curvatures > flat] / curvatures[curvatures > flat].sqrt()).to(B)
        P, A_P = P @ U, A_P @ U                                                            # P^T A P = I
        step = P.T @ R
        X += P @ step
        R -= A_P @ step
        Z = precondition(R[:, R.norm(dim=0) > tol * size])
        P = orthonormal(Z - P @ (A_P.T @ Z))
    if products * B.shape[1] >= len(B) and (worst := float((R.norm(dim=0) / size).max())) > 1:
        raise ValueError(f"expected conjugate gradients to bring the residual down, got {worst:.2g} times |b| after "
                         f"{products} products: the matrix is singular, or nearly so, along b; more damping")
    return Solution(X, products, smallest)


def orthonormal(V: Tensor) -> Tensor:
    """An orthonormal basis [p, r] of the columns of V [p, k], r < k where some of them depend on others.

    V = Q R, and the small R decomposed again with pivoting: without it a dependent column would leave an arbitrary
    direction in Q, and columns after it a part along that.
    """
    size = V.norm(dim=0)
    Q, R = torch.linalg.qr(V[:, size > 0] / size[size > 0])
    if not R.numel():
        return Q
    turn, pivots, _ = scipy.linalg.qr(R.double().cpu().numpy(), pivoting=True)
    independent = torch.from_numpy(abs(pivots.diagonal()) > 100 * torch.finfo(V.dtype).eps)
    return Q @ torch.from_numpy(turn)[:, independent].to(V)


def refine(matvec: Callable, B: Tensor, precondition: Callable, steps: int) -> Tensor:
    """`steps` of preconditioned conjugate gradients, each column for itself: no column's X depends on the others.

    Source: Hestenes & Stiefel (1952).
    """
    tiny = torch.finfo(B.dtype).tiny
    X, R, P = torch.zeros_like(B), B, precondition(B)
    rz = (R * P).sum(0)
    for _ in range(steps):
        A_P = matvec(P)
        step = rz / (P * A_P).sum(0).clamp(min=tiny)
        X, R = X + step * P, R - step * A_P
        Z, old = precondition(R), rz
        rz = (R * Z).sum(0)
        P = Z + rz / old.clamp(min=tiny) * P
    return X


@dataclass(eq=False)
class Iterated:
    """A near and cheap solver, followed by `steps` of conjugate gradients on the matrix itself."""

    matrix: object
    near: object
    steps: int

    def solve(self, B: Tensor, damping: float = 0.0) -> Tensor:
        """X [p, m], one product with the matrix a step for all columns."""
        return refine(lambda V: self.matrix @ V + damping * V, B, lambda R: self.near.solve(R, damping), self.steps)

    def facts(self, damping: float) -> dict:
        """How many products with the matrix a solve takes."""
        return {"curvature products": self.steps}


@dataclass(eq=False)
class ConjugateGradients:
    """Block conjugate gradients as a solver; `preconditioner` is another solver, for example a Nystroem sketch."""

    matrix: object
    tol: float = 1e-5
    max_iterations: int = 500
    preconditioner: object = None
    found: dict = field(default_factory=dict)

    def solve(self, B: Tensor, damping: float = 0.0) -> Tensor:
        """X [p, m] for all columns together."""
        inner = self.preconditioner
        solution = cg(lambda V: self.matrix @ V + damping * V, B, self.tol, self.max_iterations,
                      None if inner is None else lambda R: inner.solve(R, damping))
        self.found[damping] = {"curvature products": solution.products, "smallest curvature met": solution.smallest}
        return solution.X

    def facts(self, damping: float) -> dict:
        """Of the last solve at this damping."""
        return self.found.get(damping, {})


def signs(pairs: Eigen, damping: float) -> dict:
    """What Ritz values tell of definiteness; they lie between the smallest and the largest eigenvalue."""
    found = pairs.facts(damping)
    return {"smallest Ritz value": found["smallest eigenvalue"], "indefinite": found["indefinite"]}


MARGIN = 1.1  # the series is scaled with this times the largest Ritz value, which may lie below the largest eigenvalue
GROWTH = 4    # of the residual over its least so far, at which the series counts as diverging


@dataclass(eq=False)
class Neumann:
    """The series (C + damping)^-1 = (1/s) sum_t (1 - (C + damping)/s)^t, each factor with a random part C_k of C.

    One step is X <- X + (R - (C_k + damping) X) / s. It converges where no eigenvalue is negative and s is above the
    largest.

    Args:
        matrix: C; its true residual starts every pass.
        parts: matrices C_k of disjoint batches, or [C] for steps without noise.
        sizes: Tensor [K] of examples in each; parts are drawn in proportion, so that their mean is C.
        pairs: a few Ritz pairs of C.
        scale: s, before damping.
    """

    matrix: object
    parts: list
    sizes: Tensor
    pairs: Eigen
    scale: float
    tol: float
    passes: int
    seed: int = 0
    found: dict = field(default_factory=dict)

    def solve(self, B: Tensor, damping: float = 0.0) -> Tensor:
        """X [p, m], every pass over the parts begun anew from the residual that the passes before it left.

        Raises:
            ValueError: C + damping has a negative eigenvalue, or the residual grows.
        """
        if (smallest := signs(self.pairs, damping))["indefinite"]:
            raise ValueError(f"the Neumann series diverges where an eigenvalue is negative, got "
                             f"{smallest['smallest Ritz value']:.3g}: more damping, or curvature=GGN")
        random, X, least = torch.Generator().manual_seed(self.seed), torch.zeros_like(B), float("inf")
        size = B.norm(dim=0).clamp(min=torch.finfo(B.dtype).tiny)
        for n in range(self.passes + 1):
            R = B - self.matrix @ X - damping * X if n else B
            residual = float((R.norm(dim=0) / size).max())
            if residual <= self.tol or n == self.passes:
                break
            if not residual <= GROWTH * least:
                raise ValueError(f"the Neumann series diverges: by pass {n} its residual grew from {least:.2g} "
                                 f"to {residual:.2g}, with scale {self.scale:.3g}: scale=None, or more damping")
            least = min(least, residual)
            X = X + self.swept(R, damping, random)
        self.found[damping] = {"curvature products": n * min(2, len(self.parts))}
        return X

    def swept(self, R: Tensor, damping: float, random: torch.Generator) -> Tensor:
        """As many terms of the series for R as there are parts; the first takes no product."""
        s = self.scale + damping
        X = R / s
        for k in torch.multinomial(self.sizes, len(self.parts), replacement=True, generator=random)[1:].tolist():
            X = X + (R - self.parts[k] @ X - damping * X) / s
        return X

    def facts(self, damping: float) -> dict:
        """Of the last solve at this damping; a pass counts two products: of the parts, and for the residual."""
        return {**self.found.get(damping, {}), "scale": self.scale, **signs(self.pairs, damping)}
