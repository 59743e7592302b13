import copy
from dataclasses import replace
from functools import partial
from math import ceil, sqrt

import numpy as np
import pytest
import torch
from problems import RULES, Trained, conv_net, digits_task, mlp_task, normed
from torch import nn

from influence_nb import Influence, Split, Task, TracIn, Unrolled, data, fit, models, pearson, spearman
from influence_nb.attribute import unrolled
from influence_nb.checks import snapshot, untouched
from influence_nb.parameters import theta

SGD, PLAIN = torch.optim.SGD, RULES["sgd"]


def away(values, truth):
    """The distance from the truth, as a share of it, at the scale that suits the values best."""
    return float((values * (values * truth).sum() / values.square().sum() - truth).norm() / truth.norm())


@pytest.mark.parametrize("name", RULES)
def test_scores_are_the_derivative_of_the_run(name):
    trained = Trained(RULES[name])
    scores, truth = trained.scores(), trained.differences()
    assert (scores.values - truth).norm() <= 1e-6 * truth.norm()
    assert scores.unit == "nats per removed example" and scores.certificate["steps"] == 16
    assert scores.certificate["replay off by"] <= 1e-15  # the same operations as torch's
    assert away(TracIn(trained.history.checkpoints).fit(trained.task).scores().values, truth) > 0.1
    assert away(Influence(damping=0.1).fit(trained.task).scores().values, truth) > 0.1


class Partly(nn.Module):
    """A frozen layer, a parameter that is never used, and an input that no gradient comes from."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.inner, self.out, self.spare = nn.Linear(9, 6), nn.Linear(7, 4), nn.Linear(2, 2)
        self.inner.requires_grad_(False)

    def forward(self, x):
        h = torch.tanh(self.inner(x.flatten(1)))
        return self.out(torch.cat([h, 0 * h[:, :1]], 1))


@pytest.mark.parametrize("net", [conv_net, normed, Partly])  # torch has no batched second derivative of GroupNorm
def test_any_network_by_any_rule(net):
    for optimizer in (RULES["nesterov"], RULES["adam"]):
        trained = Trained(optimizer, net())
        fitted, truth = trained.method().fit(trained.task, trained.start), trained.differences()
        assert (fitted.scores().values - truth).norm() <= 1e-6 * truth.norm()
        assert set(fitted.run_.batched) == {6, 5} and all(fitted.run_.batched.values()) == (net is not normed)


def test_a_measure_counts_as_its_drop():
    def margin(outputs, y):
        return outputs[:, 0] - outputs[:, 1]

    trained = Trained(measure=margin)
    scores, truth = trained.scores(), trained.differences()
    assert (scores.values - truth).norm() <= 1e-6 * truth.norm()
    assert scores.unit == "margin per removed example"


def test_without_a_start_it_tends_to_influence_at_a_minimum():
    task = digits_task()
    exact = Influence().fit(task).scores().values
    off = [float((Unrolled(epochs).fit(task).scores().values - exact).norm() / exact.norm()) for epochs in (100, 800)]
    assert off[1] <= 1e-6 < off[0] <= 0.1
    product = TracIn().fit(task).scores().values
    assert away(product, exact) > 0.1


def test_a_run_that_reaches_a_minimum_forgets_where_it_came_from():
    task = digits_task(n=30, n_test=7, trained=False)
    start = copy.deepcopy(task.model.state_dict())
    run = {"epochs": 400, "batch_size": 30, "optimizer": partial(SGD, lr=0.5, momentum=0.9)}
    fit(task, **run, progress=False)
    exact = Influence().fit(task).scores().values
    assert (Unrolled(**run).fit(task, start).scores().values - exact).norm() <= 1e-5 * exact.norm()


def test_it_predicts_reruns_with_less_of_an_example():
    trained = Trained(RULES["momentum"])
    values, before = trained.scores().values, trained.again(None)
    product = TracIn(trained.history.checkpoints).fit(trained.task).scores().values
    for share, bound in ((0.01, 1e-3), (1, 0.1)):  # the second order grows with the share
        truth = torch.stack([trained.moved(j, -share) - before for j in range(23)], 1)
        assert (share * values - truth).norm() <= bound * truth.norm()
        assert away(product, truth) > 0.1


def hinge(outputs, y):
    return (1 - outputs[:, 0] * (2 * y - 1)).clamp(min=0).square()


def test_examples_without_an_effect_do_not_make_a_run_rough():
    random = torch.Generator().manual_seed(0)
    x, model = torch.randn(30, 3, generator=random, dtype=torch.float64), models.logistic(3, 2).double()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.linear1.weight[0, 0] = 2.0
    y, start = (x[:, 0] > 0).long(), copy.deepcopy(model.state_dict())
    drawn = int(torch.randperm(30, generator=torch.Generator().manual_seed(0))[0])
    run = {"epochs": 2, "batch_size": 7, "optimizer": partial(SGD, lr=0.01)}
    for beyond in ([drawn], range(30)):  # the margin: 2 x 20 > 1
        x[beyond, 0] = 20 * (2 * y[beyond] - 1).double()
        model.load_state_dict(start)
        task = Task(model, Split(x, y), Split(x[:4], y[:4]), loss=hinge, l2=0.01, measure=lambda o, y: o[:, 0])
        fit(task, **run, progress=False)
        scores = Unrolled(**run).fit(task, start).scores()
        smooth, error = scores.certificate["smoothness"], scores.certificate["error of a removal"]
        assert scores.flags() == [] and not scores.values[:, beyond].any()
        if beyond == [drawn]:
            assert scores.values.any() and smooth >= 0.99 and error <= 0.1
        else:
            assert smooth is None and error is None


def test_a_copy_of_a_test_point_helps_it():
    task = digits_task(n=30, n_test=7, trained=False)
    x, y = task.train.x.clone(), task.train.y.clone()
    x[5], y[5] = task.test.x[2], task.test.y[2]
    planted = replace(task, train=Split(x, y))
    start = copy.deepcopy(task.model.state_dict())
    fit(planted, 3, 7, PLAIN, progress=False)
    scores = Unrolled(3, 7, PLAIN).fit(planted, start).scores()
    assert scores.values[2, 5] > 0 and 5 in scores.top(2).helpful


def test_few_states_are_kept_and_their_number_does_not_matter():
    trained = Trained(RULES["adam"], epochs=9)
    fitted = trained.method().fit(trained.task, trained.start)
    values, steps = fitted.scores().values, 36
    assert len(fitted.checkpoints_) == ceil(sqrt(steps)) == 6
    assert fitted.scores().certificate["bytes kept"] == 6 * 3 * 8 * len(theta(trained.task))
    for every in (1, 7, 36, 100):
        fitted.every_ = every
        fitted.checkpoints_, _ = unrolled.replayed(fitted.run_, every)
        assert len(fitted.checkpoints_) == ceil(steps / every)
        assert torch.equal(fitted.scores().values, values)


def test_test_points_do_not_see_each_other(monkeypatch):
    trained = Trained(RULES["nesterov"])
    fitted = trained.method().fit(trained.task, trained.start)
    whole = fitted.scores().values
    alone = torch.cat([fitted.scores(trained.task.test.take([i])).values for i in range(5)])
    assert torch.allclose(alone, whole, rtol=1e-10, atol=0)
    monkeypatch.setattr(unrolled, "BLOCK", 2 * fitted.run_.start.nbytes)  # two at a time, and a ragged last block
    assert torch.allclose(fitted.scores().values, whole, rtol=1e-10, atol=0)


def test_model_and_random_state_are_left_as_found():
    trained = Trained(RULES["adam"])
    trained.task.model.train()
    before, random, start = snapshot(trained.task.model), torch.get_rng_state(), copy.deepcopy(trained.start)
    first = trained.scores()
    assert untouched(trained.task.model, before) and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(start[name], trained.start[name]) for name in start)
    assert torch.equal(first.values, trained.scores().values)


def test_a_float32_run_is_replayed_and_agrees_with_float64():
    trained, task = Trained(RULES["momentum"]), Trained(RULES["momentum"]).task.to(torch.float32)
    task.model.load_state_dict(trained.start)
    fit(task, **trained.run, progress=False)
    scores, exact = trained.method().fit(task, trained.start).scores(), trained.scores().values
    assert scores.values.dtype == torch.float32 and scores.certificate["replay off by"] <= 1e-5
    assert (scores.values - exact).norm() <= 1e-5 * exact.norm()


def test_a_rough_run_says_so():
    measured = {}
    for lr in (0.02, 2.0):
        task = digits_task(n=100, n_test=17, l2=1e-3, model=models.mlp([9, 12, 4]), trained=False)
        start, run = copy.deepcopy(task.model.state_dict()), {"epochs": 10, "batch_size": 10,
                                                             "optimizer": partial(SGD, lr=lr, momentum=0.9)}
        fit(task, **run, progress=False)
        scores, before, effects = Unrolled(**run).fit(task, start).scores(), task.losses(), []
        for j in range(20):
            w = torch.ones(100, dtype=torch.float64)
            w[j] = 0
            again = replace(task, model=copy.deepcopy(task.model))
            again.model.load_state_dict(start)
            fit(again, **run, w=w, progress=False)
            effects.append(again.losses() - before)
        found = pearson(scores.values[:, :20].flatten(), torch.stack(effects, 1).flatten())
        measured[lr] = scores.certificate["smoothness"], scores.certificate["error of a removal"], float(found), scores
    smooth, rough = measured.values()
    assert smooth[0] >= 0.95 and smooth[1] <= 0.2 and smooth[2] >= 0.95 and "ROUGH" not in repr(smooth[3])
    assert rough[0] <= 0.3 and rough[1] >= 1 and rough[2] <= 0.3 and "ROUGH" in repr(rough[3])


def test_a_derivative_that_grows_beyond_all_numbers_is_refused():
    task = digits_task(n=100, n_test=17, l2=1e-3, model=models.mlp([9, 12, 4]), trained=False).to(torch.float32)
    start, run = copy.deepcopy(task.model.state_dict()), {"epochs": 40, "batch_size": 10,
                                                         "optimizer": partial(SGD, lr=2.0, momentum=0.9)}
    fit(task, **run, progress=False)
    with pytest.raises(ValueError, match=r"got infinity or NaN: the run is rough \(smoothness -?0"):
        Unrolled(**run).fit(task, start).scores()


def test_a_network_at_a_minimum():
    task = mlp_task()
    exact = Influence().fit(task).scores().values
    scores = Unrolled(300, optimizer=partial(SGD, lr=0.5, momentum=0.9)).fit(task).scores()
    assert (scores.values - exact).norm() <= 1e-4 * exact.norm()


def test_the_stored_experiment_adds_up():
    with np.load(data.shipped("unrolled_lds.npz"), allow_pickle=False) as file:
        stored = {name: file[name] for name in file.files}
    assert stored["methods"][0] == "Unrolled" and {"CG, Hessian", "EKFAC", "TRAK", "TracIn"} < set(stored["methods"])
    for k, (share, size) in enumerate((("1", 20), ("2", 40))):
        removed, truth = stored[f"removed_{share}"], stored[f"truth_{share}"]
        assert removed.shape == (120, size) and all(len(set(row)) == size for row in removed.tolist())
        found = [float(spearman(predicted, truth).mean()) for predicted in stored[f"predicted_{share}"]]
        assert np.allclose(found, stored["lds"][:, k, 0], atol=1e-4)  # predictions are kept in float32
        assert found[0] >= 0.95 and max(found[1:]) <= 0.75
        assert stored["lds"][0, k, 1] > stored["lds"][1:, k, 2].max()  # the intervals are far apart
    smoothness, _, one, two, _ = stored["run_facts"].T
    assert (one[smoothness < 0.5] < 0.75).all() and (np.minimum(one, two)[smoothness > 0.95] > 0.9).all()
