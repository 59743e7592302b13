"""Relative influence, groups, and inputs, each against retraining."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from problems import conv_net, digits_task, mlp_task

from influence_nb import (
    CG,
    EKFAC,
    GGN,
    KFAC,
    TRAK,
    Arnoldi,
    DataInf,
    GradDot,
    Influence,
    LiSSA,
    Nystroem,
    Split,
    Task,
    converge,
    data,
    gradients,
    group_influence,
    input_influence,
    loss_change,
    models,
    relative_influence,
    squared_error,
    theta_change,
)
from influence_nb.attribute import derived
from influence_nb.checks import restless, snapshot, untouched
from influence_nb.solve import Eigen


def retrained(task, ids, share=0.0):
    """A copy of the task, converged with the weights of `ids` at `share`."""
    again = replace(task, model=copy.deepcopy(task.model))
    w = torch.ones(len(task.train), dtype=torch.float64)
    w[ids] = share
    converge(again, w, tol=1e-11)
    return again


def wrong_by(found, truth):
    return float((found - truth).norm() / truth.norm())


def ridge(n=23, n_test=5, l2=0.3):
    """Least squares in 3 variables."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(n + n_test, 3, generator=random, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + torch.randn(n + n_test, generator=random).double()
    task = Task(models.logistic(3, 1).double(), Split(x[:n], y[:n]), Split(x[n:], y[n:]), squared_error, l2)
    converge(task)
    return task


# Relative influence

def test_theta_change_is_how_far_theta_moves():
    task = digits_task(n=120)
    found, truth = theta_change(Influence().fit(task)), []
    for j in range(0, 120, 10):
        truth.append((gradients.theta(retrained(task, [j])) - gradients.theta(task)).norm())
    truth = torch.stack(truth)
    assert (found[::10] / truth - 1).abs().max() < 0.2  # leverage: 40 parameters on 120 examples
    lengths = GradDot().fit(task).self_influence().sqrt() / 120
    assert (lengths[::10] / truth - 1).abs().max() > 0.5


def test_loss_change_is_how_far_the_losses_move():
    """Root mean square over training inputs and labels drawn from the model: there the Fisher matrix is exact."""
    task = digits_task(n=120, l2=1e-3)
    found, before = loss_change(Influence().fit(task)), task.outputs(task.train).log_softmax(1)
    for j in range(0, 120, 10):
        again = retrained(task, [j], share=0.99)
        moved = (again.outputs(task.train).log_softmax(1) - before) / 0.01
        squared = (before.exp() * moved.square()).sum(1).mean()
        step = (gradients.theta(again) - gradients.theta(task)) / 0.01
        squared = squared + (gradients.penalty(task) * step.square()).sum()  # the regulariser is in H too
        assert 0.98 < float(found[j] / squared.sqrt()) < 1.02


@pytest.mark.parametrize("method", [Influence(damping=0.02), CG(damping=0.02, tol=1e-10), KFAC(0.02), EKFAC(0.02)])
def test_relative_influence_is_scores_over_size(method):
    task = mlp_task()
    fitted, G = method.fit(task), gradients.example_gradients(task, task.train)
    X = fitted.solver_.solve(G.T, 0.02)
    scores = fitted.scores().values
    assert torch.allclose(relative_influence(fitted).values, scores / (X.norm(dim=0) / 40), rtol=1e-6)
    by_loss = relative_influence(fitted, size=loss_change)
    assert torch.allclose(by_loss.values, scores / ((G.T * X).sum(0).sqrt() / 40), rtol=1e-6)
    assert by_loss.unit == "nats per unit of loss change (ranked only)" and not by_loss.is_effect


def test_mislabelled_examples_lead_influence_and_not_relative_influence():
    task = digits_task(n=200, n_test=40, trained=False)
    train, planted = data.flip_labels(task.train, 0.1, seed=0)
    task = replace(task, train=train)
    converge(task)
    fitted = Influence().fit(task)

    def share(scores):
        return float(torch.isin(scores.values.abs().topk(10, dim=1).indices, planted.rows).float().mean())

    assert share(fitted.scores()) > 0.5  # they are a tenth
    assert max(share(relative_influence(fitted, size=size)) for size in (theta_change, loss_change)) < 0.1


# Groups

def three_models(task):
    """TRAK over the task's model and two that a step away from it score otherwise."""
    models = [copy.deepcopy(task.model) for _ in range(2)]
    for k, model in enumerate(models):
        random = torch.Generator().manual_seed(k)
        for p in model.parameters():
            p.data += 0.3 * torch.randn(p.shape, generator=random).to(p)
    return TRAK(models=models, damping=0.02)


FITTED = [Influence(damping=0.02), CG(damping=0.02, tol=1e-10), KFAC(0.02), EKFAC(0.02), EKFAC(0.02, refine=3),
          Arnoldi(rank=5), DataInf(0.1), TRAK(damping=0.02), three_models]


@pytest.mark.parametrize("method", FITTED, ids=lambda m: getattr(m, "__name__", repr(m))[:40])
def test_to_first_order_a_group_is_the_sum_of_its_scores(method):
    task, ids = mlp_task(), [3, 17, 4, 39]
    fitted = (method(task) if method is three_models else method).fit(task)
    assert torch.equal(group_influence(fitted, ids), fitted.scores().values[:, ids].sum(1))
    few = fitted.task_.test.take([5, 2])
    assert torch.allclose(group_influence(fitted, torch.tensor(ids), few), group_influence(fitted, ids)[[5, 2]],
                          rtol=1e-6)
    if not isinstance(fitted, (CG, Influence)):
        exact = group_influence(Influence(damping=0.02, curvature=GGN).fit(task), ids)
        assert wrong_by(group_influence(fitted, ids), exact) > 0.01  # the method's own sum, no other's


@pytest.mark.parametrize("ids", [[4], [0, 7, 9, 12, 22], list(range(15))])
def test_on_a_quadratic_risk_second_order_is_retraining(ids):
    task = ridge()
    truth = retrained(task, ids).losses() - task.losses()
    for method in (Influence(), CG(tol=1e-10)):
        assert torch.allclose(group_influence(method.fit(task), ids, order=2), truth, rtol=1e-5, atol=1e-7)
        assert wrong_by(group_influence(method.fit(task), ids), truth) > 0.02


def test_second_order_beats_first_order_on_large_coherent_groups():
    """Half of a class of digits: the others of its class have to carry its weights alone, with less curvature."""
    train, test = (split.to(torch.float64) for split in data.load("digits"))
    task = Task(models.logistic(64, 10).double(), train.take(slice(400)), test.take(slice(50)), l2=1e-2)
    converge(task)
    fitted, products = Influence().fit(task), GradDot().fit(task).scores().values
    errors = {1: [], 2: [], "products": []}
    for label in (0, 1, 2):
        ids = (task.train.y == label).nonzero()[:, 0]
        ids = ids[:len(ids) // 2]
        truth = retrained(task, ids).losses() - task.losses()
        plain = products[:, ids].sum(1)
        for order in (1, 2):
            errors[order].append(wrong_by(group_influence(fitted, ids, order=order), truth))
        errors["products"].append(wrong_by(plain * (plain @ truth) / (plain @ plain), truth))  # at its best scale
    assert max(errors[2]) < 0.2 and min(errors[1]) > 0.4
    assert all(second < first / 3 for first, second in zip(errors[1], errors[2]))
    assert min(errors["products"]) > max(errors[2])


def test_second_order_mends_single_removals_on_a_network():
    task, fitted = mlp_task(), Influence().fit(mlp_task())
    for j in (0, 1, 2):
        truth = retrained(task, [j]).losses() - task.losses()
        assert wrong_by(group_influence(fitted, [j], order=2), truth) < \
            wrong_by(group_influence(fitted, [j]), truth) / 2


SOLVERS = [CG(damping=None), CG(damping=None, precondition=Nystroem(rank=9, damping=None)), KFAC(), EKFAC(),
           EKFAC(refine=2), Nystroem(rank=9, damping=None), LiSSA(damping=None), Arnoldi(rank=5, damping=None),
           DataInf(), TRAK(dim=16)]


@pytest.mark.parametrize("method", SOLVERS, ids=lambda m: repr(m)[:40])
def test_second_order_is_the_same_by_any_solver(method):
    task, ids = mlp_task(), [1, 5, 30]
    fitted = method.fit(task)
    exact = group_influence(Influence(fitted.damping_, GGN).fit(task), ids, order=2)
    assert wrong_by(group_influence(fitted, ids, order=2), exact) < 1e-5
    if not isinstance(method, (CG, LiSSA)):
        assert wrong_by(group_influence(fitted, ids), exact) > 0.05  # what the solver alone makes of it


@pytest.mark.parametrize("method", [Influence(), CG(), EKFAC()])
def test_second_order_in_float32_with_null_directions(method):
    """Where the softmax does not feel its biases all shifted, no rounding may pile up."""
    task, ids = digits_task(l2=1e-4), [1, 2, 3, 4]
    single = method.fit(task.to(torch.float32))
    exact = group_influence(Influence(single.damping_).fit(task), ids, order=2)
    assert wrong_by(group_influence(single, ids, order=2), exact) < 1e-4


def test_a_newton_step_that_stops_short_is_refused():
    task = mlp_task()
    fitted = Influence(damping=0.01).fit(task)
    w, push = torch.ones(40, dtype=torch.float64), gradients.example_gradients(task, task.train)[:3].sum(0)[:, None]
    X = derived.newton_step(fitted, w, push)
    assert torch.allclose(fitted.curvature_ @ X + 0.01 * X, push, atol=1e-6)
    one = type("One", (Eigen,), {"inverse_times": lambda self, B, damping: self.vectors[:, -1:] @ (
        self.vectors[:, -1:].T @ B)})  # of rank 1, as no Eigen should be
    fitted.solver_ = one(*vars(fitted.solver_).values())
    with pytest.raises(ValueError, match="residual of 0.001 at most, got .*: without the group the curvature is"):
        derived.newton_step(fitted, w, push)


def test_a_measure_drops_where_a_loss_rises():
    def log_probability(outputs, y):
        return -torch.nn.functional.cross_entropy(outputs, y, reduction="none")

    task, ids = digits_task(), [3, 4, 7]
    by_loss, by_measure = Influence().fit(task), Influence().fit(replace(task, measure=log_probability))
    for order in (1, 2):
        assert torch.allclose(group_influence(by_loss, ids, order=order), group_influence(by_measure, ids, order=order))
    assert torch.allclose(input_influence(by_loss, ids), input_influence(by_measure, ids))


# Inputs

@pytest.mark.parametrize("task", [digits_task, mlp_task], ids=["softmax regression", "network"])
def test_input_influence_is_the_derivative_of_retraining(task):
    task = task()
    found = input_influence(Influence().fit(task), [4, 11, 25])
    assert found.shape == (len(task.test), 3, 1, 3, 3)
    scale, identity = found.abs().max(), copy.copy(Influence().fit(task))
    identity.solver_ = type("Identity", (), {"solve": lambda self, B, damping: B})()
    plain = input_influence(identity, [4, 11, 25])
    differences = []
    for row, pixel in ((4, (0, 1, 2)), (11, (0, 0, 0)), (25, (0, 2, 1))):
        sides = []
        for step in (-1e-4, 1e-4):
            x = task.train.x.clone()
            x[(row, *pixel)] += step
            sides.append(retrained(replace(task, train=Split(x, task.train.y)), []).losses())
        differences.append((sides[1] - sides[0]) / 2e-4)
        column = [4, 11, 25].index(row)
        assert (found[(slice(None), column, *pixel)] - differences[-1]).abs().max() <= 1e-5 * scale
    plain = torch.stack([plain[:, 0, 0, 1, 2], plain[:, 1, 0, 0, 0], plain[:, 2, 0, 2, 1]])
    assert (plain / plain.abs().max() - torch.stack(differences) / scale).abs().max() > 0.1  # curvature is needed


def test_input_influence_by_another_solver_and_in_blocks():
    task = digits_task(n=23, model=conv_net(), trained=False)
    exact = input_influence(Influence(damping=0.3, curvature=GGN).fit(task), range(23))
    near = input_influence(CG(damping=0.3, tol=1e-10).fit(task), range(23), task.test.take([2, 0]))
    assert torch.allclose(near, exact[[2, 0]], atol=1e-8)
    one = input_influence(TRAK(damping=0.3).fit(task), [22])
    assert torch.isfinite(one).all() and one.shape == (9, 1, 1, 3, 3)


# All of them

def test_the_model_is_left_as_found():
    task = restless()
    before, random = snapshot(task.model), torch.get_rng_state()
    fitted = Influence(damping=1.0, curvature=GGN).fit(task)
    relative_influence(fitted)
    group_influence(fitted, [3, 5], order=2)
    assert input_influence(fitted, [3]).abs().max() > 0
    assert untouched(task.model, before) and torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("ids, words", [([3, 3, 4], "3 more than once"), ([5, 60, 70], "60$"), ([-1], "-1$"),
                                        ([], "none"), (torch.zeros(60) > 1, "a mask of 60"),
                                        ([1.0], r"numbers of torch.float32"), (slice(3), "slice: "), ("ab", "str: ")])
def test_impossible_groups_are_refused(ids, words):
    fitted = Influence().fit(digits_task())
    for ask in (group_influence, partial(group_influence, order=2), input_influence):
        with pytest.raises(ValueError, match=rf"different training ids in 0\.\.59, got {words}"):
            ask(fitted, ids)


def test_a_mean_over_several_models_has_no_theta():
    fitted = three_models(task := mlp_task()).fit(task)
    for ask in (theta_change, relative_influence, partial(input_influence, ids=[1]),
                partial(group_influence, ids=[1], order=2)):
        with pytest.raises(ValueError, match="of one model, whose theta moves, got TRAK with 2 further models"):
            ask(fitted)
    assert torch.isfinite(relative_influence(fitted, size=loss_change).values).all()


def test_loss_change_refuses_an_indefinite_hessian():
    task = digits_task(l2=0.01, model=models.mlp([9, 5, 4]), trained=False)  # at no minimum
    fitted = Influence().fit(task)
    count = int((fitted.self_influence() < 0).sum())
    assert 0 < count < 60
    for ask in (loss_change, partial(relative_influence, size=loss_change)):
        with pytest.raises(ValueError, match=f"got Hessian with g.T H.-1 g < 0 for {count} of 60 training examples"):
            ask(fitted)
    assert torch.isfinite(loss_change(Influence(damping=0.1, curvature=GGN).fit(task))).all()


def test_what_cannot_be_asked_is_refused():
    for ask in (relative_influence, partial(group_influence, ids=[1]), partial(input_influence, ids=[1])):
        with pytest.raises(TypeError, match="a method that inverts the curvature, got GradDot"):
            ask(GradDot().fit(digits_task()))
    with pytest.raises(ValueError, match="order must be 1 or 2, got 3"):
        group_influence(Influence().fit(digits_task()), [1], order=3)
    words = Task(torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Flatten()), Split(torch.tensor([[1], [2], [3]]),
                 torch.tensor([0, 1, 3])), Split(torch.tensor([[4]]), torch.tensor([2])), l2=0.1)
    with pytest.raises(TypeError, match="real inputs, got x of torch.int64"):
        input_influence(Influence(damping=0.1, curvature=GGN).fit(words), [1])
