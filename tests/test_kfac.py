"""The scores of K-FAC and EK-FAC against exact influence with the GGN."""

from itertools import pairwise

import pytest
import torch
from problems import mlp_task

from influence_nb import EKFAC, GGN, KFAC, GradDot, Influence, Split, Task, models, squared_error
from influence_nb.gradients import Gradients


def pearson(S, T):
    return float(torch.corrcoef(torch.stack([S.flatten(), T.flatten()]))[0, 1])


@pytest.mark.parametrize("method", [KFAC(0.01, GGN), EKFAC(0.01, GGN), KFAC(0.01), EKFAC(0.01)])
def test_where_inputs_and_output_gradients_are_independent_nothing_is_lost(method):
    """A linear model with a squared error, whose output Hessian is the same for all examples."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(31, 6, generator=random, dtype=torch.float64)
    y = x[:, 0] - 2 * x[:, 1] + torch.randn(31, generator=random, dtype=torch.float64)
    task = Task(models.logistic(6, 1).double(), Split(x[:24], y[:24]), Split(x[24:], y[24:]), squared_error, 0.1,
                regularised=lambda name: True)
    exact = Influence(0.01, GGN).fit(task).scores().values
    assert torch.allclose(method.fit(task).scores().values, exact, rtol=1e-9)
    assert pearson(GradDot().fit(task).scores().values, exact) < 0.95


def test_errors_fall_from_gradient_products_to_factors_to_their_refinements():
    """EK-FAC is nearer to the GGN than K-FAC, but its inverse, and the scores, need not be, so that no order of these
    two is asserted."""
    task, damping = mlp_task(n=60), 3e-3
    exact = Influence(damping, GGN).fit(task).scores().values
    kfac = KFAC(damping, GGN).fit(task).scores().values
    found = [EKFAC(damping, GGN, refine).fit(task).scores().values for refine in (0, 2, 6, 20)]
    errors = [float((S - exact).norm() / exact.norm()) for S in found]
    assert all(after < 0.5 * before for before, after in pairwise(errors)), errors
    assert errors[-1] < 1e-3
    assert pearson(GradDot().fit(task).scores().values, exact) < 0.8 < min(pearson(S, exact) for S in (kfac, found[0]))


@pytest.mark.parametrize("method", [KFAC, EKFAC])
def test_the_certificates_residual_is_that_of_the_ggn(method):
    """Estimated from eight random vectors: within a third of itself on the mean over test points."""
    task = mlp_task(n=60)
    fitted = method(3e-3, GGN).fit(task)
    V = Gradients(task, task.test).dense()[0].T
    X = fitted.solver_.solve(V, 3e-3)
    true = ((GGN(task) @ X + 3e-3 * X - V).norm(dim=0) / V.norm(dim=0))
    said = torch.tensor(fitted.scores().certificate["residual"], dtype=torch.float64)
    assert float((said / true).log().mean().exp()) == pytest.approx(1, abs=1 / 3)
    assert true.min() > 0.05                                                    # it is no small thing
