"""The last layer alone: which one it is, its features, its curvature, and another one fitted in its place.

For a Linear layer that the model's outputs are those of, the layers before it make features [n, d], and what is left is
a model that is linear in its parameters: small enough for exact curvature, and for a refit to rounding.
"""

import copy
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .curvature import Hessian, output_hessians
from .gradients import function_gradient
from .layers import Hooks, known
from .newton import descend
from .parameters import parameters, penalty, theta
from .removal import begin
from .solve import Eigen
from .task import Split, Task, as_found, name_of

MOST = 6_000  # parameters of a last layer: its curvature then takes 288 MB, and its decomposition minutes


def begin_head(method, task: Task) -> None:
    """What a `fit` starts with that inverts the curvature of the last layer: see `begin`, and below.

    Sets `task_`, `fingerprint_`, `layer_`, the layer's name, and `head_`: the method, begun on the layer as a task of
    its own, with its exact curvature decomposed.
    """
    method.task_, method.fingerprint_, method.layer_ = task, task.fingerprint(), last_linear(task, method)
    method.head_ = head = replace(method)
    begin(head, alone(task, method.layer_, method), Hessian)
    H = curvature(head.task_)
    head.curvature_, head.solver_ = H.to(theta(head.task_)), Eigen.of(H)


def last_linear(task: Task, method) -> str:
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
    raise ValueError(f"{type(method).__name__} expected a model whose outputs [b, c] are those of a trained Linear "
                     "layer, and got one where they are not those of "
                     f"{', '.join(map(repr, linears)) or 'any, for it has none'}: leave what follows that layer, such "
                     "as a softmax or squeeze, to the loss, tie its weight to no other layer, or take another method")


def featured(task: Task, layer: str, split: Split) -> Split:
    """The same examples with the inputs of a layer, [n, d], as their x."""
    found = []
    for x in split.x.split(1000):
        with as_found(task.model), torch.no_grad(), Hooks({layer: task.model.get_submodule(layer)}) as calls:
            task.model(x)
        found.append(calls[layer][0][0])
    return replace(split, x=torch.cat(found))


def alone(task: Task, layer: str, method) -> Task:
    """The task of one Linear layer on its features: the same losses, and of the parameters only its own."""
    linear = copy.deepcopy(task.model.get_submodule(layer))
    if (p := sum(parameter.numel() for parameter in linear.parameters())) > MOST:
        raise ValueError(f"{type(method).__name__} decomposes a dense curvature, of {MOST:,} parameters at most, got "
                         f"{p:,} in {layer!r}: freeze all other layers with requires_grad_(False), then EKFAC() or "
                         "CG()")
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


class Refit(NamedTuple):
    """A last layer Theta [d, c], the norm of the risk's gradient there, and the passes over the features it took."""

    theta: Tensor
    gradient_norm: float
    passes: int


TOL, WORST = 1e-13, 1e-10  # |gradient| / (l2 |Theta|) to stop at, and above which a refit is no answer
REFRESH = 10               # steps after which the metric is made anew
NOISE = 1e-11              # of a sum of losses, relative: where all are small, that of the logits they come from
STALLED, PASSES = 10, 5_000  # refreshes that do not halve the gradient (one, below WORST), and passes, that end it


def refit(task: Task, phi: Tensor, targets: Tensor, c: int, l2: float) -> Refit:
    """The last layer at a stationary point of (1/n) sum_j loss(Theta^T phi_j, target_j) + (l2/2) |Theta|^2, in float64.

    Steps are quasi-Newton (see `newton`), in the metric of A (x) Phi^T Phi / n + l2, with A the mean Hessian of the
    loss in the outputs. Where there are more features than examples, Theta is sought in the span of these: the dual.

    Args:
        task: of which only the loss is used.
        phi: Tensor [n, d], float64.
        targets: Tensor [n, ...].

    Cost: two products [n, d] x [d, c] a pass, tens of passes where l2 is 1e-3 and hundreds where it is 1e-6; once the
    product [d, n] x [n, d] and its decomposition.

    Raises:
        ValueError: rounding keeps |gradient| above 1e-10 l2 |Theta|, or a loss is not finite.
    """
    (n, d), here = phi.shape, phi.new_zeros(phi.shape[1] * c)
    if n < d:
        Q, R = torch.linalg.qr(phi.T)
        found = refit(task, R.T, targets, c, l2)
        return found._replace(theta=Q @ found.theta)
    S, evaluate = torch.linalg.eigh(phi.T @ phi / n), partial(ridged, task, phi, targets, c, l2)
    pairs, passes, stalled, least, at = deque(maxlen=200), 1, 0, float("inf"), evaluate(here)
    while True:
        for point in descend(evaluate, here, metric(task, phi, targets, here.view(d, c), S, l2), at, NOISE, pairs):
            size, scale = float(point.slope.norm()), l2 * float(point.theta.norm())
            if size <= TOL * scale or point.steps == REFRESH:
                break
        here, at, passes = point.theta, (point.value, point.slope), passes + point.passes
        stalled = 0 if size < least / 2 else stalled + 1
        least = min(least, size)
        enough = TOL if stalled == 0 else WORST
        if size <= enough * scale or point.steps == 0 or stalled == STALLED or passes > PASSES or size != size:
            break
    if not size <= WORST * scale:
        raise ValueError(f"expected a stationary last layer, |gradient| <= {WORST:g} l2 |Theta| = {WORST * scale:.2g}, "
                         f"got {size:.2g} after {passes} passes, with l2={l2:g} and {name_of(task.loss)}: a larger l2")
    return Refit(here.view(d, c), size, passes)


def ridged(task: Task, phi: Tensor, targets: Tensor, c: int, l2: float, flat: Tensor) -> tuple[float, Tensor]:
    """The risk of a last layer Theta = flat [d c], and its gradient [d c]."""
    Theta = flat.view(-1, c)
    outputs = phi @ Theta                                                                   # [n, c]
    value = float(task.loss(outputs, targets).sum()) / len(phi) + l2 / 2 * float(flat.square().sum())
    slope = phi.T @ function_gradient(task.loss, outputs, targets) / len(phi) + l2 * Theta
    return value, slope.flatten()


def metric(task: Task, phi: Tensor, targets: Tensor, Theta: Tensor, S: tuple, l2: float) -> Callable:
    """R [d c, k] -> (|A| (x) S + l2)^-1 R, A the mean Hessian of the loss in the outputs of Theta [d, c], S by its
    eigenvalues and vectors."""
    outputs, c, (s, V) = phi @ Theta, Theta.shape[1], S
    rows = zip(outputs.split(step := max(1, 2**22 // c**2)), targets.split(step))
    a, U = torch.linalg.eigh(sum(output_hessians(task, o, t).sum(0) for o, t in rows) / len(phi))
    scale = s.clamp(min=0)[:, None] * a.abs() + l2                                          # [d, c]
    return lambda R: torch.stack([(V @ (V.T @ r.view(-1, c) @ U / scale) @ U.T).flatten() for r in R.T], dim=1)
