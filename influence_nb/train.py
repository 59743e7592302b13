"""Training: minibatch gradient descent on the risk; to a certified stationary point with `converge` (see newton)."""

import copy
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from math import isfinite
from threading import RLock

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from tqdm.auto import tqdm

from .newton import converge as converge
from .parameters import copied, outputs_at, parameters, pieces, theta, weights
from .removal import refuse_bad_losses
from .task import Split, Task, as_found

adam = partial(torch.optim.Adam, lr=1e-3)
sgd = partial(torch.optim.SGD, lr=0.1)

RANDOM = RLock()
BLOCK = 2**25  # bytes of memory for the models that `fit_many` trains at once


@contextmanager
def seeded(seed: int, device: torch.device):
    """Run the body from a seeded random state of CPU and device, then put back the one found; yields what seeds again.

    Dropout draws from this state, of which a process has one: another thread that asks for it waits.
    """
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index])

    def begin():
        for generator in generators:
            generator.manual_seed(seed)

    with RANDOM:
        states = [generator.get_state() for generator in generators]
        try:
            begin()
            yield begin
        finally:
            for generator, state in zip(generators, states):
                generator.set_state(state)


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


def regulariser(task: Task, named: dict | None = None) -> Tensor | float:
    """(l2/2) |theta_r|^2, the regulariser of the risk, differentiable; at named parameters, or at the model's own."""
    named = parameters(task) if named is None else named
    return 0.5 * task.l2 * sum(p.square().sum() for name, p in named.items() if task.regularised(name))


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
        w: Tensor [n] of training weights; None for all 1. An infinite loss stays infinite with a weight of 0.
        keep: epoch -> bool, whether to keep a checkpoint after it (epochs count from 1).
        seed: of the order of the data and of dropout. Threads of one process train in turn.

    Returns:
        History; the model is left in the mode it was found in.

    Raises:
        ValueError: w has another length, or the risk is no longer finite.
    """
    n, w, history = len(task.train), weights(task, w), History()
    if batch_size < 1 or epochs < 0:
        raise ValueError(f"epochs must be 0 or more and batch_size 1 or more, got {epochs} and {batch_size}")
    order, named = torch.Generator().manual_seed(seed), parameters(task)
    steps = optimizer(list(named.values()))
    decay = torch.optim.lr_scheduler.LambdaLR(steps, schedule or (lambda epoch: 1.0))
    modes = [(module, module.training) for module in task.model.modules()]
    with seeded(seed, w.device):
        task.model.train()
        try:
            for epoch in (bar := tqdm(range(1, epochs + 1), desc="training", disable=not progress, leave=False)):
                total = 0.0
                for batch in torch.randperm(n, generator=order).split(batch_size):
                    batch = batch.to(w.device)
                    losses = task.loss(task.model(task.train.x[batch]), task.train.y[batch])
                    risk = (w[batch] * losses).mean() + regulariser(task, named)
                    if not isfinite(value := risk.item()):
                        bad = [f" at the loss of training example {j}" for j in batch[~losses.isfinite()].tolist()]
                        raise ValueError(f"the risk is {value} in epoch {epoch}{''.join(bad[:1])}: a smaller learning "
                                         "rate?")
                    steps.zero_grad()
                    risk.backward()
                    steps.step()
                    total += value * len(batch)
                history.risk.append(total / n)
                if keep is not None and keep(epoch):
                    lr = steps.param_groups[0]["lr"]
                    history.checkpoints.append(Checkpoint(epoch, lr, copy.deepcopy(task.model.state_dict())))
                decay.step()
                bar.set_postfix(risk=f"{history.risk[-1]:.4f}")
        finally:
            for module, mode in modes:
                module.training = mode
            for p in named.values():
                p.grad = None
    return history


@dataclass(eq=False)
class Ensemble:
    """Trained models of one architecture by their parameters, row i of each tensor for model i.

    `ensemble[i]` is the task with model i, a copy, in place of its own.

    Attributes:
        task: what they were trained on, with the buffers and frozen parameters that they share.
        thetas: Tensor [m, p], in the order of `parameters`.
        risk: Tensor [m], the mean training risk of the last epoch.
    """

    task: Task
    thetas: Tensor
    risk: Tensor

    def __len__(self):
        return len(self.thetas)

    def __getitem__(self, i: int) -> Task:
        model = copy.deepcopy(self.task.model)
        model.load_state_dict(stacked(self.task, self.thetas[i][None], lambda piece: piece[0]), strict=False)
        return replace(self.task, model=model)

    def outputs(self, split: Split | None = None, batch_size: int = 1000) -> Tensor:
        """The outputs [m, n, ...] of every model on `split` (default: the test points), in eval mode."""
        split = self.task.test if split is None else split
        with as_found(self.task.model), torch.no_grad():
            return torch.stack([torch.cat([outputs_at(self.task, flat, x) for x in split.x.split(batch_size)])
                                for flat in self.thetas])

    def losses(self, split: Split | None = None) -> Tensor:
        """The loss [m, n] of every model on each example of `split` (default: the test points)."""
        split = self.task.test if split is None else split
        return torch.stack([self.task.loss(outputs, split.y) for outputs in self.outputs(split)])


def fit_many(task: Task, w: Tensor, epochs: int, batch_size: int = 100, optimizer: Callable = adam,
             schedule: Callable | None = None, seed: int = 0, starts: Tensor | None = None,
             progress: bool = True) -> Ensemble:
    """Train m models side by side, model i on the risk R(theta; w_i): each as `fit` with w = w_i would.

    All go through the same batches in the same order. `task.model` is where they start, and is left as found.

    Args:
        w: Tensor [m, n] of training weights.
        epochs, batch_size, optimizer, schedule, seed: as for `fit`.
        starts: Tensor [m, p] of initial parameters; None for those of `task.model`.

    Cost: the multiplications of m calls of `fit`. Where those are so small that the calls take the time, ten times less
    of it: see benchmarks/retraining.py.

    Raises:
        ValueError: w or starts have another shape; the optimiser steps a parameter by more than its own gradient; vmap
            cannot run the model in train mode (BatchNorm keeps statistics); or a risk is no longer finite.
    """
    n, flat = len(task.train), theta(task)
    w = torch.as_tensor(w).to(flat)
    if w.ndim != 2 or w.shape[1] != n or not len(w):
        raise ValueError(f"training weights w must be [m, n] = (m, {n}) with m of 1 or more, got {tuple(w.shape)}")
    starts = flat.expand(len(w), -1) if starts is None else starts.to(flat)
    if starts.shape != (len(w), len(flat)):
        raise ValueError(f"starts must be [m, p] = ({len(w)}, {len(flat)}), got {tuple(starts.shape)}")
    if batch_size < 1 or epochs < 0:
        raise ValueError(f"epochs must be 0 or more and batch_size 1 or more, got {epochs} and {batch_size}")
    twin, thetas, risks = copied(task), [], []
    if not torch.isfinite(twin.losses(task.train)).all():
        refuse_bad_losses(twin)
    refuse_joint(optimizer, [p.shape for p in parameters(task).values()], w.device)
    model, bar = twin.model.train(), tqdm(desc="training", total=epochs * len(w), disable=not progress, leave=False)
    with seeded(seed, w.device) as begin, bar:
        size = max(1, BLOCK // probed(task, model, torch.arange(min(n, batch_size), device=w.device), begin))
        for start, rows in zip(starts.split(size), w.split(size)):
            begin()
            leaves = stacked(task, start, lambda piece: piece.clone().requires_grad_())
            steps, order = optimizer(list(leaves.values())), torch.Generator().manual_seed(seed)
            decay = torch.optim.lr_scheduler.LambdaLR(steps, schedule or (lambda epoch: 1.0))
            total = torch.full_like(rows[:, 0], torch.nan)
            for epoch in range(1, epochs + 1):
                total = 0.0
                for batch in torch.randperm(n, generator=order).split(batch_size):
                    batch = batch.to(w.device)
                    found = batch_risks(task, model, leaves, rows[:, batch], batch)
                    steps.zero_grad()
                    found.sum().backward()                        # each model's gradient is its own
                    steps.step()
                    total = total + found.detach() * len(batch) / n
                if not torch.isfinite(total).all():
                    bad = (~torch.isfinite(total)).nonzero()[:, 0] + sum(map(len, thetas))
                    raise ValueError(f"the risk of models {bad.tolist()} is not finite after epoch {epoch}: a smaller "
                                     "learning rate?")
                decay.step()
                bar.update(len(rows))
            thetas.append(torch.cat([leaf.detach().flatten(1) for leaf in leaves.values()], dim=1))
            risks.append(total)
    return Ensemble(task, torch.cat(thetas), torch.cat(risks))


def stacked(task: Task, thetas: Tensor, each: Callable) -> dict[str, Tensor]:
    """each(piece [m, ...]) of every parameter of the rows of thetas [m, p], by name."""
    named = parameters(task)
    return {name: each(piece.T.reshape(-1, *named[name].shape)) for name, piece in pieces(task, thetas.T).items()}


def batch_risk(task: Task, model: nn.Module, named: dict, w: Tensor, batch: Tensor) -> Tensor:
    """The risk on a batch at named parameters, with w [b]: a scalar."""
    losses = task.loss(functional_call(model, named, (task.train.x[batch],)), task.train.y[batch])
    return (w * losses).mean() + regulariser(task, named)


def batch_risks(task: Task, model: nn.Module, leaves: dict, w: Tensor, batch: Tensor) -> Tensor:
    """`batch_risk` [m] of m models at once, with w [m, b]; dropout leaves out the same units in all."""
    return vmap(lambda named, wb: batch_risk(task, model, named, wb, batch), randomness="same")(leaves, w)


def probed(task: Task, model: nn.Module, batch: Tensor, begin: Callable) -> int:
    """The bytes that one model takes in training, once vmap has been seen to give the gradient that autograd gives.

    Raises:
        ValueError: it does not, or the model's buffers change as it trains.
    """
    saved, buffers = [], {name: b.clone() for name, b in model.named_buffers()}
    leaves = stacked(task, theta(task).expand(2, -1), lambda piece: piece.clone().requires_grad_())
    first = {name: leaf[0] for name, leaf in leaves.items()}
    w = torch.linspace(1, 2, len(batch)).to(theta(task))  # unequal, so that this is no stationary point
    try:
        begin()
        risks = batch_risks(task, model, leaves, w.expand(2, -1), batch)
        together = torch.autograd.grad(risks[0], list(leaves.values()), materialize_grads=True)
        begin()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
            risk = batch_risk(task, model, first, w, batch)
        alone = torch.autograd.grad(risk, list(leaves.values()), materialize_grads=True)
        size, off = (sum(float(g.square().sum()) for g in gs) ** 0.5
                     for gs in (alone, [a - b for a, b in zip(together, alone, strict=True)]))
        changed = [name for name, b in model.named_buffers() if not torch.equal(b, buffers[name])]
        if changed or not off <= torch.finfo(w.dtype).eps ** 0.5 * size:
            raise RuntimeError(f"its buffers {changed} change; its gradients, of size {size:.2g}, are off by {off:.2g}")
    except RuntimeError as error:
        raise ValueError("vmap cannot run this model in train mode: train one by one, with fit on copies of the task "
                         f"and w=w[i] ({error})") from error
    return 4 * theta(task).nbytes + sum(saved)


def refuse_joint(optimizer: Callable, shapes: list, device: torch.device) -> None:
    """Raise for an optimiser that steps two stacked models otherwise than each alone, such as LBFGS or Adafactor."""
    random = torch.Generator().manual_seed(0)
    draws = [[torch.randn(2, *shape, generator=random).to(device, torch.float64) for shape in shapes] for _ in range(4)]

    def stepped(rows):
        leaves = [start[rows].clone().requires_grad_() for start in draws[0]]
        steps = optimizer(leaves)
        for slopes in draws[1:]:
            for leaf, slope in zip(leaves, slopes, strict=True):
                leaf.grad = slope[rows] * torch.tensor([1, 100]).to(slope).reshape(2, *[1] * (slope.ndim - 1))[rows]
            steps.step()
        return leaves

    words = "fit_many needs an optimiser that steps every number by its own gradient, such as SGD or Adam"
    try:
        together, alone = stepped(slice(None)), [stepped(0), stepped(1)]
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{words}: {error}") from error
    if not all(torch.allclose(both[i], alone[i][k], rtol=1e-9) for k, both in enumerate(together) for i in (0, 1)):
        raise ValueError(f"{words}, got one that mixes the numbers of a tensor: train one by one, with fit on copies "
                         "of the task and w=w[i]")
