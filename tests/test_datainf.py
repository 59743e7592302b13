from dataclasses import replace

import pytest
import torch
from problems import conv_net, digits_task
from test_tracin import pearson_and_slope

from influence_nb import DataInf, EmpiricalFisher, GradDot, Influence, Split, gradients, leave_one_out, models


def with_train(task, rows):
    """The task with the training examples in `rows`, repeated where they are named twice."""
    return replace(task, train=Split(task.train.x[rows], task.train.y[rows], task.train.classes))


@pytest.mark.parametrize("rows", [[5], [5] * 7])
def test_with_one_example_or_copies_of_one_it_is_the_exact_empirical_fisher(rows):
    task = with_train(digits_task(n=20, model=models.logistic(9, 4, bias=False), trained=False), rows)
    found = DataInf(damping=0.01).fit(task).scores().values
    exact = Influence(damping=0.01, curvature=EmpiricalFisher).fit(task).scores().values
    assert torch.allclose(found, exact, atol=1e-12)
    plain = GradDot().fit(task).scores().values / len(rows) / (task.l2 + 0.01)
    assert not torch.allclose(found, plain, rtol=0.5)


@pytest.mark.parametrize("net", [lambda: models.mlp([9, 5, 4]), conv_net])
def test_it_is_the_mean_of_inverses_tensor_by_tensor(net):
    task = digits_task(n=13, l2=0.2, model=net(), trained=False)
    G, V = (gradients.example_gradients(task, split) for split in (task.train, task.test))
    X = []
    for name, columns in gradients.pieces(task, torch.arange(G.shape[1])[:, None]).items():
        g, v = G[:, columns[:, 0]], V[:, columns[:, 0]]
        ridge = (0.2 if name.endswith("weight") else 0.0) + 0.03
        inverses = [torch.linalg.inv(torch.outer(row, row) + ridge * torch.eye(len(row))) for row in g]
        X.append(torch.stack(inverses).mean(0) @ v.T)
    fitted = DataInf(damping=0.03).fit(task)
    assert torch.allclose(fitted.scores().values, torch.cat(X).T @ G.T / 13, atol=1e-10)
    own = fitted.scores(task.train).values.diagonal()
    assert torch.allclose(fitted.self_influence(), own, atol=1e-10)


def test_at_large_damping_it_is_grad_dot_over_damping():
    task = digits_task(n=30)
    found = DataInf(damping=1e5).fit(task).scores().values
    assert torch.allclose(found, GradDot().fit(task).scores().values / 30 / 1e5, rtol=1e-3)


def test_the_exchange_costs_more_than_the_curvature_gains():
    """The truth: no better than a plain product at the rule of thumb, little better at ten times it, never in scale."""
    task = digits_task()
    truth = leave_one_out(task, range(60), progress=False)
    plain = pearson_and_slope(GradDot().fit(task).scores().values, truth)[0]
    exact = pearson_and_slope(Influence().fit(task).scores().values, truth)[0]
    scores = DataInf().fit(task).scores()
    r, slope = pearson_and_slope(scores.values, truth)
    assert r < plain < exact and slope < 0.3 and not scores.is_effect
    assert min(scores.certificate["residual"]) > 1  # as wrong as no answer at all, and says so
    damped = DataInf(damping=10 * scores.certificate["damping"]).fit(task).scores()
    assert plain < pearson_and_slope(damped.values, truth)[0] < plain + 0.05
    assert exact > plain + 0.1


def test_without_a_regulariser_it_asks_for_damping():
    with pytest.raises(ValueError, match="which is 0 for linear1.bias: set damping > 0"):
        DataInf(damping=0.0).fit(digits_task(n=8)).scores()
