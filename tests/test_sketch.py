import pytest
import torch
from test_solve import matrix

from influence_nb import sketch


def like(p):
    return torch.zeros(p, dtype=torch.float64)


def test_ritz_pairs_are_the_eigenpairs_once_the_space_is_whole_repeated_ones_too():
    A, Q = matrix([-1.0, 0.0, 0.0, 2.0, 2.0, 2.0, 5.0])  # one start sees one direction of each eigenspace
    pairs = sketch.ritz(A.__matmul__, like(7), 7)
    assert torch.allclose(pairs.values, torch.tensor([-1.0, 0, 0, 2, 2, 2, 5], dtype=torch.float64), atol=1e-13)
    assert torch.allclose(A @ pairs.vectors, pairs.vectors * pairs.values, atol=1e-13)
    assert torch.allclose(pairs.vectors.T @ pairs.vectors, torch.eye(7, dtype=torch.float64), atol=1e-13)


def test_a_few_products_find_the_extreme_eigenvalues_from_within():
    eigenvalues = [-3.0, *torch.linspace(0, 1, 97).tolist(), 8.0, 10.0]
    A, _ = matrix(eigenvalues)
    values = sketch.ritz(A.__matmul__, like(100), 12).values
    assert len(values) == 12 and -3 <= values[0] < -2.999 and 9.999 < values[-1] <= 10 + 1e-12
    few = sketch.ritz(A.__matmul__, like(100), 3).values
    assert -3 < few[0] and few[-1] < 9.99  # inside the spectrum: hence the margin of a Neumann series


def test_a_subspace_solve_is_exact_inside_and_zero_outside():
    A, Q = matrix([0.1, -0.2, 1.0, -4.0, 6.0])
    solver = sketch.Subspace(sketch.ritz(A.__matmul__, like(5), 5), rank=2)
    assert torch.allclose(solver.solve(Q[:, 3:] @ torch.ones(2, 1).double(), 0.5),
                          Q[:, 3:4] / -3.5 + Q[:, 4:] / 6.5, atol=1e-12)  # the largest in magnitude are -4 and 6
    assert solver.solve(Q[:, :3]).abs().max() < 1e-12
    assert solver.facts(0.0)["indefinite"] and solver.facts(0.0)["smallest Ritz value"] == pytest.approx(-4)
    assert not solver.facts(5.0)["indefinite"]


def low_rank(p=30, rank=6, seed=0):
    """A positive semidefinite matrix of rank 6, and a diagonal that is not uniform."""
    random = torch.Generator().manual_seed(seed)
    M, _ = matrix([0.0] * (p - rank) + [0.1 * 3.0**k for k in range(rank)], seed)
    return M, (torch.rand(p, generator=random, dtype=torch.float64) > 0.3).double() * 0.05


def test_a_sketch_of_the_datas_rank_is_exact_whatever_the_diagonal():
    M, D = low_rank()
    B, C = torch.randn(30, 4, dtype=torch.float64), M + torch.diag(D)
    for rank in (6, 20, 99):
        solver = sketch.Sketch.of(C, D, rank)
        assert solver.F.shape == (30, 6)
        for damping in (1e-4, 0.3):
            expected = torch.linalg.solve(C + damping * torch.eye(30), B)
            assert (solver.solve(B, damping) - expected).norm() <= 1e-6 * expected.norm()
    assert solver.facts(0.3) == {"rank": 6, "smallest eigenvalue sketched": pytest.approx(0.1)}


def test_a_smaller_sketch_lies_below_the_matrix_and_is_inverted_as_it_is():
    M, D = low_rank()
    solver = sketch.Sketch.of(M + torch.diag(D), D, 4)
    F = solver.F
    assert torch.linalg.eigvalsh(M - F @ F.T)[0] > -1e-12 and (M - F @ F.T).norm() > 0.01 * M.norm()
    B = torch.randn(30, 2, dtype=torch.float64)
    assert torch.allclose((F @ F.T + torch.diag(D + 0.1)) @ solver.solve(B, 0.1), B, atol=1e-12)


def test_a_sketch_asks_for_damping_and_for_no_negative_direction():
    M, D = low_rank()
    with pytest.raises(ValueError, match="rank 4 of 30 needs damping > 0 where parameters have no l2, got 0"):
        sketch.Sketch.of(M + torch.diag(D), D, 4).solve(torch.ones(30, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="rank 0 of 3 .*set damping: the data make no curvature here"):
        sketch.Sketch.of(torch.zeros(3, 3).double(), like(3), 2).solve(torch.ones(3, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"positive semidefinite.*use curvature=GGN"):
        sketch.Sketch.of(matrix([-5.0, 1.0, 2.0])[0], like(3), 3)
