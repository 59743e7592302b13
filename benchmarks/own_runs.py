"""This project's side of the comparison with other libraries: each method as its users call it, on plain tensors."""

import torch
from torch import Tensor

from influence_nb import CG, EKFAC, GGN, KFAC, TRAK, DataInf, GradDot, Influence, Nystroem, Split, Task, gradients


def task_of(model, train_x, train_y, test_x, test_y, dtype=torch.float32) -> Task:
    task = Task(model, Split(train_x, train_y), Split(test_x, test_y))
    return task if dtype is torch.float32 else task.to(dtype)


def floor(model, train_x, train_y, test_x, test_y, damping) -> Tensor:
    """One forward and backward pass over the training images, and one matrix product [n_test, w] [w, n_train].

    w is the number of inputs and outputs of all layers, the least that a product of gradients can be made of. With
    w = p, as for gradients that are formed, the product alone would be 90 times as much for the MLP.
    """
    gradients.risk_gradient(task_of(model, train_x, train_y, test_x, test_y))
    w = sum(sum(p.flatten(1).shape) for p in model.parameters() if p.ndim > 1)
    return torch.ones(len(test_x), w) @ torch.ones(w, len(train_x))


def products(model, train_x, train_y, test_x, test_y, damping) -> Tensor:
    """The gradient products alone, as the peers return them: no fingerprint of model and data, no record."""
    task = task_of(model, train_x, train_y, test_x, test_y)
    return gradients.Gradients(task, task.test).dot(gradients.Gradients(task, task.train))


def scores(model, train_x, train_y, test_x, test_y, damping, method, dtype=torch.float32, **settings) -> Tensor:
    """Fit and score from a bare model, certificate included."""
    settings |= {} if method is GradDot else {"damping": damping}
    return method(**settings).fit(task_of(model, train_x, train_y, test_x, test_y, dtype)).scores().values


def own(method, **settings) -> tuple:
    return "influence_nb", scores, {"method": method, **settings}, None


METHODS = {
    "floor": ("influence_nb", floor, {}, None),
    "own_products": ("influence_nb", products, {}, None),
    "own_graddot": own(GradDot),
    "own_kfac": own(KFAC),
    "own_ekfac": own(EKFAC),
    "own_ekfac_all_outputs": own(EKFAC, curvature=GGN),
    "own_ekfac_refined": own(EKFAC, refine=10),
    "own_datainf": own(DataInf),
    "own_trak": own(TRAK, dim=2048),
    "own_nystroem": own(Nystroem, rank=400),
    "own_cg": own(CG, tol=1e-3),
    "own_exact_ggn": own(Influence, curvature=GGN),
    "oracle_graddot": own(GradDot, dtype=torch.float64),
    "oracle": own(CG, tol=1e-9, dtype=torch.float64),
}
