import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from problems import digits_task, mlp_task
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

from influence_nb import (
    GradDot,
    LastLayer,
    Representer,
    RepresenterLJE,
    Split,
    Task,
    converge,
    embed,
    given_labels,
    head,
    inner_product,
    labelled,
    models,
    own_outputs,
    predicted,
    residuals,
    squared_error,
)
from influence_nb.checks import snapshot, untouched


@pytest.fixture(scope="module")
def net():
    """A converged network of 9-5-4 units on 40 examples; no test may change it."""
    return mlp_task()


def bare(sizes=(9, 5, 4), n=40, l2=2e-2):
    """A network whose last layer has no bias, at a minimum in that layer."""
    model = models.mlp(list(sizes)).double()
    last = f"linear{len(sizes) - 1}"
    setattr(model, last, nn.Linear(sizes[-2], sizes[-1], bias=False).double())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(last))
    task = digits_task(n, 7, l2, model=model, trained=False)
    converge(task, tol=1e-13)
    return task


def line(n=25, seed=0):
    """A regression task with 3 inputs and a hidden layer of 4 units, not trained."""
    random = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((n + 6, 3), (n + 6,)))
    return Task(models.mlp([3, 4, 1]).double(), Split(x[:n], y[:n]), Split(x[n:], y[n:]), squared_error, 0.1)


def features(task, split, layer="act1"):
    return F.pad(embed(task.model, split.x, layer), (0, 1), value=1.0)


def close(found, exact, tol=1e-10):
    return bool((found - exact).abs().max() <= tol * exact.abs().max())


def rbf(test, train):
    return (-0.5 * torch.cdist(test, train).square()).exp()


def own_logit(outputs, y):
    return outputs.gather(1, y[:, None])[:, 0]


def adds_up(values, outputs):
    return close(values.sum(1), outputs)


@pytest.mark.parametrize("method", [Representer(), Representer(target=own_outputs), Representer(l2=1e-6),
                                    Representer(l2=10.0), Representer(kernel=rbf)], ids=str)
def test_values_add_up_to_the_logits_of_the_refit_and_gradient_products_do_not(net, method):
    method = replace(method).fit(net)
    values, scores = method.values(), method.scores()
    assert values.shape == (7, 40, 4) and values.dtype == torch.float64 and adds_up(values, method.outputs())
    assert max(scores.certificate["reconstruction error"]) < 1e-10
    phi, l2 = features(net, net.train), scores.certificate["l2"]
    if method.kernel is inner_product:
        assert close(method.outputs(), features(net, net.test) @ method.theta_, 1e-14)
        size, apart = torch.linalg.norm, phi.T @ method.alpha_ - method.theta_
    else:  # Theta is a sum over the examples: its length is that of their weights, in the kernel
        K, apart = rbf(phi, phi), method.alpha_ - method.theta_
        size = lambda weights: (weights * (K @ weights)).sum().clamp(min=0).sqrt()  # noqa: E731
    assert size(apart) <= 1e-10 * size(method.theta_)  # the gradient over l2
    assert scores.certificate["gradient norm"] <= 1e-10 * l2 * size(method.theta_)
    products = torch.stack([GradDot().fit(one).scores().values for one in (
        replace(net, measure=lambda o, y, k=k: o[:, k]) for k in range(4))], 2) / (40 * net.l2)
    assert not close(products.sum(1), net.outputs(), 0.1)


def test_without_a_bias_and_at_a_minimum_it_is_the_network_itself_that_is_explained():
    task = bare()
    method = Representer().fit(task)
    assert adds_up(method.values(), task.outputs()) and close(method.outputs(task.train), task.outputs(task.train))
    certificate = method.scores().certificate
    assert certificate["same prediction"] == 1 and certificate["Pearson with the model's outputs"] > 1 - 1e-12
    assert certificate["l2"] == task.l2 and method.scores().provenance["bias"] == "none"


def test_with_a_free_bias_the_products_of_the_network_itself_leave_the_bias_over(net):
    phi, psi = features(net, net.train), features(net, net.test)
    alpha = (F.one_hot(net.train.y, 4) - net.outputs(net.train).softmax(1)) / (40 * net.l2)
    assert close(psi @ phi.T @ alpha + net.model.linear2.bias, net.outputs(), 1e-8)


def test_importances_are_residuals_over_n_l2_and_twice_the_papers_lambda_is_l2(net):
    phi = features(net, net.train)
    for target in (given_labels, own_outputs):
        method, l2 = Representer(l2=0.3, target=target).fit(net), 0.3
        q = (phi @ method.theta_).softmax(1)
        t = F.one_hot(net.train.y, 4).double() if target is given_labels else net.outputs(net.train).softmax(1)
        assert close(method.alpha_, (t - q) / (40 * l2), 1e-12)
        assert close(phi.T @ method.alpha_, method.theta_, 1e-11)
        assert close(method.global_importance(), (t - q).norm(dim=1) / (40 * l2), 1e-12)
        Theta, lam = method.theta_.clone().requires_grad_(), l2 / 2
        (-(t * (phi @ Theta).log_softmax(1)).sum(1).mean() + lam * Theta.square().sum()).backward()
        assert Theta.grad.norm() < 1e-12 and close(method.alpha_, (t - q) / (2 * lam * 40), 1e-12)


def test_the_refit_is_that_of_scikit_learn(net):
    l2, phi = 0.05, features(net, net.train).numpy()
    oracle = LogisticRegression(C=1 / (40 * l2), fit_intercept=False, solver="newton-cg", tol=1e-12, max_iter=1000)
    weights = torch.from_numpy(oracle.fit(phi, net.train.y.numpy()).coef_.T)
    assert close(Representer(l2=l2).fit(net).theta_, weights, 1e-7)
    assert not close(Representer(l2=2 * l2).fit(net).theta_, weights, 0.1)  # the paper's lambda taken for l2


@pytest.mark.parametrize("kernel", [inner_product, rbf])
@pytest.mark.parametrize("n", [25, 3])
def test_of_a_squared_error_importances_are_those_of_ridge_regression(kernel, n):
    task, l2 = line(n), 0.07
    method = Representer(l2=l2, kernel=kernel).fit(task)
    phi, psi = features(task, task.train), features(task, task.test)
    K, y = kernel(phi, phi), task.train.y
    assert close(method.alpha_[:, 0], torch.linalg.solve(K + n * l2 * torch.eye(n, dtype=torch.float64), y))
    oracle = KernelRidge(alpha=n * l2, kernel="precomputed").fit(K.numpy(), y.numpy())
    assert np.allclose(oracle.predict(kernel(psi, phi).numpy()), method.outputs()[:, 0], rtol=1e-9)
    assert close(method.scores().values.sum(1), method.outputs()[:, 0]) and method.scores().unit.startswith("outputs")


def test_with_more_features_than_examples_the_dual_finds_the_same_layer():
    random = torch.Generator().manual_seed(0)
    phi, y = torch.randn(15, 40, generator=random, dtype=torch.float64), torch.arange(15) % 3
    task = digits_task(n=21, n_test=5)
    found = head.refit(task, phi, y, 3, 1e-2)
    padded = torch.cat([phi, phi.new_zeros(40, 40)])  # 55 examples: 40 of them say nothing, in any layer
    silent = replace(task, loss=lambda o, t: F.cross_entropy(o, t.clamp(min=0), reduction="none") * (t >= 0))
    other = head.refit(silent, padded, torch.cat([y, -torch.ones(40, dtype=torch.long)]), 3, 1e-2 * 15 / 55)
    assert close(found.theta, other.theta, 1e-9) and found.passes < 100
    wide = bare((9, 60, 4), n=30)
    assert adds_up(Representer().fit(wide).values(), wide.outputs())


@pytest.mark.parametrize("l2", [1e-2, 1e-4, 1e-6])
def test_separable_classes_and_little_l2_take_more_passes_and_are_no_less_exact(l2):
    random = torch.Generator().manual_seed(1)
    y = torch.randint(4, (307,), generator=random)
    x = torch.randn(307, 20, generator=random, dtype=torch.float64) + 3 * torch.eye(20, dtype=torch.float64)[y]
    task = Task(models.logistic(20, 4).double(), Split(x[:300], y[:300]), Split(x[300:], y[300:]), l2=l2)
    method = Representer().fit(task)
    assert adds_up(method.values(), method.outputs()) and method.facts_["passes"] < 400  # found: 47, 128, 312


def test_a_score_is_the_share_of_the_output_that_is_asked_for(net):
    net = replace(net, test=replace(net.test, y=(net.test.y + torch.tensor([0, 1, 0, 0, 0, 2, 0])) % 4))
    method = Representer().fit(net)
    values, predictions, rows = method.values(), net.predict(), torch.arange(7)
    assert close(method.scores().values, values[rows, :, predictions], 1e-14)
    assert close(Representer(output=labelled).fit(net).scores().values, values[rows, :, net.test.y], 1e-14)
    lead = Representer(output=lambda o, y: predicted(o, y) - labelled(o, y)).fit(net).scores().values
    assert close(lead, values[rows, :, predictions] - values[rows, :, net.test.y], 1e-13)
    assert (lead[predictions == net.test.y] == 0).all()
    scores = method.scores(net.train.take([5, 30]))
    assert scores.test_ids.tolist() == [5, 30] and not scores.is_effect and scores.unit.startswith("logits")
    j, k = int(net.train.y[5]), int((net.train.y[5] + 1) % 4)
    own = method.values(net.train.take([5]))[0, 5]
    assert own[j] > 0 > own[k]  # its own label it excites, any other it inhibits


def test_for_two_classes_importance_ranks_as_the_loss_does():
    task = digits_task(n=41, n_test=6)
    task = replace(task, train=Split(task.train.x, task.train.y % 2), test=Split(task.test.x, task.test.y % 2),
                   model=models.logistic(9, 2).double())
    method = Representer().fit(task)
    losses = task.loss(method.outputs(task.train), task.train.y)
    assert torch.equal(method.global_importance().argsort(), losses.argsort())
    assert not torch.equal(GradDot().fit(task).self_influence().argsort(), losses.argsort())


def test_residuals_times_the_linear_kernel_are_gradient_products_of_the_last_layer():
    task = bare()
    task = replace(task, measure=lambda o, y: o[:, 2])
    found = Representer(importance=residuals, output=lambda o, y: labelled(o, 0 * y + 2)).fit(task).scores()
    assert close(found.values, GradDot().fit(task).scores().values) and found.unit == "importance x kernel"
    scaled = Representer(importance=lambda *given: residuals(*given) / (40 * task.l2)).fit(task)
    assert adds_up(scaled.values(), task.outputs()) and max(scaled.scores().certificate["reconstruction error"]) < 1e-10
    assert Representer(importance=residuals).fit(replace(task, l2=0.0)).alpha_.shape == (40, 4)


def test_local_expansion_is_influence_on_a_logit_and_a_constant(net):
    level = replace(net, measure=lambda o, y: own_logit(o, y) - o.mean(1))  # no constant added to all biases moves it
    method = RepresenterLJE(output=lambda o, y: labelled(o, y) - 1 / 4).fit(level)
    values, scores = method.values(), method.scores()
    assert adds_up(values, net.outputs()) and max(scores.certificate["reconstruction error"]) < 1e-10
    effects = LastLayer().fit(level).scores().values
    apart = scores.values - effects
    assert close(apart, apart.mean(1, keepdim=True).expand(-1, 40)) and scores.unit.startswith("logits")
    assert not close(scores.values, Representer(output=labelled).fit(net).scores().values, 0.5)
    assert scores.certificate["null directions"] == 1 and scores.provenance["layer"] == "linear2"


@pytest.mark.parametrize("output", [predicted, labelled, lambda o, y: predicted(o, y) - labelled(o, y)])
def test_local_scores_are_values_contracted_with_one_solve_for_each_test_point(net, output, monkeypatch):
    net = replace(net, l2=0.03, test=replace(net.test, y=(net.test.y + 1) % 4))  # at the minimum of another l2
    method, solved = RepresenterLJE(output=output, damping=1e-3).fit(net), []
    values, own = method.values(), net.outputs()
    inverse = head.Eigen.inverse_times
    monkeypatch.setattr(head.Eigen, "inverse_times", lambda self, B, *rest: solved.append(B) or inverse(self, B, *rest))
    scores = method.scores()
    assert sum(B.shape[1] for B in solved) == 7 and max(solved[0].shape) == 24
    assert close(scores.values, torch.einsum("mnc,mc->mn", values, output(own, net.test.y).double()), 1e-12)
    error = (values.sum(1) - own).norm(dim=1) / own.norm(dim=1)
    found = torch.tensor(scores.certificate["reconstruction error"], dtype=torch.float64)
    assert close(found, error) and found.min() > 1e-3


def test_local_expansion_adds_up_to_a_newton_step_where_there_is_no_minimum():
    task = digits_task(n=41, n_test=6, trained=False)
    found = RepresenterLJE(damping=0.1).fit(task)
    names = dict(task.model.named_parameters())
    flat = torch.cat([p.detach().flatten() for p in names.values()])

    def risk(theta):
        named = {"linear1.weight": theta[:36].view(4, 9), "linear1.bias": theta[36:]}
        outputs = torch.func.functional_call(task.model, named, (task.train.x,))
        return F.cross_entropy(outputs, task.train.y) + task.l2 / 2 * theta[:36].square().sum()

    H = torch.func.hessian(risk)(flat) + 0.1 * torch.eye(40, dtype=torch.float64)
    after = flat - torch.linalg.solve(H, torch.func.grad(risk)(flat))
    x = task.test.x.flatten(1)
    assert adds_up(found.values(), x @ after[:36].view(4, 9).T + after[36:])
    assert max(found.scores().certificate["reconstruction error"]) > 0.1  # of the model's own outputs


class Ended(nn.Module):
    """A network with something behind its last Linear layer."""

    def __init__(self, after):
        super().__init__()
        self.body, self.after = models.mlp([9, 5, 4]), after

    def forward(self, x):
        return self.after(self.body(x))


def test_a_layer_by_its_name_where_the_loss_is_the_same_without_what_follows():
    task = digits_task(n=41, n_test=6, model=Ended(nn.LogSoftmax(1)), trained=False)
    with pytest.raises(ValueError, match="Representer expected a model whose outputs"):
        Representer().fit(task)
    method = Representer(layer="body.linear2").fit(task)
    plain = replace(task, model=task.model.body)
    assert torch.equal(method.scores().values, Representer().fit(plain).scores().values)
    assert Representer(layer="linear2").fit(plain).layer_ == Representer().fit(plain).layer_
    with pytest.raises(ValueError, match="did you mean 'body.linear2'"):
        Representer(layer="linear2").fit(task)
    with pytest.raises(ValueError, match="expected the name of a Linear layer, got 'body.act1', a Tanh"):
        Representer(layer="body.act1").fit(task)
    for wrong, layer in ((task, "body.linear1"), (replace(task, model=Ended(nn.Tanh()).double()), "body.linear2")):
        with pytest.raises(ValueError, match=f"whose outputs have the model's losses, got '{layer}'"):
            Representer(layer=layer).fit(wrong)
    squeezed = nn.Sequential(models.mlp([3, 4, 1]), nn.Flatten(0)).double()
    ridge = replace(line(), model=squeezed)
    method = Representer(layer="0.linear2").fit(ridge)
    assert adds_up(method.values(), method.outputs()) and method.outputs().shape == (6, 1)


def test_in_float32_the_refit_is_in_float64_and_the_model_is_left_as_found(net):
    task = net.to(torch.float32)
    task.model.train()
    before, random = snapshot(task.model), torch.get_rng_state()
    method = Representer().fit(task)
    assert method.values().dtype == torch.float64 and adds_up(method.values(), method.outputs())
    assert close(method.values(), Representer().fit(net).values(), 1e-4)
    method.scores()
    assert untouched(task.model, before) and torch.equal(random, torch.get_rng_state())
    assert close(RepresenterLJE().fit(task).values().double(), RepresenterLJE().fit(net).values(), 1e-3)
    with torch.no_grad():
        task.model.linear1.weight.mul_(2)
    for ask in (method.scores, method.values, method.outputs, method.global_importance):
        with pytest.raises(ValueError, match="the model has changed since Representer was fitted"):
            ask()


def zeros(task, outputs):
    return torch.zeros(len(outputs), dtype=torch.float64)


def test_where_the_last_layer_is_zero_nothing_is_divided_by_it():
    task = line()
    certificate = Representer(target=zeros).fit(task).scores().certificate
    assert certificate["reconstruction error"] == [0.0] * 6 and certificate["gradient norm"] == 0
    x, y = digits_task(11, 3).train.x, torch.arange(4).repeat_interleave(11)  # each image once with every label
    silent = Task(models.mlp([9, 5, 4]).double(), Split(x.repeat(4, 1, 1, 1), y), Split(x[:3], y[:3]), l2=0.1)
    for target in (given_labels, lambda task, o: torch.full_like(o, 1 / 4)):
        method = Representer(target=target).fit(silent)
        assert method.theta_.abs().max() < 1e-14
        assert max(method.scores().certificate["reconstruction error"]) < 1e-8
    with torch.no_grad():
        silent.model.linear2.weight.zero_(), silent.model.linear2.bias.zero_()
    for method in (RepresenterLJE(damping=0.1), Representer(importance=residuals)):
        certificate = method.fit(silent).scores().certificate
        assert np.isfinite(certificate["reconstruction error"]).all()


@pytest.mark.parametrize("method, said", [
    (Representer(l2=0.0), "needs l2 above 0, got 0.0: Representer"), (Representer(l2=math.nan), "above 0, got nan"),
    (Representer(target=lambda task, o: o[:5]), r"target must give .* \(40,\) or \(40, 4\), got \(5, 4\)"),
    (Representer(importance=lambda task, o, t: o[:, 0]), r"importance must give .* \(40, 4\), got \(40,\)"),
    (Representer(importance=lambda task, o, t: o / 0), "importance .* with NaN or infinity"),
    (Representer(kernel=lambda a, b: a[:, :3] @ b[:3, :3].T), r"kernel must give .* \(40, 40\), got \(40, 3\)"),
    (Representer(kernel=lambda a, b: -a @ b.T), "symmetric positive semidefinite kernel, got one with eigenvalues -"),
    (Representer(kernel=lambda a, b: a @ b.T + a[:, :1]), "semidefinite kernel"),
    (Representer(l2=1e-18), "expected a stationary last layer, .* got .*: a larger l2"),
])
def test_what_cannot_be_is_refused(net, method, said):
    with pytest.raises(ValueError, match=said):
        replace(method).fit(net)


@pytest.mark.parametrize("method, error, said", [
    (Representer(l2="1e-3"), TypeError, "l2 must be a number, or None for the task's, got '1e-3'"),
    (Representer(target="labels"), TypeError, "target must be a function, got 'labels'"),
    (Representer(importance="residuals"), TypeError, "importance must be a function, got 'residuals'"),
    (RepresenterLJE(output=0), TypeError, "output must be a function, got 0"),
    (Representer(target=lambda task, o: task.train.y.numpy()), TypeError, "target must give a torch.Tensor, got nda"),
    (Representer(target=lambda task, o: task.train.y.double()), TypeError, r"got \(40,\) of torch.float64: "),
    (Representer(target=lambda task, o: o.softmax(1).float()), TypeError, r"chances .* got \(40, 4\) of torch.float32"),
    (Representer(target=lambda task, o: F.one_hot(task.train.y, 4)), TypeError, r"of torch.int64: .to\(torch.float64"),
    (Representer(target=lambda task, o: o), ValueError, r"target must give chances, .* sums .*: logits\? "),
    (Representer(target=lambda task, o: o.sigmoid()), ValueError, "target must give chances, 0 or more and 1 in sum"),
    (Representer(target=lambda task, o: task.train.y + 1), ValueError, r"class numbers in 0..3, got 1 to 4"),
    (Representer(kernel=lambda a, b: rbf(a, b).float()), TypeError, "kernel must give torch.float64, .* torch.float32"),
    (Representer(kernel=lambda a, b: rbf(a, b).numpy()), TypeError, "kernel must give a torch.Tensor, got ndarray"),
    (Representer(importance=lambda task, o, t: o.numpy()), TypeError, "importance must give a torch.Tensor"),
])
def test_what_is_of_a_wrong_type_is_refused_before_torch_does(net, method, error, said):
    with pytest.raises(error, match=said):
        replace(method).fit(net)


def test_targets_that_the_loss_would_spread_over_all_examples_are_refused():
    with pytest.raises(ValueError, match=r"squared_error .* expected \(25,\), got \(25, 25\) of targets \(25, 1\)"):
        Representer(target=lambda task, outputs: task.train.y[:, None]).fit(line())


def test_further_refusals(net, monkeypatch):
    with pytest.raises(ValueError, match="Whoever expected a model whose outputs"):
        head.last_linear(replace(net, model=Ended(nn.LogSoftmax(1)).double()), "Whoever")
    with pytest.raises(ValueError, match=r"output must give .* \(7, 4\), got \(7,\)"):
        Representer(output=own_logit).fit(net).scores()
    with pytest.raises(TypeError, match="labelled expected class numbers"):
        Representer(output=labelled).fit(line()).scores()
    with pytest.raises(ValueError, match="own_outputs expected cross_entropy or squared_error"):
        Representer(target=own_outputs).fit(replace(net, loss=lambda o, y: -own_logit(o.log_softmax(1), y)))
    with pytest.raises(ValueError, match="Representer has seen no task yet"):
        Representer().scores()
    monkeypatch.setattr(head, "MOST", 39)
    with pytest.raises(ValueError, match="for 39 training examples at most, got 40"):
        Representer(kernel=rbf).fit(net)
    assert Representer().fit(net).scores().certificate["passes"] < 100


def test_the_certificate_holds_the_sums_against_the_network_and_claims_nothing_where_nothing_varies():
    untrained = digits_task(40, 7, 2e-2, model=models.mlp([9, 5, 4]), trained=False)
    for method in (RepresenterLJE(damping=0.1), Representer(importance=residuals)):
        certificate = method.fit(untrained).scores().certificate
        assert max(certificate["reconstruction error"]) > 0.1 and certificate["same prediction"] < 1
        assert certificate["Pearson with the model's outputs"] < 0.9
    task = line()
    method = Representer().fit(task)
    assert "same prediction" not in method.scores().certificate
    assert "Pearson with the model's outputs" not in method.scores(task.test.take([0])).certificate
