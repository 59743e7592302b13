import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from problems import conv_net, digits_task, mlp_task

from influence_nb import GradCos, GradDot, Split, TracIn, converge, cross_entropy, data, fit, gradients, models
from influence_nb.checks import restless, snapshot, untouched

sgd = partial(torch.optim.SGD, lr=0.02)


def trained(epochs, keep=lambda epoch: True, optimizer=sgd, batch_size=10, schedule=None, w=None):
    """Softmax regression after `epochs` of SGD from its initialisation, without regulariser, and its history."""
    task = digits_task(l2=0.0, trained=False)
    return task, fit(task, epochs, batch_size, optimizer, schedule, w, keep, progress=False)


def pearson_and_slope(predicted, actual):
    r = torch.corrcoef(torch.stack([predicted.flatten(), actual.flatten()]))[0, 1]
    return float(r), float((predicted * actual).sum() / predicted.square().sum())


def test_one_checkpoint_is_its_learning_rate_times_grad_dot():
    task, history = trained(3, schedule=lambda epoch: 0.5 ** epoch)
    products = GradDot().fit(task).scores().values
    assert torch.equal(TracIn().fit(task).scores().values, products)
    last = history.checkpoints[-1:]
    assert last[0].lr == pytest.approx(0.02 / 4)
    assert torch.allclose(TracIn(last).fit(task).scores().values, 0.005 * products, rtol=1e-12)
    all_three = TracIn(history.checkpoints).fit(task).scores()
    assert all_three.provenance["epochs"] == [1, 2, 3] and not all_three.is_effect
    one_by_one = sum(TracIn([c]).fit(task).scores().values for c in history.checkpoints)
    assert torch.allclose(all_three.values, one_by_one, rtol=1e-12)


def test_a_row_of_tracin_adds_up_to_the_fall_of_the_test_loss_times_the_batch_size():
    task, _ = trained(0)
    before = task.losses()
    history = fit(task, 40, 10, partial(torch.optim.SGD, lr=0.005), keep=lambda epoch: True, progress=False)
    fall = before - task.losses()
    estimate = TracIn(history.checkpoints).fit(task).scores().values.sum(1) / 10
    assert (estimate - fall).abs().max() <= 0.03 * fall.abs().max()  # a checkpoint stands for its epoch: order lr
    of_the_end = 40 * 0.005 * GradDot().fit(task).scores().values.sum(1) / 10
    assert (of_the_end - fall).abs().max() > 0.2 * fall.abs().max()


def test_tracin_follows_removal_in_a_short_training_and_not_in_a_long_one():
    measured = {}
    for epochs, lr in ((2, 0.02), (60, 0.05)):
        optimizer = partial(torch.optim.SGD, lr=lr)
        task, history = trained(epochs, optimizer=optimizer)
        estimate, truth = TracIn(history.checkpoints).fit(task).scores().values[:, :8] / 10, []
        for j in range(8):
            w = torch.ones(60, dtype=torch.float64)
            w[j] = 0
            truth.append(trained(epochs, optimizer=optimizer, w=w)[0].losses() - task.losses())
        measured[epochs] = pearson_and_slope(estimate, torch.stack(truth, 1))
    assert measured[2][0] >= 0.99 and 0.9 <= measured[2][1] <= 1.1  # off by the order of lr x steps
    assert measured[60][0] < 0.8 and measured[60][1] < 0.3  # the others have taken over its work


@pytest.mark.parametrize("net", [lambda: models.mlp([9, 5, 4]), conv_net])
def test_cosines_are_those_of_whole_gradients(net):
    task = digits_task(n=23, model=net(), trained=False)
    V, G = (gradients.example_gradients(task, split) for split in (task.test, task.train))
    expected = torch.nn.functional.cosine_similarity(V[:, None], G[None], dim=2)
    assert torch.allclose(GradCos().fit(task).scores().values, expected, atol=1e-12)
    assert torch.allclose(GradDot().fit(task).scores().values, V @ G.T, atol=1e-12)


def test_an_example_without_a_gradient_has_the_cosine_zero():
    task = digits_task(n=8, model=models.logistic(9, 4, bias=False), trained=False)
    x = task.train.x.clone()
    x[3] = 0
    scores = GradCos().fit(replace(task, train=Split(x, task.train.y))).scores().values
    assert (scores[:, 3] == 0).all() and (scores[:, 2] != 0).all()


def faint(outputs, y):
    """Cross-entropy of which each class has its own scale, down to 1e-24."""
    return cross_entropy(outputs, y) * 10.0 ** (-8.0 * y)


def test_the_cosine_of_gradients_whose_squares_underflow():
    task = digits_task(n=23, model=conv_net(), trained=False).to(torch.float32)
    small, plain = replace(task, loss=faint), GradCos().fit(task).scores().values
    found = GradCos().fit(small)
    assert torch.allclose(found.scores().values, plain, atol=1e-5)
    assert torch.allclose(found.self_influence(), torch.ones(23))
    lost = GradDot().fit(small).self_influence() == 0
    assert lost.any() and (plain[:, lost].abs() > 0.1).any()  # unscaled, their cosines would be 0 / 0


class Hole(torch.nn.Module):
    """Outputs that are no number where the first pixel is above 9."""

    def __init__(self):
        super().__init__()
        self.inner = models.logistic(9, 4).double()

    def forward(self, x):
        return self.inner(x) / (x.flatten(1)[:, :1] < 9)


def test_a_training_example_or_a_test_point_without_a_gradient_is_named():
    task, history = trained(2)
    x = task.train.x.clone()
    x[17, 0, 0, 0] = x[40, 0, 0, 0] = 10
    bad = replace(task, model=Hole(), train=Split(x, task.train.y))
    state = {"state": bad.model.state_dict()}
    checkpoints = [replace(checkpoint, **state) for checkpoint in history.checkpoints]
    for method in (GradDot(), GradCos(), TracIn(), TracIn(checkpoints)):
        fitted = method.fit(bad)
        for ask in (fitted.scores, fitted.self_influence):
            with pytest.raises(ValueError, match=r"the loss of training example 17 \(and 1 more\)"):
                ask()
        with pytest.raises(ValueError, match="NaN or infinity in row 2 of the test points"):
            method.fit(replace(task, model=Hole())).scores(Split(x, task.train.y).take([3, 4, 17]))


def test_self_influence_is_the_diagonal():
    task, history = trained(3)
    for method in (GradDot(), GradCos(), TracIn(history.checkpoints)):
        fitted = method.fit(task)
        assert torch.allclose(fitted.self_influence(), fitted.scores(task.train).values.diagonal(), rtol=1e-10)


def test_mislabelled_examples_lead_grad_dot_and_not_grad_cos():
    task = digits_task(n=200, n_test=40, trained=False)
    train, planted = data.flip_labels(task.train, 0.1, seed=0)
    task = replace(task, train=train)
    converge(task)
    share = {}
    for method in (GradDot(), GradCos()):
        strongest = method.fit(task).scores().values.abs().topk(10, dim=1).indices
        share[type(method)] = float(torch.isin(strongest, planted.rows).float().mean())
    assert share[GradDot] > 0.5 and share[GradCos] < 0.1  # they are a tenth of the examples


def test_checkpoints_run_on_copies():
    task = restless()
    checkpoints = fit(task, 2, 7, keep=lambda epoch: True, progress=False).checkpoints
    before, random, kept = snapshot(task.model), torch.get_rng_state(), copy.deepcopy(checkpoints[0].state)
    scores = TracIn(checkpoints).fit(task).scores()
    assert torch.isfinite(scores.values).all() and scores.values.std() > 0
    assert untouched(task.model, before) and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(kept[name], value) for name, value in checkpoints[0].state.items())
    assert "tensor" not in scores.method + repr(TracIn(checkpoints))


def test_a_checkpoint_of_another_model_is_refused():
    _, history = trained(1)
    with pytest.raises(ValueError, match="expected checkpoints of the task's own model, Sequential; got another's"):
        TracIn(history.checkpoints).fit(mlp_task(n=8))
