import pytest
import torch

from influence_nb import sketch, solve


def matrix(eigenvalues, seed=0):
    random = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=random, dtype=torch.float64))[0]
    return Q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ Q.T, Q


def test_exact_and_cg_equal_a_direct_solve_at_any_damping():
    A, _ = matrix([0.3, 0.5, 1.0, 2.0, 7.0, 9.0])
    B = torch.randn(6, 4, dtype=torch.float64)
    for damping in (0.0, 0.2):
        expected = torch.linalg.solve(A + damping * torch.eye(6), B)
        assert torch.allclose(solve.Eigen.of(A).solve(B, damping), expected, atol=1e-12)
        X = solve.cg(lambda V, d=damping: A @ V + d * V, B, tol=1e-10).X
        assert torch.allclose(X, expected, atol=1e-8)


def test_cg_stops_after_the_products_that_it_may_take():
    A, _ = matrix([10.0**k for k in range(-3, 5)])
    B = torch.randn(8, 2, dtype=torch.float64)
    X, products, smallest = solve.cg(A.__matmul__, B, tol=1e-12, max_iterations=2)
    assert products == 2 and smallest >= 1e-3
    assert ((A @ X - B).norm(dim=0) / B.norm(dim=0)).max() > 1e-3


def test_the_columns_of_a_block_share_their_search_space():
    A, _ = matrix([10.0 ** (k / 4) for k in range(20)])
    B = torch.randn(20, 5, dtype=torch.float64)
    alone = max(solve.cg(A.__matmul__, B[:, k:k + 1], tol=1e-8).products for k in range(5))
    together = solve.cg(A.__matmul__, B, tol=1e-8)
    assert together.products <= 6 <= alone / 2
    assert torch.allclose(A @ together.X, B, atol=1e-6)


def test_a_preconditioner_saves_products_and_not_accuracy():
    A, _ = matrix([10.0 ** (k / 3) for k in range(-9, 10)])
    B = torch.randn(19, 3, dtype=torch.float64)
    X, plain, _ = solve.cg(A.__matmul__, B, tol=1e-9)
    Y, fewer, _ = solve.cg(A.__matmul__, B, tol=1e-9, precondition=solve.Eigen.of(A).inverse_times)
    assert fewer <= 3 < plain and torch.allclose(Y, torch.linalg.solve(A, B), rtol=1e-6)


def test_null_directions_are_left_out_where_nothing_lies_in_them_and_named_where_something_does():
    A, Q = matrix([0.0, 1.0, 2.0, 5.0])
    B = Q[:, 1:] @ torch.randn(3, 2, dtype=torch.float64)
    eigen = solve.Eigen.of(A)
    assert eigen.null().sum() == 1
    assert torch.allclose(eigen.solve(B), torch.linalg.pinv(A) @ B, atol=1e-12)
    with pytest.raises(ValueError, match=r"singular in 1 of 4 directions that the gradients need .*damping > 2.2e-15"):
        eigen.solve(Q[:, :1])
    assert torch.allclose(eigen.solve(Q[:, :1], damping=0.5), 2 * Q[:, :1])


def test_cg_refuses_negative_curvature():
    A, _ = matrix([-0.5, 1.0, 2.0, 5.0])
    with pytest.raises(ValueError, match="not positive definite; raise damping by at least 0"):
        solve.cg(A.__matmul__, torch.ones(4, 1, dtype=torch.float64))


def test_one_column_that_is_done_does_not_stop_the_others():
    A, Q = matrix([1.0, 3.0, 10.0, 40.0, 90.0])
    B = torch.stack([Q[:, 0], torch.ones(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)], dim=1)
    X = solve.cg(A.__matmul__, B, tol=1e-10).X
    assert torch.allclose(X, torch.linalg.solve(A, B), atol=1e-9) and (X[:, 2] == 0).all()


def neumann(A, parts=None, scale=10.0, tol=1e-8, passes=2000):
    parts = parts or [A]
    pairs = sketch.ritz(A.__matmul__, torch.zeros(len(A), dtype=torch.float64), 20)
    return solve.Neumann(A, parts, torch.ones(len(parts)), pairs, scale, tol, passes)


def test_a_neumann_series_converges_to_its_residual():
    A, _ = matrix([0.3, 0.5, 1.0, 2.0, 7.0, 9.0])
    B = torch.randn(6, 4, dtype=torch.float64)
    solver = neumann(A)
    X = solver.solve(B, 0.2)
    residual = (A @ X + 0.2 * X - B).norm(dim=0) / B.norm(dim=0)
    assert 1e-9 < residual.max() <= 1e-8
    assert 0 < solver.facts(0.2)["curvature products"] < 20 * 10 / 0.5  # log(1e8) x condition


def test_a_neumann_series_over_parts_loses_their_noise():
    random = torch.Generator().manual_seed(0)
    J = torch.randn(5, 8, 6, generator=random, dtype=torch.float64)
    parts = [rows.T @ rows / 8 for rows in J]
    A, B = sum(parts) / 5, torch.randn(6, 3, generator=random, dtype=torch.float64)
    solver = neumann(A, parts, scale=max(float(torch.linalg.eigvalsh(part)[-1]) for part in parts))
    assert torch.allclose(solver.solve(B, 0.1), torch.linalg.solve(A + 0.1 * torch.eye(6), B), atol=1e-6)
    assert torch.equal(solver.solve(B, 0.1), solver.solve(B, 0.1))


def test_a_neumann_series_stopped_early_has_the_terms_that_it_says():
    A, _ = matrix([1.0, 4.0])
    B = torch.ones(2, 1, dtype=torch.float64)
    solver = neumann(A, passes=3)
    N = torch.eye(2) - A / 10
    assert torch.allclose(solver.solve(B), (torch.eye(2) + N + N @ N) @ B / 10)
    assert solver.facts(0.0)["curvature products"] == 3


def test_a_neumann_series_that_diverges_says_why():
    A, _ = matrix([0.3, 1.0, 9.0])
    with pytest.raises(ValueError, match=r"diverges: by pass \d its residual grew .* with scale 3: scale=None"):
        neumann(A, scale=3.0).solve(torch.ones(3, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"eigenvalue is negative, got -0\.5: more damping, or curvature=GGN"):
        neumann(matrix([-0.5, 1.0, 9.0])[0]).solve(torch.ones(3, 1, dtype=torch.float64))


def test_a_column_that_comes_twice_costs_nothing():
    A, _ = matrix([10.0 ** (k / 10) for k in range(30)])
    B = torch.randn(30, 5, dtype=torch.float64)
    once, twice = (solve.cg(A.float().__matmul__, V.float(), tol=1e-4) for V in (B, torch.cat([B[:, :1], B, B], 1)))
    assert twice.products <= once.products + 1
    assert torch.allclose(twice.X[:, 1:6], once.X, rtol=1e-2, atol=1e-3 * float(once.X.abs().max()))


def test_cg_refuses_a_singular_matrix_along_what_it_cannot_reach():
    A, Q = matrix([0.0, 1e-18, 1.0, 2.0, 5.0, 7.0])
    with pytest.raises(ValueError, match="positive definite|the matrix is singular, or nearly so"):
        solve.cg(A.float().__matmul__, (1e3 * Q[:, :1] + Q[:, 3:4]).float(), tol=1e-6)
