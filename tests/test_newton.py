from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from problems import conv_net, digits_task, mlp_task
from sklearn.linear_model import LogisticRegression

from influence_nb import GGN, Hessian, Split, Task, converge, fit, gradients, models, newton
from influence_nb.solve import Eigen


def test_converge_reaches_the_optimum_that_scikit_learn_finds():
    task = digits_task(n=60, l2=0.05)
    assert gradients.risk_gradient(task).norm() <= 1e-10
    oracle = LogisticRegression(C=1 / (60 * task.l2), tol=1e-12, max_iter=5000)
    oracle.fit(task.train.x.flatten(1).numpy(), task.train.y.numpy())
    ours = task.model.linear1.weight.detach().numpy()
    assert np.abs(ours - oracle.coef_).max() < 1e-6  # its biases differ by a constant: the null direction
    flipped = torch.softmax(task.outputs(), 1).numpy() - oracle.predict_proba(task.test.x.flatten(1).numpy())
    assert np.abs(flipped).max() < 1e-6


def test_the_certificate_says_what_autograd_says():
    task = mlp_task()
    found = converge(task)
    values = torch.linalg.eigvalsh(Hessian(task) @ torch.eye(74, dtype=torch.float64))
    slope = gradients.risk_gradient(task)
    assert found.gradient_norm == pytest.approx(float(slope.norm()), abs=1e-13) and slope.norm() <= 1e-10
    assert abs(values[0]) < 1e-12 and found.smallest_eigenvalue == pytest.approx(float(values[1]), rel=1e-9)
    assert found.null == ["a constant added to linear2.bias"]
    H = torch.linalg.pinv(Hessian(task).dense(), hermitian=True, rtol=1e-12)
    assert found.decrement == pytest.approx(float(slope @ H @ slope) ** 0.5, rel=1e-3) and not found.turned
    assert newton.risk_and_slope(task, newton.theta(task))[0] == pytest.approx(found.risk, abs=1e-14)
    with torch.no_grad():
        ridge = 0.01 * (task.model.linear1.weight.square().sum() + task.model.linear2.weight.square().sum())
    assert found.risk == pytest.approx(float(task.losses(task.train).mean() + ridge), abs=1e-12)


def test_a_network_converges_from_random_weights_to_a_minimum():
    for seed in range(3):
        task = digits_task(n=40, l2=1e-2, seed=seed, model=models.mlp([9, 5, 4], seed=seed), trained=False)
        assert torch.linalg.eigvalsh(Hessian(task).dense())[0] < 0
        found = converge(task)
        assert found.gradient_norm <= 1e-10 and found.smallest_eigenvalue > 0
        assert torch.linalg.eigvalsh(Hessian(task).dense())[0] > -1e-12


def test_it_leaves_a_saddle_along_its_negative_curvature():
    task = digits_task(n=40, l2=1e-2, model=models.mlp([9, 5, 4]), trained=False)
    newton.move(task, torch.zeros(74, dtype=torch.float64))        # a network of zeros fits its output biases only
    for _ in range(50):
        bias = task.model.linear2.bias
        bias.data -= gradients.risk_gradient(task)[-4:]
    assert gradients.risk_gradient(task).norm() < 1e-3 and torch.linalg.eigvalsh(Hessian(task).dense())[0] < -1e-3
    stuck = newton.risk_and_slope(task, newton.theta(task))[0]
    assert converge(task).risk < stuck - 0.1


def test_with_a_base_near_by_no_dense_matrix_is_formed(monkeypatch):
    task = mlp_task()
    base, w = converge(task).eigen, torch.ones(40, dtype=torch.float64)
    w[3] = 0
    slow, fast = task.to(torch.float64), task.to(torch.float64)
    converge(slow, w)
    monkeypatch.setattr(Hessian, "dense", lambda self: pytest.fail("a dense Hessian"))
    found = converge(fast, w, base=base)
    assert found.smallest_eigenvalue is None and found.passes < 40
    assert torch.allclose(fast.outputs(), slow.outputs(), atol=1e-8)


def test_the_ggn_serves_as_metric_where_it_is_not_the_hessian():
    task = digits_task(n=40, l2=1e-2, model=models.mlp([9, 5, 4]), trained=False)
    seen = []
    found = converge(task, curvature=GGN, watch=seen.append)
    assert found.smallest_eigenvalue > 0 and len(seen) >= found.steps
    assert all(later.value <= earlier.value + 1e-14 for earlier, later in pairwise(seen))


def test_dense_hessian_equals_its_products():
    for model in (models.mlp([9, 5, 4]), conv_net()):
        task, w = digits_task(n=23, model=model, trained=False), torch.rand(23, dtype=torch.float64)
        H = Hessian(task, w, batch_size=10)
        columns = H @ torch.eye(len(newton.theta(task)), dtype=torch.float64)
        assert torch.allclose(H.dense(), columns, atol=1e-14)


def test_risk_and_slope_are_those_of_the_risk():
    task, w = digits_task(n=23, trained=False), torch.rand(23, dtype=torch.float64)
    flat = newton.theta(task) + 0.1
    value, slope = newton.risk_and_slope(task, flat, w, batch_size=7)
    assert value == pytest.approx(newton.risk_and_slope(task, newton.theta(task), w)[0], abs=1e-14)
    assert torch.allclose(slope, gradients.risk_gradient(task, w), atol=1e-14)


def test_descent_on_a_quadratic_is_exact_in_its_own_metric_and_quick_in_another():
    random = torch.Generator().manual_seed(0)
    A = torch.randn(12, 12, generator=random, dtype=torch.float64)
    A, b = A @ A.T + torch.eye(12), torch.randn(12, generator=random, dtype=torch.float64)

    def evaluate(x):
        return float(0.5 * x @ A @ x - b @ x), A @ x - b

    def steps_to(tol, inverse):
        start = torch.zeros(12, dtype=torch.float64)
        for point in newton.descend(evaluate, start, inverse):
            if point.slope.norm() < tol:
                return point.steps
    assert steps_to(1e-10, lambda R: torch.linalg.solve(A, R)) == 1
    assert steps_to(1e-8, lambda R: torch.linalg.solve(A.diagonal().diag(), R)) <= 30


def test_null_directions_are_named():
    task = digits_task(n=60, l2=0.0, trained=False)              # the softmax knows no sum over the classes
    assert newton.null_directions(task, Eigen.of(Hessian(task).dense())) == [
        "a constant added to linear1.weight", "a constant added to linear1.bias", "8 within linear1.weight"]


def test_a_risk_without_a_minimum_is_named_and_the_model_stays():
    x = torch.tensor([[1.0], [2.0], [-1.0], [-3.0]], dtype=torch.float64)
    split = Split(x, torch.tensor([0, 0, 1, 1]))
    task = Task(models.logistic(1, 2).double(), split, split)                              # separable, and l2 = 0
    with pytest.raises(ValueError, match="raise l2|or l2"):
        converge(task, max_steps=3000)
    assert task.losses().max() < 1e-6


def test_what_cannot_be_reached_ends_soon_and_says_why():
    task, passes = digits_task(n=30), []
    with pytest.raises(ValueError, match="beyond its rounding: raise tol"):
        converge(task, tol=1e-30, watch=passes.append)
    assert len(passes) < 60


@pytest.mark.parametrize("call, error, words", [
    (lambda t: converge(t, torch.ones(5), base=Eigen.of(torch.eye(40))), ValueError, r"must be \[n\] = \(12,\)"),
    (lambda t: converge(t, torch.ones(12, 1), base=Eigen.of(torch.eye(40))), ValueError, r"must be \[n\] = \(12,\)"),
    (lambda t: converge(t, base=Eigen.of(torch.eye(7))), ValueError, "these 40 parameters, got one of 7"),
    (lambda t: converge(t.to(torch.float32)), TypeError, "converge to 1e-10 needs float64"),
    (lambda t: converge(t, max_steps=1), ValueError, r"after 1 steps, got"),
])
def test_bad_calls_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call(digits_task(n=12, trained=False))


def test_training_first_changes_nothing_for_a_convex_risk():
    one, other = digits_task(n=30), digits_task(n=30, trained=False)
    fit(other, epochs=3, batch_size=7, optimizer=partial(torch.optim.SGD, lr=0.5), progress=False)
    converge(other)
    assert torch.allclose(one.outputs().softmax(1), other.outputs().softmax(1), atol=1e-9)
