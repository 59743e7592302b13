"""What else a fitted inverse curvature tells: relative influence, and the effects of groups and of changed inputs.

Each function takes a fitted method that inverts the curvature (`Influence`, `CG`, `KFAC`, `EKFAC` and the like).
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..curvature import GGN, LeadingGGN
from ..gradients import Gradients, dense, rise_slopes
from ..kronecker import Kronecker
from ..parameters import parameters, theta, unflatten
from ..removal import group, reading
from ..scores import Scores
from ..sketch import Sketch
from ..solve import Eigen, cg
from ..task import Split, Task, as_found, asked, name_of

FAR = 1e-3  # relative residual at which a Newton step is no answer


def inverting(method, split: Split | None = None, averaged: bool = False) -> tuple[Task, Split]:
    """The task of a fitted method, and the examples asked for, where it has an inverse curvature.

    Args:
        averaged: whether scores that are a mean over several models will do.
    """
    task, split = asked(method, split)
    if not hasattr(method, "solver_"):
        raise TypeError(f"expected a method that inverts the curvature, got {type(method).__name__}, which has none: "
                        "Influence or EKFAC?")
    if not averaged and (further := len(getattr(method, "models", ()))):
        raise ValueError(f"expected a method of one model, whose theta moves, got {type(method).__name__} with "
                         f"{further} further models: models=()")
    return task, split


def theta_change(method) -> Tensor:
    """How far theta moves on each example's removal, |H^-1 g_j| / n, [n_train]."""
    task, _ = inverting(method)
    return torch.cat([method.solver_.solve(dense(task, blocks)[0].T, method.damping_).norm(dim=0)
                      for _, blocks in method.train_]) / len(task.train)


def loss_change(method) -> Tensor:
    """How far the training losses move on each example's removal, sqrt(g_j^T H^-1 g_j) / n nats, [n_train].

    Their root mean square over labels drawn from the model, where H is its Fisher matrix; of a regulariser in H,
    l2 |change of theta|^2 comes on top, under the root.

    Raises:
        ValueError: g_j^T H^-1 g_j is negative, as an indefinite curvature can make it.
    """
    task, _ = inverting(method, averaged=True)
    products = method.self_influence()
    negative = products < -torch.finfo(products.dtype).eps * products.abs().max()
    if negative.any():
        name = name_of(getattr(method, "curvature", GGN))
        raise ValueError(f"loss_change expected a positive definite curvature, got {name} with g^T H^-1 g < 0 for "
                         f"{int(negative.sum())} of {len(products)} training examples: curvature=GGN, or theta_change")
    return (products.clamp(min=0) / len(task.train)).sqrt()


def relative_influence(method, split: Split | None = None, size: Callable = theta_change) -> Scores:
    """RelatIF: each training example's scores, divided by the size of its effect on everything.

    Outliers and mislabelled examples, which move the whole model, lead the plain scores of many test points. These ask
    instead who helps or harms this one for how little else it does. Ranked only; the sign is that of the scores.

    Args:
        size: `theta_change` (the paper's theta-RelatIF) or `loss_change` (its l-RelatIF).

    Cost: with `theta_change`, a solve for every training example.
    Source: Barshan, Brunet & Dziugaite (2020).
    """
    scores, sizes = method.scores(split), size(method)
    values = scores.values / sizes.clamp(min=torch.finfo(sizes.dtype).tiny)
    unit = scores.unit.split(" per ")[0] + f" per unit of {size.__name__.replace('_', ' ')} (ranked only)"
    return replace(scores, values=values, unit=unit, method=f"relative_influence({scores.method}, {size.__name__})")


def group_influence(method, ids, split: Split | None = None, order: int = 1) -> Tensor:
    """The rise [n_test] of the test losses (or the drop of the measure) when all training examples `ids` are removed.

    First order is the sum of their `method.scores`, in the unit of these. Second order takes one Newton step on the
    risk without them,

        theta + (H - (1/n) sum_j H_j + damping)^-1 (1/n) sum_j g_j,    j in ids,

    and reads the test losses there. Their curvature leaves with them: that is what the sum overlooks in a large group
    of similar examples. Exact where loss and model make a quadratic risk. H is the method's curvature itself, not its
    approximation of it (for K-FAC, the GGN).

    Cost: first order, all scores of the split; second order, products with the curvature without the group,
    preconditioned by the fitted one where that is of full rank.

    Raises:
        ValueError: an id is not in the training set or given twice, or the curvature without the group is indefinite
            or too near singular for the step.

    Source: Koh et al. (2019), who compare with the Newton step. Basu, You & Feizi (2020) take two terms of the series
    that the step sums up.
    """
    task, split = inverting(method, split, averaged=order == 1)
    ids = group(ids, len(task.train))
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}")
    if order == 1:
        return method.scores(split).values[:, ids].sum(1)
    w = torch.ones(len(task.train)).to(theta(task))
    w[ids] = 0
    push = method.train_.transposed((1 - w)[None, :, None]) / len(task.train)               # [p, 1]
    step = newton_step(method, w, push)[:, 0]
    return reading(task, split, theta(task) + step) - reading(task, split, theta(task))


def newton_step(method, w: Tensor, push: Tensor) -> Tensor:
    """(H(w) + damping)^-1 push [p, 1], preconditioned by the method's own inverse where that is of full rank."""
    make, damping = getattr(method, "curvature", GGN), method.damping_
    H = (GGN if make is LeadingGGN else make)(method.task_, w)
    tol = torch.finfo(push.dtype).eps ** 0.7  # below that, rounding along null directions grows from step to step
    X = cg(lambda V: H @ V + damping * V, push, tol, precondition=preconditioner(method.solver_, damping)).X
    residual = float((H @ X + damping * X - push).norm() / push.norm().clamp(min=torch.finfo(push.dtype).tiny))
    if not residual <= FAR:
        raise ValueError(f"expected the Newton step with a residual of {FAR:g} at most, got {residual:.2g}: without "
                         "the group the curvature is nearly singular; more damping, or task.to(torch.float64)")
    return X


def preconditioner(solver, damping: float) -> Callable | None:
    """R [p, k] -> M^-1 R by a solver, or by the one within it, that reaches every direction; None for any other."""
    solver = getattr(solver, "near", getattr(solver, "preconditioner", solver))
    if isinstance(solver, Eigen):
        return lambda R: solver.inverse_times(R, damping)  # without the check for null directions
    return (lambda R: solver.solve(R, damping)) if isinstance(solver, (Kronecker, Sketch)) else None


def input_influence(method, ids, split: Split | None = None) -> Tensor:
    """How the test losses rise with the training inputs: d loss_i / d x_j through retraining, [n_test, len(ids), ...].

    Changing x_j by a small d, and retraining, raises test loss i by the product of result[i, j] with d (lowers the
    measure, where there is one). To first order theta moves by -(1/n) H^-1 (d g_j / d x_j) d, so that

        result[i, j] = -(1/n) d/dx_j [ (H^-1 v_i)^T grad loss(x_j) ]

    Unit: nats per unit of the input. Positive: brightening this pixel would raise the loss.
    Cost: a solve for each test point, and a double backward pass over `ids` for each.

    Raises:
        TypeError: the inputs are no real numbers, such as token numbers.
        ValueError: an id is not in the training set or given twice.

    Source: Koh & Liang (2017), eq. 5, of the same sign; the 1/n, which they leave out, makes it a derivative.
    """
    task, split = inverting(method, split)
    n = len(task.train)
    examples = task.train.take(group(ids, n))
    if not examples.x.is_floating_point():
        raise TypeError(f"input influence needs real inputs, got x of {examples.x.dtype}: embed them first")
    V = Gradients(task, split, rise_slopes).dense()[0].T                                    # [p, n_test]
    X, named = method.solver_.solve(V, method.damping_), list(parameters(task).values())
    found = []
    with as_found(task.model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # this has second derivatives
        for x, y in zip(examples.x.split(500), examples.y.split(500)):
            x = x.detach().clone().requires_grad_()
            slopes = torch.autograd.grad(task.loss(task.model(x), y).sum(), named, create_graph=True, allow_unused=True,
                                         materialize_grads=True)
            found.append(torch.stack([through(slopes, unflatten(task, column).values(), x) for column in X.T]))
    return -torch.cat(found, dim=1) / n


def through(slopes, direction, x: Tensor) -> Tensor:
    """d/dx of the product of the summed gradient with a direction: of each example's own gradient, as no two mix."""
    product = sum((slope * piece).sum() for slope, piece in zip(slopes, direction, strict=True))
    return torch.autograd.grad(product, x, retain_graph=True)[0]
