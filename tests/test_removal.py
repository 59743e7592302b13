from dataclasses import replace

import pytest
import torch
from problems import digits_task, mlp_task
from torch import nn

from influence_nb import (
    CG,
    EKFAC,
    GGN,
    KFAC,
    Arnoldi,
    GradDot,
    Hessian,
    Influence,
    LiSSA,
    Nystroem,
    Split,
    Task,
    input_influence,
    models,
    squared_error,
)
from influence_nb.gradients import Gradients, rise_slopes
from influence_nb.parameters import theta

STABLE = "top 10 kept at ten times the damping"


@pytest.mark.parametrize("method", [Influence(0.01, GGN), CG(0.01, tol=1e-10), EKFAC(0.01), EKFAC(0.01, refine=9)],
                         ids=lambda m: type(m).__name__)
def test_the_certificate_says_how_many_of_the_top_10_stay_at_ten_times_the_damping(method):
    task = mlp_task()
    once, tenfold = (replace(method, damping=damping).fit(task).scores() for damping in (0.01, 0.1))
    tops = [set(row.abs().topk(10).indices.tolist()) for scores in (once, tenfold) for row in scores.values]
    shares = [len(a & b) / 10 for a, b in zip(tops[:7], tops[7:], strict=True)]
    assert once.certificate[STABLE] == pytest.approx(sum(shares) / 7) and min(shares) < 1


def test_without_damping_it_is_ten_times_the_l2_and_without_both_nothing():
    task = digits_task()
    certificate = Influence().fit(task).scores().certificate
    assert certificate["top 10 kept at ten times the l2"] <= 1 and STABLE not in certificate
    bare = Task(models.logistic(9, 4).double(), task.train, task.test)
    assert not [name for name in Influence(0.0, GGN).fit(bare).scores().certificate if name.startswith("top 10")]


@pytest.mark.parametrize("method", [Influence(0.01), Influence(0.01, GGN), CG(0.01, max_iterations=2)],
                         ids=["Hessian", "GGN", "CG"])
def test_the_residual_is_the_true_one(method):
    fitted = method.fit(mlp_task())
    V = Gradients(fitted.task_, fitted.task_.test, rise_slopes).dense()[0].T
    X = fitted.solver_.solve(V, 0.01)
    C = GGN(fitted.task_).dense() if fitted.curvature_ is not None and method.curvature is GGN else fitted.curvature_
    expected = (C @ X + 0.01 * X - V).norm(dim=0) / V.norm(dim=0)
    assert torch.allclose(torch.tensor(fitted.scores().certificate["residual"], dtype=torch.float64), expected,
                          atol=1e-9)


def test_systems_that_are_not_solved_are_flagged():
    scores = KFAC(1e-4).fit(mlp_task()).scores()
    solved = Influence(1e-4, GGN).fit(mlp_task()).scores()
    assert torch.tensor(scores.certificate["residual"]).median() > 1
    assert "read ranks, not sizes" in repr(scores) and "read ranks, not sizes" in scores._repr_html_()
    assert "read ranks" not in repr(solved)


def test_very_small_gradients_are_solved_too():
    task = mlp_task().to(torch.float32)

    def whisper(outputs, y):
        return 1e-24 * outputs[:, 0]

    loud, quiet = (CG(0.01).fit(replace(task, measure=measure)).scores() for measure in
                   (lambda outputs, y: outputs[:, 0], whisper))
    assert torch.allclose(quiet.values * 1e24, loud.values, rtol=1e-2, atol=1e-3 * float(loud.values.abs().max()))
    assert 0 < max(quiet.certificate["residual"]) < 1e-4


@pytest.mark.parametrize("method", [Influence(0.01, GGN), CG(0.01), EKFAC(0.01)], ids=lambda m: type(m).__name__)
def test_a_loss_that_is_not_finite_is_named(method):
    def loss(outputs, y):
        return torch.where(torch.arange(len(y)) == 3, torch.inf, 1.0) * outputs.square().sum(1)

    x, y = torch.randn(7, 9, dtype=torch.float64), torch.zeros(7).long()
    task = Task(models.logistic(9, 4).double(), Split(x, y), Split(x, y), loss=loss)
    with pytest.raises(ValueError, match=r"training example 3 \(and 0 more\)"):
        method.fit(task)


def test_wrong_curvatures_and_preconditioners_are_refused():
    with pytest.raises(TypeError, match="factors are taken of a GGN's rows, got curvature=Hessian"):
        KFAC(curvature=Influence().curvature).fit(digits_task())
    for inner in (GradDot(), Nystroem, LiSSA(0.1), Arnoldi(0.1, rank=3), "ekfac"):
        with pytest.raises(TypeError, match="precondition must be a method with a full inverse"):
            CG(precondition=inner).fit(digits_task())


@pytest.mark.parametrize("damping", [GGN, "auto"])
def test_a_damping_that_is_no_number_is_refused(damping):
    with pytest.raises(TypeError, match="damping must be a number or None, got"):
        Influence(damping).fit(digits_task())


def test_the_unit_is_that_of_the_loss():
    x, y = torch.randn(12, 3, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    task = Task(models.logistic(3, 1).double(), Split(x, y), Split(x[:2], y[:2]), loss=squared_error, l2=0.1)
    scores = Influence(1e-3).fit(task).scores()
    assert scores.unit == "squared_error per removed example" and scores.is_effect
    assert scores.provenance["curvature"] == "Hessian"


def test_attention_has_a_hessian_and_an_input_influence():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(18, 3))
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(13, 3, 6, generator=random), torch.randint(3, (13,), generator=random)
    task = Task(model, Split(x[:11], y[:11]), Split(x[11:], y[11:]), l2=0.1)
    V = torch.randn(len(theta(task)), 1, generator=random)
    expected = Hessian(task.to(torch.float64)) @ V.double()
    assert ((Hessian(task) @ V).double() - expected).norm() <= 1e-4 * expected.norm()
    method = EKFAC(0.1).fit(task)
    assert not method.scores().values.requires_grad
    image = input_influence(method, [2, 5])
    assert image.shape == (2, 2, 3, 6) and image.abs().min() > 0
