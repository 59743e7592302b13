"""The trained parameters of a task as one flat vector theta [p], and back.

theta holds the parameters with requires_grad=True, flattened in the order of `named_parameters()`.
"""

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .task import Task


def parameters(task: Task) -> dict[str, nn.Parameter]:
    """The trained parameters by name: those with requires_grad=True."""
    return {name: p for name, p in task.model.named_parameters() if p.requires_grad}


def theta(task: Task) -> Tensor:
    """The flat parameter vector [p]."""
    return torch.cat([p.detach().reshape(-1) for p in parameters(task).values()])


def pieces(task: Task, V: Tensor) -> dict[str, Tensor]:
    """The rows of V [p, ...] that belong to each parameter, by name."""
    named = parameters(task)
    return dict(zip(named, V.split([p.numel() for p in named.values()]), strict=True))


def unflatten(task: Task, flat: Tensor) -> dict[str, Tensor]:
    """Named views of a flat vector [p], in the parameters' shapes."""
    named = parameters(task)
    return {name: piece.view(named[name].shape) for name, piece in pieces(task, flat).items()}


def penalty(task: Task) -> Tensor:
    """The diagonal [p] of the regulariser's Hessian: l2 on regularised parameters, 0 on the others."""
    return torch.cat([torch.full_like(p.detach().reshape(-1), task.l2 if task.regularised(name) else 0.0)
                      for name, p in parameters(task).items()])


def outputs_at(task: Task, flat: Tensor, x: Tensor) -> Tensor:
    """The model's outputs [b, ...] with the flat parameters in place of its own."""
    return functional_call(task.model, unflatten(task, flat), (x,))


def weights(task: Task, w: Tensor | None) -> Tensor:
    """Training weights [n], all 1 where there are none.

    Raises:
        ValueError: w has another shape, or is not finite.
    """
    n = len(task.train)
    if w is not None and (w.shape != (n,) or not torch.isfinite(w).all()):
        raise ValueError(f"training weights w must be [n] = ({n},) and finite, got {tuple(w.shape)}"
                         f"{' with NaN or infinity' if w.shape == (n,) else ''}")
    return (torch.ones(n) if w is None else w).to(theta(task))


def copied(task: Task) -> Task:
    """The same task with its own copy of the model."""
    return replace(task, model=copy.deepcopy(task.model))
