"""Similarity in an embedding: bare, and with the two factors that make influence of it.

A last Linear layer of features phi (a 1 appended for the bias) has, for the example j, the gradient r_j (x) phi_j, with
r_j = d loss_j / d outputs the residual: the predicted chances less the label, for cross-entropy. Influence through that
layer is therefore

    S[i, j] = r_i^T K_ij r_j,    K_ij = (1/n) (I (x) phi_i)^T (H + damping)^-1 (I (x) phi_j)    [c, c]
    H = (1/n) sum_j L_j (x) phi_j phi_j^T + l2 I_r

residual of the test point x similarity of the features in the metric of the inverse curvature x residual of the
training example. L_j is the loss's Hessian in the outputs. A cosine of features has neither residual, nor the metric.
"""

import copy
from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..curvature import Hessian, output_hessians
from ..embedding import embed
from ..layers import Hooks, known
from ..parameters import parameters, penalty, theta
from ..removal import begin, removal_scores, self_influence
from ..scores import Scores
from ..solve import Eigen
from ..task import Split, Task, as_found, asked


@dataclass
class Cosine:
    """The cosine of the angle between two embeddings, in -1..1: ranked only, no removal effect.

    The baseline: it knows neither labels nor the loss.

    Args:
        layer: a name from `model.named_modules()`; "" for the outputs.

    Raises:
        ValueError: (fit) there is no such layer.
    """

    layer: str = ""

    def fit(self, task: Task) -> "Cosine":
        """Embed the training set."""
        self.task_, self.fingerprint_ = task, task.fingerprint()
        self.train_ = F.normalize(embed(task.model, task.train.x, self.layer), dim=1)
        return self

    def scores(self, split: Split | None = None) -> Scores:
        """Similarities [n_test, n_train] of the task's test points, or of `split`."""
        task, split = asked(self, split)
        test = F.normalize(embed(task.model, split.x, self.layer), dim=1)
        return Scores(test @ self.train_.T, f"Cosine(layer={self.layer!r})", self.fingerprint_, split.ids,
                      task.train.ids,
                      unit="cosine similarity (ranked only)")


MOST = 6_000  # parameters of a last layer: its curvature then takes 288 MB, and its decomposition minutes


@dataclass
class LastLayer:
    """Influence through the last layer alone, the layers before it held fixed: exact for a model that is linear in it.

    What it misses is how the features would move. What a score is, its sign and its unit: see `removal`. All facts in
    the certificate are the last layer's.

    Cost: fit, two forward passes over the training set, and of the layer, with p = c x (d + 1) parameters, the
    curvature (n_train c^2 d^2) and its decomposition (p^3); scores, one forward pass over the test points and the
    product of [n_test, p] with [p, n_train], whose second factor is never formed. No backward pass through the model.

    Args:
        damping: added to the curvature; None for a tenth of the last layer's mean eigenvalue.

    Raises:
        ValueError: (fit) the model's outputs are not those of a trained Linear layer with a weight of its own, or it
            has over 6,000 parameters
            (its Kronecker form is EKFAC's, with the other layers frozen).

    Source: Koh & Liang (2017), eq. 2; the factors of logistic regression, their section 2.3.
    """

    damping: float | None = 0.0

    def fit(self, task: Task) -> "LastLayer":
        """Make the last layer a task of its own, on its features, and decompose its curvature."""
        self.task_, self.fingerprint_, self.layer_ = task, task.fingerprint(), last_linear(task)
        self.head_ = head = replace(self)
        begin(head, alone(task, self.layer_), Hessian)
        H = curvature(head.task_)
        head.curvature_, head.solver_ = H.to(theta(head.task_)), Eigen.of(H)
        return self

    def scores(self, split: Split | None = None) -> Scores:
        """Scores [n_test, n_train] of the task's test points, or of `split`."""
        task, split = asked(self, split)
        found = removal_scores(self.head_, featured(task, self.layer_, split))
        return replace(found, task=self.fingerprint_, provenance={**found.provenance, "layer": self.layer_})

    def self_influence(self) -> Tensor:
        """The rise [n_train] of each training example's own loss on its removal."""
        asked(self, None)
        return self_influence(self.head_)


def last_linear(task: Task) -> str:
    """The name of the trained Linear layer whose outputs are the model's."""
    linears = {name: module for name, module in known(task.model).items() if type(module) is nn.Linear}
    owners = Counter(id(parameter) for _, parameter in task.model.named_parameters(remove_duplicate=False))
    left = {name: module for name, module in linears.items() if owners[id(module.weight)] == 1}
    for x in task.train.x.split(1000):
        with as_found(task.model), torch.no_grad(), Hooks(left) as calls:
            outputs = task.model(x)
        left = {name: left[name] for name, made in calls.items()
                if len(made) == 1 and outputs.ndim == 2 and torch.equal(made[0][2], outputs)}
    if left:
        return next(iter(left))
    raise ValueError("LastLayer expected a model whose outputs [b, c] are those of a trained Linear layer, and got one "
                     f"where they are not those of {', '.join(map(repr, linears)) or 'any, for it has none'}: leave "
                     "what follows that layer, such as a softmax or squeeze, to the loss, tie its weight to no other "
                     "layer, or take another method")


def featured(task: Task, layer: str, split: Split) -> Split:
    """The same examples with the inputs of a layer, [n, d], as their x."""
    found = []
    for x in split.x.split(1000):
        with as_found(task.model), torch.no_grad(), Hooks({layer: task.model.get_submodule(layer)}) as calls:
            task.model(x)
        found.append(calls[layer][0][0])
    return replace(split, x=torch.cat(found))


def alone(task: Task, layer: str) -> Task:
    """The task of one Linear layer on its features: the same losses, and of the parameters only its own."""
    linear = copy.deepcopy(task.model.get_submodule(layer))
    if (p := sum(parameter.numel() for parameter in linear.parameters())) > MOST:
        raise ValueError(f"LastLayer decomposes a dense curvature, of {MOST:,} parameters at most, got {p:,} in "
                         f"{layer!r}: freeze all other layers with requires_grad_(False), then EKFAC() or CG()")
    seen = featured(task, layer, task.train)
    return replace(task, model=linear, train=seen, test=seen,
                   regularised=lambda own: task.regularised(f"{layer}.{own}".lstrip(".")))


def curvature(head: Task, most: int = 2**22) -> Tensor:
    """H [p, p] of a Linear layer's task in float64, exact for every loss.

    Args:
        most: numbers of memory for a batch.
    """
    phi = F.pad(head.train.x, (0, 1), value=1.0).double()                                   # [n, d + 1]
    outputs, (n, d), c = head.outputs(head.train), phi.shape, len(head.model.weight)
    H, step = phi.new_zeros(c, d, c, d), max(1, most // (c * d))
    for a, o, y in zip(phi.split(step), outputs.split(step), head.train.y.split(step)):
        L = output_hessians(head, o, y).to(a)                                               # [b, c, c]
        for k in range(c):  # the blocks from the diagonal on
            H[k, :, k:] += (a.T @ (L[:, k, k:, None] * a[:, None]).flatten(1)).view(d, c - k, d) / n
    places = torch.arange(c * d).view(c, d)
    order = {"weight": places[:, :-1].flatten(), "bias": places[:, -1]}
    order = torch.cat([order[name] for name in parameters(head)])                           # as theta has them
    H = H.view(c * d, c * d)
    return (H.triu() + H.triu(1).T)[order][:, order] + torch.diag(penalty(head).double())
