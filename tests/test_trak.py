from dataclasses import replace
from functools import partial

import pytest
import torch
from problems import conv_net, digits_task, mlp_task
from test_tracin import pearson_and_slope

from influence_nb import GGN, TRAK, GradDot, Influence, Split, Task, converge, data, fit, leave_one_out, models
from influence_nb.attribute.trak import Projected, margin
from influence_nb.gradients import example_gradients, penalty


def two_classes(n=150, n_test=23, l2=2e-2, seed=0):
    """Softmax regression on two overlapping clouds in 9 dimensions, 20 parameters, converged in float64."""
    random = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (n + n_test,), generator=random)
    x = torch.randn(n + n_test, 9, generator=random, dtype=torch.float64) + 0.5 * y[:, None]
    task = Task(models.logistic(9, 2, seed=seed).double(), Split(x[:n], y[:n]), Split(x[n:], y[n:]), l2=l2)
    converge(task)
    return task


def squared_distance(outputs, y):
    return (outputs - torch.nn.functional.one_hot(y, outputs.shape[1])).square().sum(1)


def as_in_the_paper(task):
    """Their scores in whole gradients, phi(z) (Phi^T Phi)^-1 Phi^T Q, with the pseudo-inverse."""
    Phi, phi = (example_gradients(task, split, margin) for split in (task.train, task.test))
    doubt = torch.sigmoid(-margin(task.outputs(task.train), task.train.y))
    return phi @ torch.linalg.pinv(Phi.T @ Phi) @ Phi.T * doubt


def test_the_margin_is_the_log_odds_of_the_labelled_class():
    outputs = torch.randn(6, 4, dtype=torch.float64)
    p = outputs.softmax(1)[torch.arange(6), torch.tensor([0, 3, 1, 1, 2, 0])]
    assert torch.allclose(margin(outputs, torch.tensor([0, 3, 1, 1, 2, 0])), (p / (1 - p)).log())


def test_on_two_classes_trak_is_influence_with_the_ggn():
    task = two_classes()
    for damping in (0.0, 1e-2, None):
        found, exact = (method(damping=damping).fit(task) for method in (TRAK, partial(Influence, curvature=GGN)))
        assert torch.allclose(found.scores().values, exact.scores().values, atol=1e-12)
        assert torch.allclose(found.self_influence(), exact.self_influence(), atol=1e-12)
        assert max(found.scores().certificate["residual"]) < 1e-10


def test_on_two_classes_trak_is_leave_one_out_of_the_margin():
    task = replace(two_classes(), measure=margin)
    truth = leave_one_out(task, range(0, 150, 4), progress=False)
    scores = TRAK(damping=0.0).fit(task).scores()
    assert scores.unit == "margin per removed example" and scores.is_effect
    r, slope = pearson_and_slope(scores.values[:, ::4], truth)
    assert r >= 0.99 and 1 <= slope <= 1.15  # leverage lifts the slope, 20 parameters on 150 examples
    r, slope = pearson_and_slope(GradDot().fit(task).scores().values[:, ::4] / 150, truth)
    assert r < 0.99 or not 0.5 < slope < 2


def test_without_its_weights_the_ranking_stays_and_the_scale_is_lost():
    task = replace(two_classes(l2=1e-8), measure=margin)
    paper = as_in_the_paper(task)
    found = TRAK(damping=0.0, weighted=False).fit(task).scores()
    assert not found.is_effect and "ranked only" in found.unit
    assert torch.allclose(found.values, paper, rtol=1e-4, atol=1e-6 * float(paper.abs().max()))  # but for l2
    truth = leave_one_out(task, range(0, 150, 4), progress=False)
    r, slope = pearson_and_slope(paper[:, ::4], truth)
    assert r >= 0.95 and slope > 4  # p (1 - p) is at most 1/4


def test_with_more_classes_scores_are_too_large_and_near():
    train, test = (split.to(torch.float64) for split in data.load("digits"))
    task = Task(models.logistic(64, 10).double(), train.take(slice(400)), test.take(slice(50)), l2=1e-2)
    converge(task)
    ids = range(0, 400, 8)
    truth = leave_one_out(task, ids, progress=False)
    measured = {}
    for name, method in (("whole", TRAK(dim=650, damping=0.0)), ("sketch", TRAK(dim=256, damping=0.0)),
                         ("products", GradDot())):
        measured[name] = pearson_and_slope(method.fit(task).scores().values[:, ids], truth)
    assert measured["whole"][0] >= 0.93 and measured["sketch"][0] >= 0.83 > 0.75 >= measured["products"][0]
    assert 0.6 <= measured["whole"][1] <= 0.75 and 0.6 <= measured["sketch"][1] <= 0.75  # unbiased: the scale is kept


def test_a_sketch_is_its_formula_however_many_columns_are_made_at_a_time():
    task = digits_task(n=30, l2=0.2, model=conv_net(), trained=False)
    sketch, blocks = Projected(task, 64, seed=3), Projected(task, 64, seed=3, most=1000)
    P, Phi = torch.cat(list(sketch.columns()), 1), example_gradients(task, task.train, margin)
    assert torch.equal(P, torch.cat(list(blocks.columns()), 1)) and len(list(blocks.columns())) > 3
    assert torch.allclose(P.square() * 64, torch.ones_like(P)) and P.mean().abs() < 0.05 / 64 ** 0.5
    p = torch.sigmoid(margin(task.outputs(task.train), task.train.y))
    K = (Phi @ P).T @ torch.diag(p * (1 - p)) @ (Phi @ P) / 30 + (penalty(task).mean() + 0.1) * torch.eye(64)
    B = torch.randn(len(P), 2, dtype=torch.float64)
    for each in (sketch, blocks):
        assert torch.allclose(each.features, Phi @ P)
        assert torch.allclose(each.solve(B, 0.1), P @ torch.linalg.solve(K, P.T @ B))


def test_the_residual_tells_what_the_sketch_lost():
    task = mlp_task()
    residuals = {dim: max(TRAK(dim, damping=0.1).fit(task).scores().certificate["residual"]) for dim in (74, 8)}
    whole = TRAK(74, damping=0.1).fit(task)
    V = example_gradients(task, task.test).T
    X = whole.solver_.solve(V, 0.1)
    true = (whole.curvature_ @ X + 0.1 * X - V).norm(dim=0) / V.norm(dim=0)
    estimate = torch.tensor(whole.scores().certificate["residual"])
    assert ((estimate / true).log().mean().exp() - 1).abs() < 0.5 and residuals[8] > 2 * residuals[74]


def test_averaging_over_models_as_in_the_paper():
    task = digits_task(n=40, l2=2e-2, model=models.mlp([9, 5, 4], seed=0), trained=False)
    tasks = [replace(task, model=models.mlp([9, 5, 4], seed=seed).double()) for seed in range(3)]
    for each in tasks:
        fit(each, 60, 40, partial(torch.optim.Adam, lr=0.02), progress=False)
    both = TRAK(models=[each.model for each in tasks[1:]], damping=0.01).fit(tasks[0])
    doubts = [sketch.doubt for sketch in both.sketches_]
    alone = [TRAK(damping=0.01).fit(each).scores().values / doubt for each, doubt in zip(tasks, doubts)]
    assert torch.allclose(both.scores().values, sum(alone) / 3 * sum(doubts) / 3, atol=1e-12)
    assert "3 models" in both.scores().method and "Sequential" not in both.scores().method
    assert both.scores().provenance["models"] == [each.fingerprint() for each in tasks]
    assert TRAK().fit(tasks[0]).scores().provenance["models"] == [tasks[0].fingerprint()]


def test_a_loss_without_a_margin_is_refused():
    task = replace(digits_task(n=8), loss=squared_distance)
    with pytest.raises(ValueError, match="TRAK needs cross_entropy .*got squared_distance"):
        TRAK().fit(task)
