import curvlinops
import pytest
import torch
from problems import Shared, conv_net, digits_task, normed
from torch import nn

from influence_nb import GGN, EmpiricalFisher, Fisher, Hessian, Split, Task, gradients, models, parameters
from influence_nb.curvature import LeadingGGN, output_hessians
from influence_nb.gradients import loss_slopes

NETS = {"logistic": lambda: models.logistic(9, 4), "mlp": lambda: models.mlp([9, 5, 4]), "conv": conv_net,
        "shared": Shared}


def oracle(operator, task):
    """The same matrix from curvlinops, over ragged batches of the training set, with the regulariser added."""
    batches = list(zip(task.train.x.split(4), task.train.y.split(4)))
    names = gradients.parameters(task)
    linop = operator(task.model.eval(), nn.CrossEntropyLoss(), list(names.values()), batches)
    p = sum(v.numel() for v in names.values())
    return linop @ torch.eye(p, dtype=torch.float64) + torch.diag(gradients.penalty(task))


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("ours, theirs", [(Hessian, curvlinops.HessianLinearOperator),
                                          (GGN, curvlinops.GGNLinearOperator)])
def test_curvature_equals_curvlinops(net, ours, theirs):
    task = digits_task(n=11, l2=0.1, model=NETS[net](), trained=False)
    expected = oracle(theirs, task)
    dense = ours(task, batch_size=4).dense()
    assert (dense - expected).norm() <= 1e-10 * expected.norm()
    V = torch.randn(len(dense), 3, dtype=torch.float64)
    assert (ours(task, batch_size=4) @ V - expected @ V).norm() <= 1e-10 * (expected @ V).norm()
    assert torch.allclose(ours(task) @ V[:, 0], expected @ V[:, 0])


@pytest.mark.parametrize("net", NETS)
def test_the_empirical_fisher_equals_curvlinops(net):
    task = digits_task(n=11, l2=0.1, model=NETS[net](), trained=False)
    expected = oracle(curvlinops.EFLinearOperator, task)
    assert (EmpiricalFisher(task, batch_size=4).dense() - expected).norm() <= 1e-10 * expected.norm()
    assert (GGN(task).dense() - expected).norm() > 0.1 * expected.norm()  # no curvature


def test_the_fisher_is_the_ggn_in_expectation():
    """Over all labels with the model's chances exactly; over n_s drawn ones to their noise, which falls as 1/sqrt(n_s).
    """
    task = digits_task(n=11, l2=0.1, model=conv_net(), trained=False)
    G = GGN(task).dense()

    def every_label(task, outputs, y):
        slopes = torch.stack([loss_slopes(task, outputs, torch.full_like(y, k))[0] for k in range(4)])
        return slopes * outputs.softmax(1).T[..., None].sqrt()

    assert (GGN(task, vectors=every_label).dense() - G).norm() <= 1e-12 * G.norm()
    few, many = ((Fisher(task, samples=n).dense() - G).norm() / G.norm() for n in (4, 1600))
    assert 0.002 < many < 0.05 and 10 < few / many < 40  # sqrt(400) = 20
    assert torch.equal(Fisher(task, samples=2, seed=1).dense(), Fisher(task, samples=2, seed=1).dense())


def test_the_leading_ggn_keeps_the_trace_and_is_the_ggn_at_full_rank():
    task = digits_task(n=11, l2=0.1, model=models.mlp([9, 5, 4]), trained=False)
    G, cut = GGN(task), LeadingGGN(task)
    assert (LeadingGGN(task, rank=4).dense() - G.dense()).norm() <= 1e-12 * G.dense().norm()
    L = output_hessians(task, task.outputs(task.train), task.train.y)
    F = cut.vectors(task, task.outputs(task.train), task.train.y)
    assert torch.allclose(F.square().sum((0, 2)), L.diagonal(dim1=1, dim2=2).sum(1), atol=1e-14)
    difference = (cut.dense() - G.dense()).norm() / G.dense().norm()
    assert 0.5 < difference < 1  # an untrained network doubts between all classes: one vector does not hold that


def test_hessian_of_a_network_with_norms_equals_autograd():
    task = digits_task(n=7, l2=0.1, model=normed(), trained=False)

    def risk(flat):
        losses = task.loss(parameters.outputs_at(task, flat, task.train.x), task.train.y)
        return losses.mean() + 0.5 * (gradients.penalty(task) * flat.square()).sum()

    expected = torch.autograd.functional.hessian(risk, gradients.theta(task))
    assert (Hessian(task, batch_size=3).dense() - expected).norm() <= 1e-10 * expected.norm()


def test_hessian_and_ggn_agree_for_linear_models_and_differ_for_others():
    linear = digits_task(n=12)
    assert torch.allclose(Hessian(linear).dense(), GGN(linear).dense(), atol=1e-12)
    curved = digits_task(n=12, model=models.mlp([9, 5, 4]), trained=False)
    assert (Hessian(curved).dense() - GGN(curved).dense()).norm() > 0.05 * GGN(curved).dense().norm()


def test_training_weights_enter_and_n_stays_n():
    task = digits_task(n=12)
    w = torch.ones(12, dtype=torch.float64)
    w[3] = 0
    kept = [i for i in range(12) if i != 3]
    smaller = Task(task.model, task.train.take(kept), task.test, l2=0.0)
    expected = GGN(smaller).dense() * 11 / 12 + torch.diag(gradients.penalty(task))
    assert torch.allclose(GGN(task, w).dense(), expected, atol=1e-13)
    assert torch.allclose(Hessian(task, w).dense(), expected, atol=1e-12)


def test_the_ggn_refuses_a_loss_that_is_not_convex_in_the_outputs():
    def cosine_loss(outputs, y):
        return torch.cos(outputs).sum(1)

    x, y = torch.rand(6, 3, dtype=torch.float64), torch.zeros(6).long()
    task = Task(models.logistic(3, 2).double(), Split(x, y), Split(x, y), loss=cosine_loss)
    with pytest.raises(ValueError, match="convex in the outputs, got an output Hessian with eigenvalue -"):
        GGN(task).dense()


@pytest.mark.parametrize("gap", [12, 18, 25])
@pytest.mark.parametrize("curvature", [GGN, LeadingGGN, EmpiricalFisher])
def test_a_sure_model_keeps_its_curvature_in_float32(curvature, gap):
    task = digits_task(n=12, l2=0.0, model=models.logistic(9, 4), trained=False)
    with torch.no_grad():
        outputs = task.model(task.train.x)
        sure = Split(task.train.x, outputs.argmax(1))
        task.model.linear1.weight *= gap / (outputs.topk(2, 1).values.diff(dim=1).abs().median())
    expected = curvature(Task(task.model, sure, task.test)).dense()
    found = curvature(Task(task.model, sure, task.test).to(torch.float32)).dense().double()
    assert (found - expected).norm() <= 1e-4 * expected.norm()


def test_fisher_draws_the_same_labels_in_every_pass():
    F = Fisher(digits_task(n=23, trained=False), samples=2)
    F.rows.keeps, F.rows.batch_size = False, 5
    V = torch.randn(len(gradients.theta(F.task)), 2, dtype=torch.float64)
    assert torch.equal(F @ V, F @ V)


@pytest.mark.parametrize("w", [torch.ones(1), torch.ones(11, 1), torch.full((11,), float("nan"))])
@pytest.mark.parametrize("curvature", [GGN, Hessian])
def test_training_weights_of_another_shape_are_refused(curvature, w):
    task = digits_task(n=11, trained=False)
    with pytest.raises(ValueError, match=r"training weights w must be \[n\] = \(11,\) and finite, got"):
        curvature(task, w) @ gradients.theta(task)
