"""A large symmetric matrix known by a few of its products: Ritz pairs from a Krylov space, and a low-rank sketch.

`Subspace` and `Sketch` are solvers, as those in `solve`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .solve import Eigen, signs


def ritz(matvec: Callable, like: Tensor, iterations: int, seed: int = 0) -> Eigen:
    """Ritz pairs of a symmetric matrix from a Krylov space, every vector orthogonalised against all before it.

    Args:
        matvec: V [p, 1] -> C V.
        like: a vector [p] of the type and on the device wanted.
        iterations: products to take, at most p. The space starts from a random vector, and goes on from a new one
            where it has closed before, so that p iterations always find every eigenpair.

    Source: Arnoldi (1951); for a symmetric matrix Lanczos (1950), here without its short recurrence, which loses
    orthogonality.
    """
    random, k = torch.Generator().manual_seed(seed), min(iterations, len(like))
    Q, T, rounding = like.new_zeros(len(like), k), like.new_zeros(k, k), torch.finfo(like.dtype).eps
    q = torch.zeros_like(like)
    for j in range(k):
        q = beside(q, Q[:, :j])
        if q.norm() <= rounding**0.75 * T.abs().max():  # the space has closed
            q = beside(torch.randn(len(like), generator=random).to(like), Q[:, :j])
        Q[:, j] = q / q.norm()
        q = matvec(Q[:, j:j + 1])[:, 0]
        T[:j + 1, j] = Q[:, :j + 1].T @ q
    values, U = torch.linalg.eigh(T.double(), UPLO="U")
    return Eigen(values, Q.double() @ U, rounding)


def beside(q: Tensor, Q: Tensor) -> Tensor:
    """q [p] without its part in the orthonormal columns of Q, taken off twice against rounding."""
    for _ in range(2):
        q = q - Q @ (Q.T @ q)
    return q


@dataclass(eq=False)
class Subspace:
    """The inverse in the span of the `rank` Ritz pairs of largest magnitude, and 0 outside it."""

    pairs: Eigen
    rank: int

    def solve(self, B: Tensor, damping: float = 0.0) -> Tensor:
        """X [p, m] in the span of the pairs kept, null ones left out."""
        top = self.pairs.values.abs().topk(min(self.rank, len(self.pairs.values))).indices
        kept = Eigen(self.pairs.values[top], self.pairs.vectors[:, top], self.pairs.rounding)
        return kept.inverse_times(B, damping)

    def facts(self, damping: float) -> dict:
        """The smallest of all Ritz values, plus damping: where it is negative, so is an eigenvalue."""
        return {"rank": self.rank, **signs(self.pairs, damping)}


@dataclass(eq=False)
class Sketch:
    """C = D + M with D a known diagonal and M ~ F F^T of low rank, from one product of M with a random block:

        Y = M Omega,   F = Y (Omega^T Y)^(-1/2),   so that F F^T = Y (Omega^T Y)^+ Y^T <= M

    The inverse of D + damping + F F^T is Woodbury's. D is the regulariser, so that M is the part that data make, of
    rank n (c - 1) at most: a sketch of that rank is exact.

    Source: Nystroem approximation, Gittens & Mahoney (2016); Tropp et al. (2017), algorithm 3; Frangella, Tropp &
    Udell (2023), algorithm 2.1. In place of their small shift, directions of Omega^T Y that are zero to rounding are
    dropped.
    """

    F: Tensor         # [p, rank]
    diagonal: Tensor  # [p]
    inner: dict = field(default_factory=dict)

    @classmethod
    def of(cls, matrix, diagonal: Tensor, rank: int, seed: int = 0) -> "Sketch":
        """Sketch `matrix` - diagonal with `rank` random columns, at most p.

        Raises:
            ValueError: it has a negative direction.
        """
        Omega = torch.randn(len(diagonal), min(rank, len(diagonal)), generator=torch.Generator().manual_seed(seed))
        Omega = torch.linalg.qr(Omega.to(diagonal))[0]
        Y = matrix @ Omega - diagonal[:, None] * Omega
        core = (Omega.T @ Y).double()
        values, U = torch.linalg.eigh((core + core.T) / 2)
        zero = len(values) * torch.finfo(diagonal.dtype).eps * values.abs().max()
        if values[0] < -zero:
            raise ValueError(f"a Nystroem sketch needs a curvature that is positive semidefinite without its "
                             f"regulariser, got {values[0]:.3g} along a direction: use curvature=GGN")
        return cls(Y.double() @ (U[:, values > zero] / values[values > zero].sqrt()), diagonal.double())

    def solve(self, B: Tensor, damping: float = 0.0) -> Tensor:
        """(D + damping + F F^T)^-1 B for B [p, m].

        Raises:
            ValueError: D + damping is not positive.
        """
        E = self.diagonal + damping
        if not E.min() > 0:
            rule = ", or None for the rule of thumb" if self.F.shape[1] else ": the data make no curvature here"
            raise ValueError(f"a Nystroem solve of rank {self.F.shape[1]} of {len(E)} needs damping > 0 where "
                             f"parameters have no l2, got {damping:g}: set damping{rule}")
        if damping not in self.inner:
            self.inner[damping] = torch.linalg.cholesky(
                torch.eye(self.F.shape[1]).to(E) + self.F.T @ (self.F / E[:, None]))
        scaled = B.double() / E[:, None]
        inside = torch.cholesky_solve(self.F.T @ scaled, self.inner[damping])
        return (scaled - self.F @ inside / E[:, None]).to(B)

    def facts(self, damping: float) -> dict:
        """The rank, and the smallest eigenvalue sketched: what lies below it is treated as zero."""
        return {"rank": self.F.shape[1], "smallest eigenvalue sketched": float(torch.linalg.eigvalsh(
            self.F.T @ self.F)[0]) if self.F.shape[1] else 0.0}
