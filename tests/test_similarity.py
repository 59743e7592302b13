import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from problems import Shared, digits_task, mlp_task
from torch import nn
from torch.nn import functional as F

from influence_nb import (
    GGN,
    Cosine,
    GradDot,
    Influence,
    LastLayer,
    Split,
    Task,
    converge,
    embed,
    fit,
    leave_one_out,
    models,
    pearson,
    removal_effects,
    slope,
    squared_error,
)
from influence_nb import head as last_layer
from influence_nb.checks import snapshot, untouched
from influence_nb.head import alone, curvature


@pytest.fixture(scope="module")
def net():
    """A converged network of 9-5-4 units on 40 examples; no test may change it."""
    return mlp_task()


def frozen(task, *trained):
    """The same task with a copy of its model of which only the named parameters are trained."""
    model = copy.deepcopy(task.model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return replace(task, model=model)


def last(task):
    return frozen(task, "linear2.weight", "linear2.bias")


def margin(outputs, y):
    own = outputs.gather(1, y[:, None])[:, 0]
    return own - outputs.mean(1)


def close(found, exact, tol=1e-10):
    return (found - exact).abs().max() <= tol * exact.abs().max()


def same(task, exact_task, damping=0.0):
    """Whether scores and self-influence are those of Influence on another task, to 1e-10."""
    found, exact = LastLayer(damping).fit(task), Influence(damping).fit(exact_task)
    return close(found.scores().values, exact.scores().values) and close(found.self_influence(), exact.self_influence())


@pytest.mark.parametrize("damping", [0.0, 1e-2, None])
def test_on_softmax_regression_it_is_influence(damping):
    task = digits_task()
    assert same(task, task, damping)
    found, exact = (method(damping).fit(task).scores().certificate for method in (LastLayer, Influence))
    assert found.keys() == exact.keys() and found["null directions"] == exact["null directions"] == (damping == 0)
    assert found["damping"] == pytest.approx(exact["damping"]) and max(found["residual"]) < 1e-10
    assert found["smallest eigenvalue"] == pytest.approx(exact["smallest eigenvalue"], rel=1e-6)


@pytest.mark.parametrize("damping", [0.0, 1e-2, None])
def test_on_a_network_it_is_influence_with_all_other_layers_frozen(net, damping):
    assert same(net, last(net), damping) and same(last(net), last(net), damping)
    whole, found = Influence(curvature=GGN).fit(net).scores().values, LastLayer().fit(net).scores().values
    assert not close(found, whole, 0.1)  # the other layers have their part


@pytest.mark.parametrize("trained", ["linear2.weight", "linear2.bias"])
def test_of_a_layer_only_what_is_trained_counts(net, trained):
    task = frozen(net, trained)
    assert same(task, task)


def test_without_a_bias_and_where_the_bias_is_regularised(net):
    bare = digits_task(n=41, model=models.mlp([9, 5, 4], bias=False), trained=False)
    assert same(bare, frozen(bare, "linear2.weight"))
    ridged = replace(net, regularised=lambda name: name == "linear2.bias")
    assert same(ridged, last(ridged), 1e-2)
    train, test = (replace(split, x=split.x.flatten(1)) for split in (net.train, net.test))
    layer = Task(models.logistic(9, 4).double()[1], train, test, l2=0.1, regularised=lambda name: name == "bias")
    assert same(layer, layer, 1e-2)  # the model is the layer itself


def test_the_closed_form_is_residual_times_similarity_times_residual(net):
    def factors(split):
        phi = F.pad(embed(net.model, split.x, "act1"), (0, 1), value=1.0)
        return phi, net.outputs(split).softmax(1) - F.one_hot(split.y, 4)

    (phi, r), (psi, v) = factors(net.train), factors(net.test)
    q = net.outputs(net.train).softmax(1)
    H = sum(torch.kron(a.diag() - a.outer(a), b.outer(b)) for a, b in zip(q, phi)) / 40
    H += torch.diag(torch.tensor([net.l2] * 5 + [0.0], dtype=H.dtype).repeat(4))
    K = torch.einsum("id,adbe,je->ijab", psi, torch.linalg.pinv(H).view(4, 6, 4, 6), phi) / 40
    assert close(LastLayer().fit(net).scores().values, torch.einsum("ia,ijab,jb->ij", v, K, r), 1e-8)


def test_its_curvature_is_the_ggn_of_the_layer_whatever_the_batches(net):
    head = alone(net, "linear2", "LastLayer")
    H = GGN(head).dense()
    for most in (1, 4 * 4 * 6 * 7, 2**24):
        assert close(curvature(head, most), H, 1e-12)


def test_scores_are_minus_the_slope_of_the_test_loss_in_the_weight_of_an_example_as_the_last_layer_retrains(net):
    task, ids, h = last(net), [3, 11, 25], 1e-3
    w = torch.ones(6, 40, dtype=torch.float64)
    for k, j in enumerate(ids):
        w[2 * k, j], w[2 * k + 1, j] = 1 - h, 1 + h
    moved = removal_effects(task, w, progress=False)                                        # [n_test, 6]
    measured = (moved[:, ::2] - moved[:, 1::2]) / (2 * h)
    assert close(LastLayer().fit(task).scores().values[:, ids], measured, 1e-5)


def test_where_only_the_last_layer_is_trained_it_follows_leave_one_out(net):
    task = replace(last(net), l2=5e-2)
    converge(task)
    truth = leave_one_out(task, range(40), progress=False)
    found, plain = LastLayer().fit(task).scores(), GradDot().fit(task).scores().values / 40

    def follows(values):  # 24 parameters on 40 examples: leverage lifts the slope
        return bool(pearson(values, truth).min() > 0.99 and (slope(values, truth) - 1).abs().max() < 0.35)

    assert found.unit == "nats per removed example" and follows(found.values) and not follows(plain)


def test_on_a_network_it_tells_more_of_leave_one_out_than_similarity_or_gradient_products():
    task = digits_task(60, 7, 1e-2, model=models.mlp([9, 8, 4], nn.Sigmoid), trained=False)
    fit(task, epochs=400, batch_size=60, optimizer=partial(torch.optim.Adam, lr=0.02), progress=False)
    converge(task)
    truth = leave_one_out(task, range(0, 60, 2), progress=False)
    r = {name: float(pearson(method.fit(base).scores().values[:, ::2], truth).median()) for name, method, base in (
        ("cosine", Cosine("act1"), task), ("product", GradDot(), last(task)), ("last layer", LastLayer(), task))}
    assert r["last layer"] > 0.65 > 0.55 > r["product"] > r["cosine"] + 0.1, r  # features of one sign: a metric matters


def test_a_measure_in_place_of_the_loss(net):
    task = replace(net, measure=margin)
    assert same(task, last(task))
    scores = LastLayer().fit(task).scores()
    assert scores.unit == "margin per removed example" and scores.is_effect


def quartic(outputs, y):
    """A loss of several outputs that is not convex in them."""
    return ((outputs - (y[:, None] == torch.arange(4)).to(outputs)) ** 4 / 4 - 6 * outputs ** 2).sum(1)


def test_other_losses_convex_or_not(net):
    random = torch.Generator().manual_seed(0)
    x, y = (torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((31, 3), (31,)))
    line = Task(models.mlp([3, 4, 1]).double(), Split(x[:25], y[:25]), Split(x[25:], y[25:]), squared_error, 0.1)
    assert same(line, last(line))
    bent = replace(net, loss=quartic)
    assert same(bent, last(bent), 0.05)
    assert LastLayer(0.05).fit(bent).scores().certificate["indefinite"]


def test_in_float32_to_its_rounding(net):
    found, exact = LastLayer().fit(net.to(torch.float32)), LastLayer().fit(net)
    assert found.scores().values.dtype == torch.float32
    assert close(found.scores().values.double(), exact.scores().values, 1e-4)
    assert close(found.self_influence().double(), exact.self_influence(), 1e-4)
    assert found.scores().certificate["null directions"] == 1


def test_forward_passes_in_batches_and_no_backward_pass():
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(1203, 3, generator=random), torch.randint(4, (1203,), generator=random)
    task = Task(models.mlp([3, 5, 4]), Split(x, y), Split(x[:7], y[:7]), l2=0.1)
    method, rows, graphs = LastLayer(), [], []
    task.fingerprint()
    handle = task.model.linear1.register_forward_hook(
        lambda module, inputs, out: rows.append(len(out)) or graphs.append(out.requires_grad))
    method.fit(task)
    fitted, _ = sum(rows), rows.clear()
    many = method.scores(task.train).values
    handle.remove()
    assert fitted == 2 * 1203 and 1203 <= sum(rows) <= 1203 + 3 and not any(graphs)
    few = task.train.take([1150, 3])
    scores = method.scores(few)
    assert scores.test_ids.tolist() == [1150, 3] and close(scores.values, many[[1150, 3]], 1e-5)


def test_what_is_recorded_and_what_is_left_as_found(net):
    task = net.to(torch.float64)
    before = snapshot(task.model)
    method = LastLayer(1e-3).fit(task)
    scores = method.scores()
    assert scores.task == task.fingerprint() and scores.provenance["layer"] == "linear2"
    assert scores.method == "LastLayer(damping=0.001)" and untouched(task.model, before)
    shared = digits_task(n=41, model=Shared(), trained=False)
    assert LastLayer().fit(shared).layer_ == "out"
    with torch.no_grad():
        task.model.linear1.weight.mul_(2)
    with pytest.raises(ValueError, match="the model has changed since LastLayer was fitted"):
        method.scores()
    with pytest.raises(ValueError, match="has changed since"):
        method.self_influence()


class Squeezed(nn.Linear):
    """A Linear layer that does something else, which its type does not show."""

    def forward(self, x):
        return super().forward(x).tanh()


ENDS = {"softmax": lambda: nn.Sequential(nn.Flatten(), nn.Linear(9, 4), nn.LogSoftmax(1)),
        "own type": lambda: nn.Sequential(nn.Flatten(), Squeezed(9, 4)),
        "convolution": lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten()),
        "frozen": lambda: nn.Sequential(nn.Flatten(), nn.Linear(9, 5), nn.Linear(5, 4).requires_grad_(False)),
        "twice": lambda: nn.Sequential(nn.Flatten(), layer := nn.Linear(9, 9), layer),
        "tied": lambda: tied(nn.Sequential(nn.Flatten(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 9)))}


def tied(model):
    model[3].weight = model[1].weight
    return model


@pytest.mark.parametrize("end, named", [("softmax", "those of '1'"), ("own type", "any, for it has none"),
                                        ("convolution", "any, for it has none"), ("frozen", "those of '1'"),
                                        ("twice", "those of '1'"), ("tied", "those of '1', '3'")])
def test_a_model_that_ends_otherwise_is_refused(end, named):
    task = digits_task(n=21, model=ENDS[end](), trained=False)
    with pytest.raises(ValueError, match=f"LastLayer expected a model whose outputs .* {named}"):
        LastLayer().fit(task)


def test_what_follows_the_layer_is_noticed_wherever_it_shows():
    x = torch.randn(1200, 3, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    x[1100:] *= 100
    model = nn.Sequential(nn.Linear(3, 4), nn.Hardtanh(-5.0, 5.0))
    task = Task(model, Split(x, torch.arange(1200) % 4), Split(x[:7], torch.arange(7) % 4), l2=0.1)
    with pytest.raises(ValueError, match="those of '0'"):
        LastLayer().fit(task)
    assert LastLayer().fit(replace(task, train=task.train.take(slice(1100)))).layer_ == "0"


def test_a_damping_that_makes_no_sense_and_a_layer_that_is_too_large_are_refused(net, monkeypatch):
    with pytest.raises(ValueError, match="damping must be 0 or more"):
        LastLayer(-1.0).fit(net)
    with pytest.raises(TypeError, match="damping must be a number or None"):
        LastLayer(GGN).fit(net)
    with pytest.raises(ValueError, match="singular in .* set damping"):
        LastLayer().fit(replace(net, train=net.train.take([1, 2]), l2=0.0)).scores()
    monkeypatch.setattr(last_layer, "MOST", 23)
    with pytest.raises(ValueError, match="of 23 parameters at most, got 24 in 'linear2': freeze all other layers"):
        LastLayer().fit(net)
