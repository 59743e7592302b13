from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Shared, Tied, conv_net, digits_task, normed

from influence_nb import Task, gradients, models, parameters
from influence_nb.checks import restless, snapshot, untouched

NETS = {"logistic": lambda: models.logistic(9, 4), "mlp": lambda: models.mlp([9, 5, 4]), "conv": conv_net,
        "shared": Shared, "tied": Tied, "normed": normed}


def one_by_one(task, split):
    """Gradients [n, p] by plain autograd, one example at a time."""
    rows = []
    for x, y in zip(split.x, split.y):
        loss = task.loss(task.model.eval()(x[None]), y[None])[0]
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, gradients.parameters(task).values())]))
    return torch.stack(rows)


@pytest.mark.parametrize("net", NETS)
def test_example_gradients_equal_autograd_one_by_one(net):
    task = digits_task(n=11, model=NETS[net](), trained=False)
    got = gradients.example_gradients(task, task.train, batch_size=4)  # a ragged last batch
    assert torch.allclose(got, one_by_one(task, task.train), atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(batch_size=st.integers(1, 13), seed=st.integers(0, 3))
def test_batch_size_does_not_matter(batch_size, seed):
    task = digits_task(n=11, seed=seed, model=conv_net(seed), trained=False)
    whole = gradients.example_gradients(task, task.train)
    assert torch.allclose(gradients.example_gradients(task, task.train, batch_size=batch_size), whole, atol=1e-13)
    w = torch.rand(11, dtype=torch.float64)
    by_rows = (w @ whole) / 11 + gradients.penalty(task) * gradients.theta(task)
    assert torch.allclose(gradients.risk_gradient(task, w, batch_size), by_rows, atol=1e-13)


def test_the_regulariser_acts_on_weights_and_not_on_biases():
    task = digits_task(n=5, l2=0.3, model=models.mlp([9, 5, 4]), trained=False)
    penalty = parameters.unflatten(task, gradients.penalty(task))
    assert {name: float(v.unique()) for name, v in penalty.items()} == {
        "linear1.weight": 0.3, "linear1.bias": 0.0, "linear2.weight": 0.3, "linear2.bias": 0.0}
    everything = replace(task, regularised=lambda name: True)
    assert (gradients.penalty(everything) == 0.3).all()


def test_products_are_the_same_kept_or_streamed():
    task = digits_task(n=23, model=conv_net(), trained=False)
    X = torch.randn(len(gradients.theta(task)), 3, dtype=torch.float64)
    kept, streamed = gradients.Gradients(task, task.train), gradients.Gradients(task, task.train, keep=0)
    for _ in range(2):
        assert torch.allclose(kept @ X, streamed @ X, atol=1e-12)
    assert streamed.kept is None and kept.kept is not None


def test_batchnorm_dropout_and_frozen_layers_are_left_as_found():
    task = restless()
    before, random = snapshot(task.model), torch.get_rng_state()
    gradients.example_gradients(task, task.train)
    gradients.risk_gradient(task)
    assert untouched(task.model, before) and torch.equal(random, torch.get_rng_state())
    assert isinstance(task, Task) and task.model.training
