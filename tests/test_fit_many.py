import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from problems import conv_net, digits_task, normed
from torch import nn

from influence_nb import fit, fit_many, gradients, models, train
from influence_nb.checks import snapshot, untouched
from influence_nb.train import adam

MOMENTUM = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def halved(epoch):
    return 0.5**epoch


def frozen():
    net = conv_net()
    net[2].weight.requires_grad_(False)
    return net


def dropout():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(9, 6), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(6, 4))


def weights(m, n):
    w = 2 * torch.rand(m, n, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    w[0], w[1, ::2] = 1, 0
    return w


def alone(task, w, start=None, **settings):
    """One of the models, trained by `fit`."""
    task = replace(task, model=copy.deepcopy(task.model))
    if start is not None:
        with torch.no_grad():
            nn.utils.vector_to_parameters(start, (p for p in task.model.parameters() if p.requires_grad))
    return task, fit(task, w=w, progress=False, **settings)


@pytest.mark.parametrize("optimizer", [MOMENTUM, adam], ids=["momentum", "adam"])
@pytest.mark.parametrize("net", [partial(models.mlp, [9, 5, 4]), conv_net, frozen, normed, dropout],
                         ids=["mlp", "conv", "frozen", "normed", "dropout"])
def test_every_model_is_what_fit_makes_of_it(net, optimizer):
    task, w = digits_task(n=23, model=net(), trained=False), weights(5, 23)
    settings = {"epochs": 3, "batch_size": 7, "optimizer": optimizer, "schedule": halved, "seed": 4}  # 23 = 3 x 7 + 2
    before, random = snapshot(task.model), torch.get_rng_state()
    ensemble = fit_many(task, w, progress=False, **settings)
    assert untouched(task.model, before) and torch.equal(random, torch.get_rng_state())
    ends = []
    for i, row in enumerate(w):
        one, history = alone(task, row, **settings)
        assert torch.allclose(ensemble.thetas[i], gradients.theta(one), rtol=0, atol=1e-10)
        assert float(ensemble.risk[i]) == pytest.approx(history.risk[-1], abs=1e-10)
        assert torch.allclose(ensemble.losses()[i], one.losses(), rtol=0, atol=1e-10)
        ends.append(gradients.theta(one))
    assert min(float((a - b).norm()) for a, b in zip(ends, ends[1:])) > 1e-4  # w matters


def test_results_do_not_depend_on_how_many_are_trained_at_once(monkeypatch):
    task, w, found = digits_task(n=23, model=conv_net(), trained=False), weights(5, 23), []
    for block in (2**28, 1, 2**16):
        monkeypatch.setattr(train, "BLOCK", block)
        found.append(fit_many(task, w, 2, 7, MOMENTUM, progress=False).thetas)
    assert all(torch.allclose(thetas, found[0], rtol=0, atol=1e-12) for thetas in found[1:])


def test_an_ensemble_gives_outputs_losses_and_single_models_on_any_split():
    task, w = digits_task(n=23, model=conv_net(), trained=False), weights(5, 23)
    ensemble = fit_many(task, w, 2, 7, progress=False)
    few = task.train.take([3, 1, 8])
    assert len(ensemble) == 5 and ensemble.outputs(few).shape == (5, 3, 4)
    assert torch.allclose(ensemble.outputs(few, batch_size=2), ensemble.outputs(few), rtol=0, atol=1e-12)
    assert torch.equal(ensemble.losses(few)[4], ensemble[4].losses(few))
    assert torch.equal(ensemble.outputs()[1], ensemble[1].outputs()) and ensemble.losses().shape == (5, 9)
    assert torch.equal(gradients.theta(ensemble[3]), ensemble.thetas[3])
    assert not torch.equal(gradients.theta(task), ensemble.thetas[3])


def test_models_may_start_from_different_points():
    task, w = digits_task(n=23, model=models.mlp([9, 5, 4]), trained=False), weights(3, 23)
    starts = torch.stack([gradients.theta(replace(task, model=models.mlp([9, 5, 4], seed=s).double()))
                          for s in (7, 8, 9)])
    ensemble = fit_many(task, w, 2, 7, MOMENTUM, starts=starts, progress=False)
    for i in range(3):
        one, _ = alone(task, w[i], starts[i], epochs=2, batch_size=7, optimizer=MOMENTUM)
        assert torch.allclose(ensemble.thetas[i], gradients.theta(one), rtol=0, atol=1e-10)
    untrained = fit_many(task, w, 0, starts=starts.float().double(), progress=False)
    assert torch.equal(fit_many(task, w, 0, starts=starts.float(), progress=False).thetas, untrained.thetas)
    untrained = fit_many(task, w, 0, starts=starts, progress=False)
    assert torch.equal(untrained.thetas, starts) and untrained.risk.isnan().all()


class Counting(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(9, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.linear(x.flatten(1))


class Reading(nn.Linear):
    """Looks at a number in Python."""

    def forward(self, x):
        return super().forward(x.flatten(1)) * (1.0 if self.weight.sum().item() > 0 else 2.0)


@pytest.mark.parametrize("net, words", [
    (nn.Sequential(nn.Flatten(), nn.Linear(9, 4), nn.BatchNorm1d(4)), "train one by one, with fit .* running_mean"),
    (Counting(), r"one by one, with fit .* buffers \['calls'\] change"),
    (Reading(9, 4), r"one by one, with fit .*\.item\(\)"),
])
def test_models_that_vmap_cannot_run_are_refused_with_the_cure(net, words):
    task = digits_task(n=12, model=net, trained=False)
    before = snapshot(task.model)
    with pytest.raises(ValueError, match=f"(?s){words}"):
        fit_many(task, torch.ones(2, 12), 1, progress=False)
    assert untouched(task.model, before)


class Clipped(torch.optim.SGD):
    """SGD on gradients clipped by their joint norm."""

    def step(self, closure=None):
        nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 0.1)
        return super().step(closure)


def decayed(leaves):
    """Weight decay on matrices only, told by their dimensions, of which a stacked parameter has one more."""
    return torch.optim.AdamW([{"params": [p for p in leaves if p.ndim > 1]},
                              {"params": [p for p in leaves if p.ndim <= 1], "weight_decay": 0.0}])


@pytest.mark.parametrize("optimizer", [torch.optim.LBFGS, torch.optim.Adafactor, partial(Clipped, lr=0.1), decayed,
                                       partial(torch.optim.Adam, capturable=True)])  # the last needs a GPU
def test_optimisers_that_mix_models_are_refused(optimizer):
    task = digits_task(n=12, model=models.mlp([9, 5, 4]), trained=False)
    with pytest.raises(ValueError, match="steps every number by its own gradient"):
        fit_many(task, torch.ones(2, 12), 1, optimizer=optimizer, progress=False)


def endless(outputs, y):
    """A loss that is infinite for examples of class 0."""
    return outputs.square().sum(1) / y


@pytest.mark.parametrize("batch_size", [2, 12])
def test_an_infinite_loss_is_named(batch_size):
    task = digits_task(n=12, trained=False)
    train = replace(task.train, y=torch.ones(12).long().index_fill_(0, torch.tensor(5), 0))
    task, w = replace(task, train=train, loss=endless), torch.ones(2, 12)
    w[:, 5] = 0  # does not help: 0 x inf
    with pytest.raises(ValueError, match="the loss of training example 5 .* is not finite"):
        fit_many(task, w, 1, batch_size, progress=False)
    with pytest.raises(ValueError, match="the risk is nan in epoch 1 at the loss of training example 5"):
        fit(task, 1, batch_size, w=w[0], progress=False)


@pytest.mark.parametrize("call, words", [
    (lambda t: fit_many(t, torch.ones(12), 1), r"\[m, n\] = \(m, 12\) .* got \(12,\)"),
    (lambda t: fit_many(t, torch.ones(0, 12), 1), r"m of 1 or more, got \(0, 12\)"),
    (lambda t: fit_many(t, torch.ones(2, 9), 1), r"\[m, n\] = \(m, 12\) .* got \(2, 9\)"),
    (lambda t: fit_many(t, torch.ones(2, 12), 1, starts=torch.zeros(3, 40)), r"\(2, 40\), got \(3, 40\)"),
    (lambda t: fit_many(t, torch.ones(2, 12), 1, batch_size=0), "batch_size 1 or more"),
    (lambda t: fit_many(t, torch.tensor([[1.0], [1e300]]).double().expand(2, 12), 9, optimizer=MOMENTUM,
                        progress=False), r"of models \[1\] is not finite .* smaller learning rate"),
])
def test_bad_calls_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(digits_task(n=12, trained=False))
