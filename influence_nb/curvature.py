"""The curvature of the risk: Hessian and generalised Gauss-Newton matrix (GGN), dense or as products with vectors.

Both are averaged over examples, never over batches, and both hold the regulariser:

    H = (1/n) sum_j w_j hess loss_j + l2 I_r          G = (1/n) sum_j w_j J_j^T L_j J_j + l2 I_r

with J_j = d outputs_j / d theta [c, p], L_j the Hessian of the loss in the outputs [c, c] and I_r the identity on the
regularised parameters. G is positive semidefinite where the loss is convex in the outputs, and equals H for a model
that is linear in its parameters. Source: Schraudolph (2002); Martens (2020), section 8.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.func import jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from .blocks import narrow
from .gradients import Gradients, batches, dense, function_gradient, loss_slopes
from .parameters import parameters, penalty, weights
from .task import Task, as_found, cross_entropy, name_of


@dataclass(eq=False)
class Hessian:
    """The Hessian of the risk: `H @ V` for V [p] or [p, k], and `H.dense()` [p, p].

    A product costs one forward pass and two backward passes, plus one more backward for each further column.
    """

    task: Task
    w: Tensor | None = None
    batch_size: int = 200

    def __matmul__(self, V: Tensor) -> Tensor:
        columns, w = V.reshape(len(V), -1), weights(self.task, self.w)
        total = penalty(self.task)[:, None] * columns
        with as_found(self.task.model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # has second derivatives
            for (x, y), wb in zip(batches(self.task.train, self.batch_size), w.split(self.batch_size)):
                total = total + self.batch_product(x, y, wb, columns) / len(w)
        return total.reshape(V.shape)

    def batch_product(self, x, y, w, columns):
        named = list(parameters(self.task).values())
        losses = self.task.loss(self.task.model(x), y)
        slope = flat(torch.autograd.grad((w * losses).sum(), named, create_graph=True, allow_unused=True,
                                         materialize_grads=True))
        if not slope.requires_grad:  # the loss is linear in theta
            return torch.zeros_like(columns)
        return torch.stack([flat(torch.autograd.grad(slope, named, v, retain_graph=True, allow_unused=True,
                                                     materialize_grads=True)) for v in columns.T], dim=1)

    def dense(self) -> Tensor:
        """The matrix [p, p], for small models.

        Row by row, each only from its own parameter on: what lies before it in a network drops out of its backward
        pass, and the other half is known by symmetry.
        """
        named, w = list(parameters(self.task).values()), weights(self.task, self.w)
        H = torch.diag(penalty(self.task))
        with as_found(self.task.model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for (x, y), wb in zip(batches(self.task.train, self.batch_size), w.split(self.batch_size)):
                part, start = (wb * self.task.loss(self.task.model(x), y)).sum() / len(w), 0
                slopes = torch.autograd.grad(part, named, create_graph=True, allow_unused=True, materialize_grads=True)
                for k, slope in enumerate(slopes):
                    for row, entry in enumerate(slope.reshape(-1) if slope.requires_grad else (), start):
                        H[row, start:] += flat(torch.autograd.grad(entry, named[k:], retain_graph=True,
                                                                   allow_unused=True, materialize_grads=True))
                    start += slope.numel()
        return H.triu() + H.triu(1).T


def output_hessians(task: Task, outputs: Tensor, y: Tensor) -> Tensor:
    """The Hessian of every example's loss in its own outputs, [b, c, c].

    For cross-entropy, diag(q) - q q^T of the predicted chances q; in float64, as q - q^2 cancels where q is near 1.
    """
    if task.loss is cross_entropy:
        q = outputs.double().softmax(-1)
        return torch.diag_embed(q) - q[:, :, None] * q[:, None]

    def one(o, yi):
        return task.loss(o.view(1, *outputs.shape[1:]), yi[None])[0]

    return vmap(jacrev(jacrev(one)))(outputs.reshape(len(outputs), -1), y)


def output_factors(task: Task, outputs: Tensor, y: Tensor) -> Tensor:
    """Square roots of the output Hessians, [m, b, ...]: L_i = sum_k f_k f_k^T over the first axis.

    m = c, and c - 1 for cross-entropy: with s = sqrt(q) of the predicted chances, L = diag(s) (I - s s^T) diag(s), and
    the bracket projects onto the columns but the first of the reflection that takes s to -e_1.

    Raises:
        ValueError: the loss is not convex in the outputs, so that there is no such root.
    """
    if task.loss is cross_entropy:
        s = outputs.double().softmax(-1).sqrt()                                                     # [b, c]
        one = torch.eye(s.shape[1]).to(s)
        u = s + one[0]
        reflected = one[1:, None] - u.T[1:, :, None] * (2 / u.square().sum(1))[:, None] * u         # [c - 1, b, c]
        return (s * reflected).to(outputs)
    values, vectors = torch.linalg.eigh(output_hessians(task, outputs, y))                          # [b, c], [b, c, c]
    if values.min() < -1e-5 * max(1e-30, float(values.abs().max())):
        raise ValueError(f"the GGN needs a loss that is convex in the outputs, got an output Hessian with eigenvalue "
                         f"{values.min():.3g}: use curvature=Hessian")
    factors = vectors * values.clamp(min=0).sqrt()[:, None, :]
    return factors.permute(2, 0, 1).reshape(-1, *outputs.shape)


@dataclass(eq=False)
class GGN:
    """The generalised Gauss-Newton matrix of the risk: `G @ V` for V [p] or [p, k], and `G.dense()` [p, p].

    The rows of the Jacobian, weighted with a root of each output Hessian, are pulled back once, in c backward passes
    over the training set, and kept as factors where they fit into memory (see `Gradients`). A product then costs two
    products of these rows with V: no backward pass, and all columns at once. The dense matrix costs n c p^2.

    Args:
        w: Tensor [n] of training weights; None for all 1.
        vectors: what is pulled back from the outputs; see `Fisher` and `EmpiricalFisher` for others.
        name: how it is called in records.
    """

    task: Task
    w: Tensor | None = None
    batch_size: int | None = None
    vectors: Callable = output_factors
    name: str = "GGN"

    def __post_init__(self):
        self.rows = Gradients(self.task, self.task.train, self.vectors, self.batch_size)

    def __matmul__(self, V: Tensor) -> Tensor:
        columns, w = V.reshape(len(V), -1), weights(self.task, self.w)
        product = self.rows.gram(columns, w) / len(w)
        return (product + penalty(self.task)[:, None] * columns).reshape(V.shape)

    def dense(self) -> Tensor:
        """The matrix [p, p]."""
        G, w = torch.diag(penalty(self.task)), weights(self.task, self.w)
        for where, blocks in self.rows:
            b, m = w[where], len(next(iter(blocks.values())).squares())
            for part in torch.arange(len(b)).split(max(1, 2**26 // (m * len(G)))):  # [m, b, p] as dense rows at a time
                rows = dense(self.task, {name: narrow(block, part) for name, block in blocks.items()})
                add_upper(G, (b[part, None] * rows).flatten(0, 1).T / len(w), rows.flatten(0, 1))
        return G.triu() + G.triu(1).T

    def trace(self) -> float:
        """The sum of the eigenvalues."""
        w = weights(self.task, self.w)
        return float((w @ self.rows.squared_norms()) / len(w) + penalty(self.task).sum())


def Fisher(task: Task, w: Tensor | None = None, batch_size: int | None = None, samples: int = 1, seed: int = 0) -> GGN:
    """The Fisher matrix from `samples` labels an example, drawn from the model's own softmax: unbiased for the GGN.

    The draw depends on the seed and on the batch, so that every pass over the training set makes the same.

    Cost: `samples` backward passes in place of c. For cross-entropy only, where exact Fisher and GGN are one matrix.
    Source: Martens (2020), section 5.
    """
    def sampled_slopes(task, outputs, y):
        chances = outputs.double().softmax(-1).cpu()
        random = torch.Generator().manual_seed(hash((seed, float(chances.square().sum()))) % 2**63)
        labels = torch.multinomial(chances, samples, replacement=True, generator=random).T.to(y.device)
        slopes = [function_gradient(task.loss, outputs, drawn) for drawn in labels]
        return torch.stack(slopes) / samples ** 0.5

    if task.loss is not cross_entropy:
        raise ValueError(f"Fisher draws labels from a softmax and needs cross_entropy, got {name_of(task.loss)}: "
                         "use GGN")
    return GGN(task, w, batch_size, sampled_slopes, "Fisher")


def add_upper(G: Tensor, left: Tensor, right: Tensor, blocks: int = 8) -> None:
    """Add left @ right, known to be symmetric, to G [p, p] in place: the blocks on and above the diagonal only."""
    edges = torch.linspace(0, len(G), blocks + 1).long().tolist()
    for start, end in pairwise(edges):
        G[start:end, start:] += left[start:end] @ right[:, start:]


def LeadingGGN(task: Task, w: Tensor | None = None, batch_size: int | None = None, rank: int = 1) -> GGN:
    """The GGN with every output Hessian cut to its `rank` leading eigenvectors and scaled to keep its trace.

    Cost: `rank` backward passes in place of c, with no noise: where a network doubts between two classes, one vector
    holds most of a softmax's Hessian. Good for the factors of K-FAC, no substitute for G in a solve.
    """
    def leading_factors(task, outputs, y):
        L = output_hessians(task, outputs, y)
        values, vectors = torch.linalg.eigh(L)
        values, vectors = values[:, -rank:].clamp(min=0), vectors[:, :, -rank:]
        share = L.diagonal(dim1=1, dim2=2).sum(1) / values.sum(1).clamp(min=torch.finfo(L.dtype).tiny)
        factors = vectors * (values * share[:, None]).sqrt()[:, None, :]
        return factors.permute(2, 0, 1).reshape(-1, *outputs.shape).to(outputs)

    return GGN(task, w, batch_size, leading_factors, "LeadingGGN")


def EmpiricalFisher(task: Task, w: Tensor | None = None, batch_size: int | None = None) -> GGN:
    """The second moment of the training gradients, (1/n) sum_j w_j g_j g_j^T + l2 I_r: no curvature in general.

    It equals the Fisher matrix only where the labels are as the model predicts them, and vanishes where the training
    set is fitted. Source: Kunstner, Balles & Hennig (2019).
    """
    return GGN(task, w, batch_size, loss_slopes, "EmpiricalFisher")


def rule_of_thumb(G: GGN) -> float:
    """The damping where none is given: a tenth of the mean eigenvalue of G, trace / (10 p).

    G is the method's own where it is of that kind (LeadingGGN's trace is near the GGN's), and else the GGN.

    Source: the rule of Grosse et al. (2023), section 2.3.1, there for each layer, here for the whole matrix: damping
    is one number everywhere.
    """
    return G.trace() / len(penalty(G.task)) / 10


def flat(pieces) -> Tensor:
    """One vector from the pieces of a gradient."""
    return torch.cat([piece.reshape(-1) for piece in pieces])
