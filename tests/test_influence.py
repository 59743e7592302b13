import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import conv_net, digits_task, mlp_task

from influence_nb import (
    CG,
    GGN,
    Cosine,
    GradDot,
    Hessian,
    Influence,
    Split,
    Task,
    converge,
    data,
    gradients,
    leave_one_out,
    models,
    squared_error,
)
from influence_nb.checks import restless, snapshot, untouched


def pearson_and_slope(predicted, actual):
    """Correlation, and the least-squares factor through 0 from predicted to actual, over all pairs."""
    r = torch.corrcoef(torch.stack([predicted.flatten(), actual.flatten()]))[0, 1]
    return float(r), float((predicted * actual).sum() / predicted.square().sum())


def ridge(n=12, n_test=5, l2=0.3, seed=0):
    """A least-squares line in 3 variables, whose leave-one-out is known in closed form."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(n + n_test, 3, generator=random, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + torch.randn(n + n_test, generator=random,
                                                                              dtype=torch.float64)
    task = Task(models.logistic(3, 1).double(), Split(x[:n], y[:n]), Split(x[n:], y[n:]), squared_error, l2)
    converge(task)
    return task


def test_influence_on_ridge_regression_is_the_textbook_formula():
    task, n = ridge(), 12
    X = torch.cat([task.train.x, torch.ones(n, 1, dtype=torch.float64)], 1)
    Z = torch.cat([task.test.x, torch.ones(5, 1, dtype=torch.float64)], 1)
    A = X.T @ X / n + torch.diag(torch.tensor([0.3, 0.3, 0.3, 0.0], dtype=torch.float64))
    beta = torch.linalg.solve(A, X.T @ task.train.y / n)
    residual, test_residual = X @ beta - task.train.y, Z @ beta - task.test.y
    expected = (test_residual[:, None] * (Z @ torch.linalg.solve(A, X.T)) * residual) / n
    assert torch.allclose(Influence().fit(task).scores().values, expected, atol=1e-12)


def test_leave_one_out_on_ridge_regression_is_the_closed_form_with_its_leverage():
    task, n = ridge(), 12
    X = torch.cat([task.train.x, torch.ones(n, 1, dtype=torch.float64)], 1)
    Z = torch.cat([task.test.x, torch.ones(5, 1, dtype=torch.float64)], 1)
    A = X.T @ X + n * torch.diag(torch.tensor([0.3, 0.3, 0.3, 0.0], dtype=torch.float64))
    beta = torch.linalg.solve(A, X.T @ task.train.y)
    leverage = (X * torch.linalg.solve(A, X.T).T).sum(1)
    moved = Z @ (beta[:, None] + torch.linalg.solve(A, X.T) * ((X @ beta - task.train.y) / (1 - leverage)))
    expected = 0.5 * (moved - task.test.y[:, None]) ** 2 - 0.5 * (Z @ beta - task.test.y)[:, None] ** 2
    assert torch.allclose(leave_one_out(task, range(n), progress=False), expected, atol=1e-9)


def test_influence_equals_leave_one_out_on_softmax_regression():
    train, test = digits_1200()
    task = Task(models.logistic(64, 10).double(), train, test.take(slice(100)), l2=5e-2)
    converge(task)
    ids = torch.randperm(1200, generator=torch.Generator().manual_seed(0))[:150]
    truth = leave_one_out(task, ids, progress=False)
    scores = Influence().fit(task).scores()
    r, slope = pearson_and_slope(scores.values[:, ids], truth)
    assert r >= 0.999 and 0.95 <= slope <= 1.05
    assert scores.certificate["gradient norm"] <= 1e-10 and scores.certificate["null directions"] == 1
    assert max(scores.certificate["residual"]) <= 1e-10 and scores.certificate["smallest eigenvalue"] > 0
    plain = GradDot().fit(task).scores().values / len(train)
    r, slope = pearson_and_slope(plain[:, ids], truth)
    assert r < 0.99 or not 0.5 < slope < 2  # without curvature the same bar is missed


def test_at_weaker_l2_leverage_lifts_the_slope_above_one():
    train, test = digits_1200()
    task = Task(models.logistic(64, 10).double(), train.take(slice(400)), test.take(slice(100)), l2=1e-2)
    converge(task)
    ids = range(0, 400, 5)
    r, slope = pearson_and_slope(Influence().fit(task).scores().values[:, ids],
                                 leave_one_out(task, ids, progress=False))
    assert 1.1 <= slope <= 1.3 and r >= 0.99


def digits_1200():
    """1,200 training digits of 8 x 8 pixels in float64, and the rest as test points."""
    train, test = (split.to(torch.float64) for split in data.load("digits"))
    x, y = torch.cat([train.x, test.x]), torch.cat([train.y, test.y])
    return Split(x[:1200], y[:1200], train.classes), Split(x[1200:], y[1200:], train.classes)


def test_one_percent_of_an_example_is_the_derivative_on_a_small_network():
    task = mlp_task()
    scores, before = Influence().fit(task).scores().values, task.losses()
    for j in (3, 17):
        changed = replace(task, model=copy.deepcopy(task.model))
        w = torch.ones(40, dtype=torch.float64)
        up_and_down = []
        for step in (-0.01, 0.01):
            w[j] = 1 + step
            converge(changed, w, tol=1e-12)
            up_and_down.append(changed.losses())
        measured = (up_and_down[0] - up_and_down[1]) / 0.02  # central: the error is of order 0.01^2
        assert (measured - scores[:, j]).abs().max() <= 1e-4 * scores[:, j].abs().max()
        w[j] = 0.99
        converge(changed, w, tol=1e-12)
        r, slope = pearson_and_slope(0.01 * scores[:, j], changed.losses() - before)
        assert r >= 0.9999 and slope == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("curvature", [Hessian, GGN])
def test_cg_equals_the_exact_solve_to_its_residual(curvature):
    task = mlp_task()
    exact = Influence(damping=0.01, curvature=curvature).fit(task).scores()
    for tol in (1e-3, 1e-9):
        found = CG(damping=0.01, curvature=curvature, tol=tol).fit(task).scores()
        residual = torch.tensor(found.certificate["residual"])
        assert residual.max() <= 2 * tol
        V = gradients.example_gradients(task, task.test)
        G = gradients.example_gradients(task, task.train)
        bound = residual * V.norm(dim=1) / 0.01 * G.norm(dim=1).max() / len(task.train)  # |A^-1 r| |g| / n
        assert ((found.values - exact.values).abs().amax(1) <= bound + 1e-12).all()


def test_cg_stopped_early_says_so():
    scores = CG(damping=1e-4, tol=1e-12, max_iterations=2).fit(mlp_task()).scores()
    assert scores.certificate["curvature products"] == 2 and max(scores.certificate["residual"]) > 1e-3


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2), block=st.integers(1, 13))
def test_scores_do_not_depend_on_batches_or_on_the_order_of_the_data(seed, block):
    task = digits_task(n=23, seed=seed, model=conv_net(seed), trained=False)
    whole = Influence(damping=0.3, curvature=GGN).fit(task).scores().values
    blocked = Influence(damping=0.3, curvature=lambda t: GGN(t, batch_size=block))
    blocked.curvature.__name__ = "GGN"
    assert torch.allclose(blocked.fit(task).scores().values, whole, atol=1e-10)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(seed))
    shuffled = replace(task, train=Split(task.train.x[order], task.train.y[order], task.train.classes))
    again = CG(damping=0.3, tol=1e-11).fit(shuffled).scores().values
    assert torch.allclose(again, whole[:, order], atol=1e-8)


def test_float32_is_within_its_rounding_of_float64():
    task = digits_task(n=50)
    exact = Influence(damping=1e-2).fit(task).scores().values
    single = Influence(damping=1e-2).fit(task.to(torch.float32)).scores().values
    assert (single - exact).abs().max() <= 1e-4 * exact.abs().max()


def test_a_measure_scores_its_drop():
    def log_probability(outputs, y):
        return -torch.nn.functional.cross_entropy(outputs, y, reduction="none")

    task = digits_task()
    measured = Influence().fit(replace(task, measure=log_probability)).scores()
    assert torch.allclose(measured.values, Influence().fit(task).scores().values)  # a drop of -loss is a rise of loss
    assert measured.unit == "log_probability per removed example"
    assert torch.allclose(GradDot().fit(replace(task, measure=log_probability)).scores().values,
                          GradDot().fit(task).scores().values)


def test_an_indefinite_curvature_is_named_and_refused_by_cg():
    task = digits_task(n=20, l2=1e-3, model=models.mlp([9, 5, 4]), trained=False)
    exact = Influence().fit(task).scores()
    assert exact.certificate["indefinite"] and exact.certificate["smallest eigenvalue"] < 0
    assert "INDEFINITE" in repr(exact) and "INDEFINITE" in exact._repr_html_()
    assert "INDEFINITE" not in repr(Influence(damping=10.0).fit(task).scores())
    with pytest.raises(ValueError, match="not positive definite"):
        CG(curvature=Hessian).fit(task).scores()


def test_a_singular_curvature_asks_for_damping():
    task = digits_task(n=6, l2=0.0, trained=False)  # 40 parameters, at most 18 independent gradients
    other = task.test.take([0, 1])
    with pytest.raises(ValueError, match="damping > "):
        Influence().fit(task).scores(other)
    assert torch.isfinite(Influence(damping=0.1).fit(task).scores(other).values).all()


@pytest.mark.parametrize("method", [Influence(damping=1.0, curvature=GGN), CG(damping=1.0), GradDot(), Cosine()])
def test_batchnorm_dropout_and_frozen_layers_go_through_unharmed(method):
    task = restless()
    before, random = snapshot(task.model), torch.get_rng_state()
    scores = method.fit(task).scores()
    assert torch.isfinite(scores.values).all() and scores.values.std() > 0
    assert untouched(task.model, before) and torch.equal(random, torch.get_rng_state())
    assert any(m.training for m in task.model.modules()) and not task.model[5].weight.requires_grad


@pytest.mark.parametrize("method", [Influence(), CG(), GradDot(), Cosine()])
def test_scores_before_fit_are_refused(method):
    with pytest.raises(ValueError, match=rf"{type(method).__name__} has seen no task yet: call \.fit\(task\) first"):
        method.scores()


@pytest.mark.parametrize("method, error, words", [
    (Influence(damping=-1.0), ValueError, "damping must be 0 or more, .*got -1"),
    (CG(damping=float("nan")), ValueError, "damping must be 0 or more, .*got nan"),
    (Influence(curvature="ggn"), TypeError, "Hessian, GGN or Fisher itself, got 'ggn'"),
])
def test_bad_settings_are_refused(method, error, words):
    with pytest.raises(error, match=words):
        method.fit(digits_task(n=8))


def test_foreign_points_are_refused():
    fitted = Influence().fit(digits_task())
    with pytest.raises(TypeError, match=r"expected a Split, got list: for some test points, task\.test\.take"):
        fitted.scores([3])
    with pytest.raises(ValueError, match=r"0\.\.3, the model has 4 outputs; got 9"):
        fitted.scores(Split(torch.rand(2, 1, 3, 3, dtype=torch.float64), torch.tensor([9, 0])))
    with pytest.raises(ValueError, match="layer"):
        Cosine(layer="no such layer").fit(digits_task())
