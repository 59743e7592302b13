"""The curvature of the risk: Hessian and generalised Gauss-Newton matrix (GGN), dense or as products with vectors.

Both are averaged over examples, never over batches, and both hold the regulariser:

    H = (1/n) sum_j w_j hess loss_j + l2 I_r          G = (1/n) sum_j w_j J_j^T L_j J_j + l2 I_r

with J_j = d outputs_j / d theta [c, p], L_j the Hessian of the loss in the outputs [c, c] and I_r the identity on the
regularised parameters. G is positive semidefinite where the loss is convex in the outputs, and equals H for a model
that is linear in its parameters. Source: Schraudolph (2002); Martens (2020), section 8.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from .gradients import batches, parameters, penalty, pullbacks, theta
from .task import Task, as_found


@dataclass(eq=False)
class Hessian:
    """The Hessian of the risk: `H @ V` for V [p] or [p, k], and `H.dense()` [p, p].

    A product costs one forward pass and two backward passes, plus one more backward for each further column.
    """

    task: Task
    w: Tensor | None = None
    batch_size: int = 500

    def __matmul__(self, V: Tensor) -> Tensor:
        columns = V.reshape(len(V), -1)
        total = penalty(self.task)[:, None] * columns
        with as_found(self.task.model), torch.enable_grad():
            for x, y, w in weighted_batches(self):
                total = total + self.batch_product(x, y, w, columns) / len(self.task.train)
        return total.reshape(V.shape)

    def batch_product(self, x, y, w, columns):
        weights = list(parameters(self.task).values())
        losses = self.task.loss(self.task.model(x), y)
        slopes = torch.autograd.grad((w * losses).sum(), weights, create_graph=True, allow_unused=True,
                                     materialize_grads=True)
        slope = flat(slopes)
        if not slope.requires_grad:  # the loss is linear in theta
            return torch.zeros_like(columns)
        return torch.stack([flat(pull(slope, weights, v)) for v in columns.T], dim=1)

    def dense(self) -> Tensor:
        """The matrix [p, p], symmetrised, from p products: for small models."""
        H = self @ torch.eye(len(theta(self.task))).to(theta(self.task))
        return (H + H.T) / 2


@dataclass(eq=False)
class GGN:
    """The generalised Gauss-Newton matrix of the risk: `G @ V` for V [p] or [p, k], and `G.dense()` [p, p].

    A product costs one forward and one backward pass and two backward passes a column. The dense matrix costs c
    backward passes over the training set and n c p^2 multiplications.
    """

    task: Task
    w: Tensor | None = None
    batch_size: int = 500

    def __matmul__(self, V: Tensor) -> Tensor:
        columns = V.reshape(len(V), -1)
        total = penalty(self.task)[:, None] * columns
        with as_found(self.task.model), torch.enable_grad():
            for x, y, w in weighted_batches(self):
                total = total + self.batch_product(x, y, w, columns) / len(self.task.train)
        return total.reshape(V.shape)

    def batch_product(self, x, y, w, columns):
        weights = list(parameters(self.task).values())
        outputs = self.task.model(x)
        probe = torch.zeros_like(outputs, requires_grad=True)
        pulled = flat(torch.autograd.grad(outputs, weights, probe, create_graph=True, allow_unused=True,
                                          materialize_grads=True))  # J^T probe, linear in probe
        L = w[:, None, None] * output_hessians(self.task, outputs.detach(), y)
        products = []
        for v in columns.T:
            Jv = pull(pulled, [probe], v)[0].reshape(len(x), -1, 1)                                # [b, c, 1]
            products.append(flat(pull(outputs, weights, (L @ Jv).reshape(outputs.shape))))
        return torch.stack(products, dim=1)

    def dense(self) -> Tensor:
        """The matrix [p, p] from c pulled-back factors of the output Hessians."""
        G = torch.diag(penalty(self.task))
        with as_found(self.task.model):
            for x, y, w in weighted_batches(self):
                pulled = pullbacks(self.task, x, lambda o, y=y: output_factors(self.task, o, y))
                rows = torch.stack(list(pulled))                                                   # [c, b, p]
                weighted = (w[:, None] * rows).flatten(0, 1)
                G = torch.addmm(G, weighted.T, rows.flatten(0, 1), alpha=1 / len(self.task.train))
        return (G + G.T) / 2


def weighted_batches(curvature):
    """(x, y, w) in blocks, w all 1 where the curvature has none."""
    task, size = curvature.task, curvature.batch_size
    w = torch.ones(len(task.train)).to(theta(task)) if curvature.w is None else curvature.w
    return ((x, y, wb) for (x, y), wb in zip(batches(task.train, size), w.split(size)))


def flat(pieces) -> Tensor:
    """One vector from the pieces of a gradient."""
    return torch.cat([piece.reshape(-1) for piece in pieces])


def pull(outputs, inputs, v):
    """The vector-Jacobian product v^T d outputs / d inputs, keeping the graph for the next v."""
    return torch.autograd.grad(outputs, inputs, v, retain_graph=True, allow_unused=True, materialize_grads=True)


def output_hessians(task: Task, outputs: Tensor, y: Tensor) -> Tensor:
    """The Hessian of every example's loss in its own outputs, [b, c, c]."""
    def one(o, yi):
        return task.loss(o.view(1, *outputs.shape[1:]), yi[None])[0]

    return vmap(jacrev(jacrev(one)))(outputs.reshape(len(outputs), -1), y)


def output_factors(task: Task, outputs: Tensor, y: Tensor) -> Tensor:
    """Square roots of the output Hessians, [c, b, ...]: L_i = sum_k f_k f_k^T over the first axis.

    Raises:
        ValueError: the loss is not convex in the outputs, so that there is no such root.
    """
    values, vectors = torch.linalg.eigh(output_hessians(task, outputs, y))                          # [b, c], [b, c, c]
    if values.min() < -1e-5 * max(1e-30, float(values.abs().max())):
        raise ValueError(f"the GGN needs a loss that is convex in the outputs, got an output Hessian with eigenvalue "
                         f"{values.min():.3g}: use curvature=Hessian")
    factors = vectors * values.clamp(min=0).sqrt()[:, None, :]
    return factors.permute(2, 0, 1).reshape(-1, *outputs.shape)

