"""Ground truth by retraining."""

import copy
from dataclasses import replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .curvature import Hessian
from .solve import Eigen
from .task import Task
from .train import converge


def leave_one_out(task: Task, ids, tol: float = 1e-10, progress: bool = True) -> Tensor:
    """The measured effect of removing each training example alone: retrain without it, look at every test loss.

    This is *fixed* truth: warm-started at the trained model and converged in float64 to |gradient| <= tol of
    R(theta; w) with w_j = 0 and n unchanged, so that it is one deterministic function of w. For models whose Hessian
    has no negative eigenvalue there.

    Args:
        task: converged, in float64.
        ids: training examples to remove, [m].

    Returns:
        Tensor [n_test, m]: loss(test_i; theta without j) - loss(test_i; theta), in nats; positive = helpful. For a
        task with a measure, the drop of the measure.

    Cost: one dense Hessian and its decomposition, then a few dozen Hessian-vector products an example.

    Raises:
        ValueError: an id is not in the training set, the Hessian has a negative eigenvalue, or a retraining did not
            converge.
    """
    ids = torch.as_tensor(ids).reshape(-1).tolist()
    if ids and not 0 <= min(ids) <= max(ids) < len(task.train):
        raise ValueError(f"ids must lie in 0..{len(task.train) - 1}, got {min(ids)}..{max(ids)}")
    base = replace(task, model=copy.deepcopy(task.model))
    converge(base, tol=tol)
    start, before = copy.deepcopy(base.model.state_dict()), reading(base)
    eigen = Eigen.of(Hessian(base).dense())
    effects = []
    for j in tqdm(ids, desc="retraining", disable=not progress, leave=False):
        base.model.load_state_dict(start)
        w = torch.ones(len(task.train)).to(before)
        w[j] = 0
        converge(base, w, tol=tol, base=eigen)
        effects.append(reading(base) - before)
    return torch.stack(effects, dim=1)


def reading(task: Task) -> Tensor:
    """What a removal raises where the example was helpful, [n_test]: the test losses, or minus the task's measure."""
    return task.losses() if task.measure is None else -task.measure(task.outputs(), task.test.y)
