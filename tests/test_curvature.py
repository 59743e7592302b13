import curvlinops
import pytest
import torch
from problems import Shared, conv_net, digits_task, normed
from torch import nn

from influence_nb import GGN, Hessian, Split, Task, gradients, models

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


def test_hessian_of_a_network_with_norms_equals_autograd():
    task = digits_task(n=7, l2=0.1, model=normed(), trained=False)

    def risk(flat):
        losses = task.loss(gradients.outputs_at(task, flat, task.train.x), task.train.y)
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
