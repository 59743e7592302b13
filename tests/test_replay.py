"""Runs that are replayed, and those that are refused."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from problems import Trained, digits_task
from torch import nn

from influence_nb import Unrolled, fit, models
from influence_nb.checks import snapshot, untouched
from influence_nb.gradients import risk_gradient
from influence_nb.task import cross_entropy

SGD, ADAM = torch.optim.SGD, torch.optim.Adam


def test_test_points_without_a_slope_decide_nothing():
    """torch's batched second derivative of GroupNorm at one example is wrong without a word: 11 + 11 + 1 of 23."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 2), nn.GroupNorm(1, 4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 4))
    trained = Trained(net=net, batch_size=11)
    order = trained.task.outputs()[:, 0].argsort(descending=True)
    most = float(trained.task.outputs()[order[1:3], 0].mean())  # the first two test points are beyond it

    def clipped(outputs, y):
        return outputs[:, 0].clamp(max=most)

    trained.task = replace(trained.task, measure=clipped)
    fitted, truth = trained.method().fit(trained.task, trained.start), trained.differences()[order]
    values = fitted.scores(trained.task.test.take(order.tolist())).values
    assert fitted.run_.batched == {11: False, 1: False} and not values[:2].any()
    assert (values - truth).norm() <= 1e-6 * truth.norm()


@pytest.mark.parametrize("other", [{"seed": 4}, {"epochs": 5}, {"batch_size": 7}, {"schedule": None},
                                   {"optimizer": partial(SGD, lr=0.05)}, {"optimizer": partial(ADAM, lr=0.1)}])
def test_another_run_is_refused(other):
    trained = Trained()
    with pytest.raises(ValueError, match=r"to end at the weights of the task's model, got .* must be those of the run"):
        trained.method(**other).fit(trained.task, trained.start)


@pytest.mark.parametrize("optimizer, dtype, other", [
    (partial(SGD, lr=1e-3), torch.float32, {"seed": 4}), (partial(ADAM, lr=1e-5), torch.float32, {"epochs": 2}),
    (partial(SGD, lr=1e-9), torch.float64, {"epochs": 2}), (partial(SGD, lr=1e-9), torch.float64, {"seed": 4})])
def test_another_run_is_refused_where_the_weights_moved_little(optimizer, dtype, other):
    """All these end nearer to the model than a share sqrt(eps) of its weights, with scores up to 2 times wrong."""
    trained = Trained(optimizer)
    task = trained.task.to(dtype)
    task.model.load_state_dict(trained.start)
    fit(task, **trained.run, progress=False)
    assert trained.method().fit(task, trained.start).scores().certificate["replay off by"] <= 0.01
    with pytest.raises(ValueError, match=r"got weights that differ by up to .*, where the way there is"):
        trained.method(**other).fit(task, trained.start)


def test_a_run_that_goes_no_way_needs_a_minimum():
    task = digits_task(n=23, model=models.mlp([9, 5, 4]), trained=False).to(torch.float32)
    for lr, start, cure in ((1e-5, None, "must be at a minimum"), (1e-12, task.model.state_dict(), "in float64")):
        with pytest.raises(ValueError, match=rf"expected a minimum, or .* {cure}"):
            Unrolled(3, 6, partial(SGD, lr=lr)).fit(task, start)
    task = digits_task(n=23)
    there, here = (Unrolled(50).fit(task, start).scores() for start in (task.model.state_dict(), None))
    assert torch.equal(there.values, here.values) and "replay off by" not in here.certificate
    assert here.certificate["gradient norm"] == float(risk_gradient(task).norm()) <= 1e-9


def test_a_refused_fit_leaves_the_method_as_it_was():
    trained, method = Trained(), Trained().method()
    other = digits_task(n=23, seed=4, model=models.mlp([9, 5, 4], seed=1), trained=False)
    with pytest.raises(ValueError, match="to end at the weights"):
        method.fit(other, trained.start)
    with pytest.raises(ValueError, match="has seen no task yet"):
        method.scores()
    before = method.fit(trained.task, trained.start).scores()
    with pytest.raises(ValueError, match="to end at the weights"):
        method.fit(other, trained.start)
    after = method.scores()
    assert torch.equal(after.values, before.values) and after.certificate == before.certificate
    assert after.task == before.task == trained.task.fingerprint()


def test_an_infinite_loss_is_named():
    def loss(outputs, y):
        return cross_entropy(outputs, y) + torch.where(y == 2, torch.inf, 0) * outputs[:, 0]

    task = digits_task(n=23, trained=False)
    start, first = copy.deepcopy(task.model.state_dict()), int((task.train.y == 2).nonzero()[0, 0])
    with pytest.raises(ValueError, match=f"the loss of training example {first} "):
        Unrolled(2, 6).fit(replace(task, loss=loss), start)


def test_another_start_is_refused():
    trained = Trained()
    with pytest.raises(ValueError, match=r"got a start at the model, .* a copy of the weights before the run: copy\."):
        trained.method().fit(trained.task, trained.task.model.state_dict())
    with pytest.raises(ValueError, match=r"give fit\(task, start\) the weights before the run"):
        trained.method().fit(trained.task)
    with pytest.raises(ValueError, match="state_dict of the task's own model, Sequential; got another's"):
        trained.method().fit(trained.task, models.logistic(9, 4).state_dict())
    with pytest.raises(ValueError, match="1 epoch or more, got epochs=0"):
        Unrolled(epochs=0).fit(trained.task)


def groups(weights):
    return SGD([{"params": weights[:1], "lr": 0.1}, {"params": weights[1:], "lr": 0.2}])


@pytest.mark.parametrize("optimizer, got", [
    (partial(SGD, lr=0.1, weight_decay=0.1), "SGD, weight_decay=0.1"), (partial(SGD, maximize=True), "maximize=True"),
    (partial(ADAM, amsgrad=True), "Adam, amsgrad=True"), (partial(ADAM, weight_decay=0.1), "Adam, weight_decay=0.1"),
    (torch.optim.AdamW, "AdamW"), (torch.optim.RMSprop, "RMSprop"), (groups, r"2 group\(s\)")])
def test_an_optimiser_without_a_rule_is_refused(optimizer, got):
    with pytest.raises(ValueError, match=rf"expected torch.optim.SGD .* or torch.optim.Adam .* got .*{got}"):
        Unrolled(optimizer=optimizer).fit(digits_task(n=23))


@pytest.mark.parametrize("layer", [nn.Dropout(0.1), nn.BatchNorm1d(9)])
def test_what_weights_alone_do_not_decide_is_refused(layer):
    task = digits_task(n=23, model=nn.Sequential(nn.Flatten(), layer, nn.Linear(9, 4)), trained=False)
    before, random = snapshot(task.model), torch.get_rng_state()
    with pytest.raises(ValueError, match="without dropout, and with GroupNorm or LayerNorm in place of BatchNorm"):
        Unrolled().fit(task)
    assert untouched(task.model, before) and torch.equal(random, torch.get_rng_state())
