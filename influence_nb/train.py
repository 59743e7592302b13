"""Training: minibatch gradient descent on the risk, and Newton's method to a certified stationary point."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .curvature import Hessian
from .gradients import risk_gradient
from .parameters import parameters, penalty, theta, unflatten
from .solve import Eigen, cg
from .task import Task

adam = partial(torch.optim.Adam, lr=1e-3)
sgd = partial(torch.optim.SGD, lr=0.1)


@dataclass
class Checkpoint:
    """Weights after an epoch, and the learning rate then in force (what TracIn needs)."""

    epoch: int
    lr: float
    state: dict


@dataclass
class History:
    """What `fit` saw: the mean training risk of every epoch, in nats, and the checkpoints asked for."""

    risk: list = field(default_factory=list)
    checkpoints: list = field(default_factory=list)


def regulariser(task: Task) -> Tensor:
    """(l2/2) |theta_r|^2, the regulariser of the risk, as a differentiable scalar."""
    weights = [p for name, p in task.model.named_parameters() if p.requires_grad and task.regularised(name)]
    return 0.5 * task.l2 * sum((p.square().sum() for p in weights), start=torch.zeros(()).to(task.train.x.device))


def fit(task: Task, epochs: int, batch_size: int = 100, optimizer: Callable = adam, schedule: Callable | None = None,
        w: Tensor | None = None, keep: Callable | None = None, seed: int = 0, progress: bool = True) -> History:
    """Train `task.model` in place on the risk R(theta; w) by minibatch gradient descent.

    A batch of b examples contributes mean_j w_j loss_j over the batch, plus the whole regulariser: an unbiased
    gradient of R. The last batch of an epoch may be smaller. The regulariser is part of the risk (coupled), not
    decoupled weight decay.

    Args:
        epochs: passes over the training set.
        optimizer: parameters -> torch optimizer, for example `partial(torch.optim.SGD, lr=0.1, momentum=0.9)`.
        schedule: epoch -> factor on the learning rate, from epoch 0.
        w: Tensor [n] of training weights; None for all 1.
        keep: epoch -> bool, whether to keep a checkpoint after it (epochs count from 1).
        seed: of the order of the data and of dropout.

    Returns:
        History; the model is left in the mode it was found in.

    Raises:
        ValueError: w has another length, or the risk is no longer finite.
    """
    n, history = len(task.train), History()
    if w is not None and w.shape != (n,):
        raise ValueError(f"training weights w must be [n] = ({n},), got {tuple(w.shape)}")
    if batch_size < 1 or epochs < 0:
        raise ValueError(f"epochs must be 0 or more and batch_size 1 or more, got {epochs} and {batch_size}")
    order = torch.Generator().manual_seed(seed)
    weights = [p for p in task.model.parameters() if p.requires_grad]
    steps = optimizer(weights)
    decay = torch.optim.lr_scheduler.LambdaLR(steps, schedule or (lambda epoch: 1.0))
    modes = [(module, module.training) for module in task.model.modules()]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        task.model.train()
        try:
            for epoch in (bar := tqdm(range(1, epochs + 1), desc="training", disable=not progress, leave=False)):
                total = 0.0
                for batch in torch.randperm(n, generator=order).split(batch_size):
                    batch = batch.to(task.train.x.device)
                    losses = task.loss(task.model(task.train.x[batch]), task.train.y[batch])
                    risk = (losses if w is None else w[batch] * losses).mean() + regulariser(task)
                    steps.zero_grad()
                    risk.backward()
                    steps.step()
                    total += risk.item() * len(batch)
                history.risk.append(total / n)
                if not torch.isfinite(torch.tensor(total)):
                    raise ValueError(f"the risk is {total / n} after epoch {epoch}: a smaller learning rate?")
                if keep is not None and keep(epoch):
                    lr = steps.param_groups[0]["lr"]
                    history.checkpoints.append(Checkpoint(epoch, lr, copy.deepcopy(task.model.state_dict())))
                decay.step()
                bar.set_postfix(risk=f"{history.risk[-1]:.4f}")
        finally:
            for module, mode in modes:
                module.training = mode
            for p in weights:
                p.grad = None
    return history


@dataclass
class Convergence:
    """Where `converge` stopped: the risk, its gradient norm and the Newton steps taken."""

    risk: float
    gradient_norm: float
    steps: int


def risk(task: Task, w: Tensor | None = None) -> float:
    """R(theta; w) over the whole training set, in the loss's unit; w [n] defaults to all 1."""
    losses = task.losses(task.train)
    value = losses.mean() if w is None else (w * losses).mean()
    return float(value + 0.5 * (penalty(task) * theta(task).square()).sum())


def move(task: Task, flat: Tensor) -> None:
    """Write a flat parameter vector [p] into the model."""
    with torch.no_grad():
        for name, piece in unflatten(task, flat).items():
            parameters(task)[name].copy_(piece)


def converge(task: Task, w: Tensor | None = None, tol: float = 1e-10, max_steps: int = 50,
             base: Eigen | None = None) -> Convergence:
    """Bring `task.model`, in place, to a stationary point of R(theta; w) by Newton's method, in float64.

    For models small enough for a dense Hessian that has no negative eigenvalue along the way: linear ones, and small
    networks near a minimum. Null directions (a constant added to all output biases) are left alone. Each step solves
    H d = -gradient and halves d until the risk falls.

    Args:
        w: Tensor [n] of training weights.
        tol: stop at |gradient| <= tol.
        base: decomposition of the Hessian at a nearby point. With it no dense Hessian is formed: steps come from
            conjugate gradients that it preconditions, which is the cheap way to retrain with one example less.

    Raises:
        TypeError: the model is not float64.
        ValueError: the Hessian has a negative eigenvalue, or tol is not reached in max_steps.
    """
    if theta(task).dtype != torch.float64:
        raise TypeError(f"converge needs float64, got {theta(task).dtype}: use task.to(torch.float64)")
    value = risk(task, w)
    for step in range(max_steps + 1):
        slope = risk_gradient(task, w)
        if slope.norm() <= tol:
            return Convergence(value, float(slope.norm()), step)
        direction, start, length = newton_direction(Hessian(task, w), slope, base), theta(task), 1.0
        move(task, start + direction)
        while not (new := risk(task, w)) <= value + 1e-15 * abs(value) and length > 1e-8:
            length /= 2
            move(task, start + length * direction)
        value = new
    raise ValueError(f"expected |gradient| <= {tol:g} after {max_steps} Newton steps, got {slope.norm():.3g}: "
                     "start nearer (train first), raise l2 or max_steps")


def newton_direction(H: Hessian, slope: Tensor, base: Eigen | None) -> Tensor:
    """-H^-1 slope [p]: exactly, or by conjugate gradients with a nearby decomposition as preconditioner."""
    if base is not None:
        null = base.vectors[:, base.null()]
        slope = slope - null @ (null.T @ slope)
        return -cg(H.__matmul__, slope[:, None], tol=1e-6, precondition=base.inverse_times)[0][:, 0]
    eigen = Eigen.of(H.dense())
    if (eigen.values[~eigen.null()] < 0).any():
        raise ValueError(f"the Hessian has eigenvalue {eigen.values[0]:.3g} < 0 here: "
                         "raise l2, or train to a minimum first")
    return -eigen.inverse_times(slope[:, None])[:, 0]
