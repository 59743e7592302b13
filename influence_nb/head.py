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
from .task import Split, Task, as_found, cross_entropy, name_of

MOST = 6_000  # parameters of a last layer: its curvature then takes 288 MB, and its decomposition minutes


def begin_head(method, task: Task) -> None:
    """What a `fit` starts with that inverts the curvature of the last layer: see `begin`, and below.

    Sets `task_`, `fingerprint_`, `layer_`, the layer's name, and `head_`: the method, begun on the layer as a task of
    its own, with its exact curvature decomposed.
    """
    asker = type(method).__name__
    method.task_, method.fingerprint_, method.layer_ = task, task.fingerprint(), last_linear(task, asker)
    method.head_ = head = replace(method)
    begin(head, alone(task, method.layer_, asker), Hessian)
    H = curvature(head.task_)
    head.curvature_, head.solver_ = H.to(theta(head.task_)), Eigen.of(H)


def last_linear(task: Task, asker: str) -> str:
    """The name of the trained Linear layer whose outputs are the model's; errors speak of the asker, a method's name.
    """
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
    raise ValueError(f"{asker} expected a model whose outputs [b, c] are those of a trained Linear "
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


def alone(task: Task, layer: str, asker: str) -> Task:
    """The task of one Linear layer on its features: the same losses, and of the parameters only its own; errors speak
    of the asker, a method's name."""
    linear = copy.deepcopy(task.model.get_submodule(layer))
    if (p := sum(parameter.numel() for parameter in linear.parameters())) > MOST:
        raise ValueError(f"{asker} decomposes a dense curvature, of {MOST:,} parameters at most, got "
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
STALLED = 10               # refreshes in a row that leave the gradient above half its least: below WORST one ends it
PASSES = 5_000             # passes after which it ends in any case
LEAST = 1e-6               # of what would be |Theta| if nothing cancelled in it: a smaller one counts as this much


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
    if not size <= WORST * max(scale, LEAST * terms(task, phi, targets, here.view(d, c))):
        raise ValueError(f"expected a stationary last layer, |gradient| <= {WORST:g} l2 |Theta| = {WORST * scale:.2g}, "
                         f"got {size:.2g} after {passes} passes, with l2={l2:g} and {name_of(task.loss)}: a larger l2")
    return Refit(here.view(d, c), size, passes)


def terms(task: Task, phi: Tensor, targets: Tensor, Theta: Tensor) -> float:
    """|Phi| |R| / n, R [n, c] the losses' slopes in the outputs: at least l2 |Theta|, which is |Phi^T R| / n."""
    return float(phi.norm() * function_gradient(task.loss, phi @ Theta, targets).norm()) / len(phi)


def ridged(task: Task, phi: Tensor, targets: Tensor, c: int, l2: float, flat: Tensor) -> tuple[float, Tensor]:
    """The risk of a last layer Theta = flat [d c], and its gradient [d c]."""
    Theta = flat.view(-1, c)
    with torch.enable_grad():
        outputs = (phi @ Theta).requires_grad_()                                            # [n, c]
        losses = task.loss(outputs, targets).sum()
        R = torch.autograd.grad(losses, outputs, materialize_grads=True)[0]
    value = float(losses.detach()) / len(phi) + l2 / 2 * float(flat.square().sum())
    return value, (phi.T @ R / len(phi) + l2 * Theta).flatten()


def metric(task: Task, phi: Tensor, targets: Tensor, Theta: Tensor, S: tuple, l2: float) -> Callable:
    """R [d c, k] -> (|A| (x) S + l2)^-1 R, A the mean Hessian of the loss in the outputs of Theta [d, c], S by its
    eigenvalues and vectors."""
    outputs, c, (s, V) = phi @ Theta, Theta.shape[1], S
    rows = zip(outputs.split(step := max(1, 2**22 // c**2)), targets.split(step))
    a, U = torch.linalg.eigh(sum(output_hessians(task, o, t).sum(0) for o, t in rows) / len(phi))
    scale = s.clamp(min=0)[:, None] * a.abs() + l2                                          # [d, c]
    return lambda R: torch.stack([(V @ (V.T @ r.view(-1, c) @ U / scale) @ U.T).flatten() for r in R.T], dim=1)


# kernels: (test [m, d], train [n, d]) features, with the 1 -> [m, n]
def inner_product(test: Tensor, train: Tensor) -> Tensor:
    """test @ train^T, of which a linear layer is made."""
    return test @ train.T


def kernel_of(kernel: Callable, test: Tensor, train: Tensor) -> Tensor:
    """The kernel [m, n] of features, in their float64."""
    K = checked(kernel(test, train), "kernel", (len(test), len(train)))
    if K.dtype != test.dtype:
        raise TypeError(f"kernel must give {test.dtype}, which it is given, got {K.dtype}: leave out what converts")
    return K


def machine(task: Task, kernel: Callable, phi: Tensor, targets: Tensor, c: int, l2: float):
    """The refit, its weights (of the features [d, c]; of the training examples [n, c] for any other kernel), and its
    outputs [n, c] on the training examples.

    Any kernel is the inner product of the rows of a root Z of it, K = Z Z^T: a linear layer on these is fitted.
    """
    if kernel is inner_product:
        found = refit(task, phi, targets, c, l2)
        return found, found.theta, phi @ found.theta
    if len(phi) > MOST:
        raise ValueError(f"a kernel of your own is decomposed, for {MOST:,} training examples at most, got "
                         f"{len(phi):,}: kernel=inner_product, or fewer examples")
    K = kernel_of(kernel, phi, phi)
    s, U = torch.linalg.eigh(K)
    rounding = len(K) * torch.finfo(K.dtype).eps * float(s.abs().max())
    if not (K - K.T).abs().max() <= rounding or not s[0] >= -rounding:
        raise ValueError(f"expected a symmetric positive semidefinite kernel, got one with eigenvalues {s[0]:.3g} to "
                         f"{s[-1]:.3g} that is {float((K - K.T).abs().max()):.2g} from its transpose: importance="
                         "residuals takes any")
    s, U = s[s > rounding].sqrt(), U[:, s > rounding]
    found = refit(task, U * s, targets, c, l2)
    return found, U / s @ found.theta, U * s @ found.theta


def learnable(task: Task, outputs: Tensor, targets: Tensor) -> Tensor:
    """Targets for outputs [n, c], if the loss takes them for what they are."""
    (n, c), targets = outputs.shape, checked(targets, "target", outputs.shape[:1], outputs.shape)
    if task.loss is cross_entropy:
        if targets.dtype != (wanted := torch.int64 if targets.ndim == 1 else outputs.dtype):
            raise TypeError(f"target must give cross_entropy class numbers {(n,)} of torch.int64, or chances {(n, c)} "
                            f"of {outputs.dtype}, got {tuple(targets.shape)} of {targets.dtype}: .to({wanted})?")
        low, high = targets.min(), targets.max()
        if targets.ndim == 1 and not 0 <= low <= high < c:
            raise ValueError(f"target must give class numbers in 0..{c - 1}, got {low} to {high}: one for each output")
        if targets.ndim == 2 and (low < 0 or (targets.sum(1) - 1).abs().max() > 1e-6):
            raise ValueError(f"target must give chances, 0 or more and 1 in sum, got {low:.3g} to {high:.3g} with sums "
                             f"of {targets.sum(1).min():.3g} to {targets.sum(1).max():.3g}: logits? .softmax(1)")
    if (got := tuple(task.loss(outputs, targets).shape)) != (n,):
        raise ValueError(f"target must give what {name_of(task.loss)} makes one value an example of, expected {(n,)}, "
                         f"got {got} of targets {tuple(targets.shape)}: .reshape({n})?")
    return targets


def checked(found: Tensor, name: str, *shapes: tuple) -> Tensor:
    """What a user's function gives, if it is a Tensor, has one of the shapes and is finite."""
    if not isinstance(found, Tensor):
        raise TypeError(f"{name} must give a torch.Tensor, got {type(found).__name__}: torch.as_tensor(...)?")
    if tuple(found.shape) not in shapes or not torch.isfinite(found).all():
        raise ValueError(f"{name} must give finite numbers of shape {' or '.join(str(tuple(s)) for s in shapes)}, got "
                         f"{tuple(found.shape)}{' with NaN or infinity' * (tuple(found.shape) in shapes)}")
    return found
