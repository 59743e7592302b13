"""The ladder of curvatures: the further up, the nearer the scores are to those of the exact Hessian.

On real digits. On random problems of a few dozen examples K-FAC and EK-FAC change places: both overshoot, because they
drop what layers and factors share, and K-FAC's cruder spectrum may hide some of that.
"""

from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from problems import digits_task
from scipy.optimize import minimize
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
    converge,
    data,
    gradients,
    models,
    newton,
    squared_error,
)

DAMPINGS = (1e-3, 1e-2, 1e-1)  # of the GGN's mean eigenvalue
SEEDS = (0, 1)


def convolutions(seed):
    """Two convolutions and a linear layer, 244 parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Conv2d(3, 3, 3, stride=2), nn.Tanh(), nn.Flatten(),
                             nn.Linear(12, 10))


def perceptron(seed):
    """64-6-10 units, 460 parameters."""
    return models.mlp([64, 6, 10], seed=seed)


@cache
def trained(net, seed):
    """200 digits, 20 test points, at a minimum of the risk to |gradient| <= 1e-10."""
    known, new = (split.to(torch.float64) for split in data.load("digits"))
    task = Task(net(seed).double(), known.take(slice(200)), new.take(slice(20)), l2=3e-3)

    def risk_and_slope(flat):
        newton.move(task, torch.from_numpy(flat))
        return newton.risk_and_slope(task, newton.theta(task))[0], gradients.risk_gradient(task).numpy()

    start = gradients.theta(task).numpy()
    found = minimize(risk_and_slope, start, jac=True, method="L-BFGS-B",
                     options={"maxiter": 3000, "maxfun": 5000, "maxcor": 30, "ftol": 0, "gtol": 1e-7})
    newton.move(task, torch.from_numpy(found.x))
    assert converge(task).gradient_norm <= 1e-10
    return task


def mean_eigenvalue(task):
    return GGN(task).trace() / len(gradients.theta(task))


def away(values, truth):
    """The distance from the truth, as a share of it."""
    return float((values - truth).norm() / truth.norm())


def scaled(values, truth):
    """The values at the scale that suits them best."""
    return values * (values * truth).sum() / values.square().sum()


@pytest.mark.parametrize("share", DAMPINGS)
@pytest.mark.parametrize("net", [perceptron, convolutions])
def test_errors_fall_from_kfac_to_the_hessian(net, share):
    rungs, best, plain = [], [], []
    for seed in SEEDS:
        task = trained(net, seed)
        damping = share * mean_eigenvalue(task)
        exact = Influence(damping).fit(task).scores()
        assert exact.certificate["gradient norm"] <= 1e-10 and exact.certificate["smallest eigenvalue"] > 0
        found = [method.fit(task).scores().values for method in (
            KFAC(damping, GGN), EKFAC(damping, GGN), EKFAC(damping, GGN, refine=3), Influence(damping, GGN),
            CG(damping, Hessian, tol=1e-6))]
        rungs.append([away(S, exact.values) for S in found])
        best.append([away(scaled(S, exact.values), exact.values) for S in found])
        products = GradDot().fit(task).scores().values
        plain.append(away(scaled(products, exact.values), exact.values))
    rungs, best = torch.tensor(rungs).mean(0).tolist(), torch.tensor(best).mean(0).tolist()
    assert all(after < before for before, after in pairwise(rungs)), rungs
    assert rungs[2] < 0.5 * rungs[1] and rungs[4] < 1e-5
    if net is convolutions:  # places are no independent examples, as K-FAC takes them to be
        assert rungs[1] < 0.95 * rungs[0]
    assert sum(plain) / len(plain) > 1.1 * max(best)  # even with its size given away


@pytest.mark.parametrize("share", DAMPINGS)
@pytest.mark.parametrize("method", [CG(tol=1e-10), Arnoldi(rank=460, iterations=460), Nystroem(rank=460),
                                    Nystroem(rank=459)], ids=lambda m: f"{type(m).__name__}")
def test_the_solvers_of_one_curvature_agree(method, share):
    task = trained(perceptron, 0)
    damping = share * mean_eigenvalue(task)
    exact = Influence(damping, GGN).fit(task).scores().values
    assert away(replace(method, damping=damping).fit(task).scores().values, exact) < 1e-6
    assert away(scaled(GradDot().fit(task).scores().values, exact), exact) > 0.9


def test_lissa_gets_there_too_at_more_damping():
    task = trained(perceptron, 0)
    damping = mean_eigenvalue(task)
    exact = Influence(damping, GGN).fit(task).scores().values
    assert away(LiSSA(damping, batch_size=20).fit(task).scores().values, exact) < 3e-3
    assert away(scaled(GradDot().fit(task).scores().values, exact), exact) > 0.5


def one_output():
    """Least squares: the pulled-back vector is 1 for every example, so that the GGN is E[a a^T] (x) 1."""
    task = digits_task(trained=False)
    known, new = (Split(split.x, split.y.double()) for split in (task.train, task.test))
    return Task(models.logistic(9, 1).double(), known, new, squared_error, task.l2)


def undecided():
    """Softmax regression at 0: every example has the same output Hessian, whatever its input."""
    task = digits_task(model=models.logistic(9, 4), trained=False)
    for parameter in task.model.parameters():
        nn.init.zeros_(parameter)
    return task


@pytest.mark.parametrize("make", [one_output, undecided])
def test_where_inputs_and_slopes_are_independent_the_factors_are_exact(make):
    task = replace(make(), regularised=lambda name: True)  # a multiple of 1, which any eigenbasis holds
    damping = 0.03 * mean_eigenvalue(task)
    exact = Influence(damping).fit(task).scores().values
    for method in (Influence, KFAC, EKFAC):
        assert away(method(damping, curvature=GGN).fit(task).scores().values, exact) < 1e-4
    assert away(scaled(GradDot().fit(task).scores().values, exact), exact) > 0.1
    dependent = replace(digits_task(), regularised=lambda name: True)
    exact = Influence(damping).fit(dependent).scores().values
    assert all(away(method(damping, GGN).fit(dependent).scores().values, exact) > 0.1 for method in (KFAC, EKFAC))
