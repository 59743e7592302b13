"""The effect of removing training examples, from an inverse of the curvature, with the certificate that it carries.

At a stationary point of R(theta; w), removing example j (w_j = 1 -> 0, n fixed) moves theta by + (1/n) H^-1 g_j to
first order, g_j = grad loss_j. What a score is the rise of, with gradient v_i, then rises by

    S[i, j] = (1/n) v_i^T H^-1 g_j

which is minus 1/n times I_up,loss of Koh & Liang (2017), eq. 2 (positive = harmful): here positive = helpful, in nats
for one removed example. With a measure m in place of the loss, v = - grad m and S is the drop of m.

A method that gives such scores has, after `fit`: `task_`, `fingerprint_`, `train_` (its training gradients),
`curvature_` (`C @ V`, undamped), `damping_` (the number in force), `gradient_norm_` and `solver_`, whose
`solve(V [p, m], damping) -> X [p, m]` applies the inverse.
"""

import torch
from torch import Tensor

from .curvature import GGN, rule_of_thumb
from .gradients import Gradients, combine, dense, restored, rise_slopes, together
from .parameters import outputs_at, penalty, theta
from .scores import EFFECT, Scores
from .task import Split, Task, as_found, asked, cross_entropy, name_of


def begin(method, task: Task, curvature=None, see=None) -> None:
    """What every `fit` starts with: check the damping and set all of the above but `solver_`.

    The training gradients and the rows of a GGN come from one forward pass.

    Args:
        curvature: the class or function that makes it from a task; default: the method's own `curvature` field.
        see: shown the factors of the curvature's rows, as (rows, vector, blocks).

    Raises:
        TypeError, ValueError: damping or curvature make no sense.
    """
    make = curvature or method.curvature
    if not isinstance(method.damping, (int, float, type(None))):
        raise TypeError(f"damping must be a number or None, got {method.damping!r}: damping first, then curvature=")
    if method.damping is not None and not method.damping >= 0:
        raise ValueError(f"damping must be 0 or more, or None for the rule of thumb, got {method.damping}")
    if not callable(make):
        raise TypeError(f"curvature must be Hessian, GGN or Fisher itself, got {make!r}")
    method.task_, method.fingerprint_ = task, task.fingerprint()
    method.curvature_, method.curvature_name_ = make(task), name_of(make)
    method.train_, slope = Gradients(task, task.train), 0
    rows = getattr(method.curvature_, "rows", None)
    parts = [method.train_] if rows is None or not (rows.keeps or see) else [method.train_, rows]
    for _, (blocks, *_) in together(parts, lambda where, k, i, blocks: see and k and see(where, i, blocks)):
        slope = combine(blocks, torch.ones_like(next(iter(blocks.values())).squares())[..., None], slope)
    slope = restored(task, blocks, slope)[:, 0] / len(task.train) + penalty(task) * theta(task)
    if not torch.isfinite(slope).all():
        refuse_bad_losses(task)
    method.gradient_norm_ = float(slope.norm())
    method.damping_ = method.damping
    if method.damping is None:
        G = method.curvature_ if isinstance(method.curvature_, GGN) else GGN(task)
        method.damping_ = rule_of_thumb(G)


def refuse_bad_losses(task: Task) -> None:
    """Raise for a training gradient that is NaN or infinite, naming the first loss that is."""
    bad = (~torch.isfinite(task.losses(task.train))).nonzero()[:, 0].tolist()
    where = f"the loss of training example {bad[0]} (and {len(bad) - 1} more) is not" if bad else "every loss is"
    raise ValueError(f"expected finite training gradients, got NaN or infinity: {where} finite")


PROBES = 8


def probe_error(method, solver) -> Tensor:
    """(S (C + damping I) - I) W [p, PROBES] for random columns W: how far a cheap symmetric inverse S is from C's."""
    like = theta(method.task_)
    W = torch.randn(len(like), PROBES, generator=torch.Generator().manual_seed(0)).to(like)
    return solver.solve(method.curvature_ @ W + method.damping_ * W, method.damping_) - W


def probed_residual(error: Tensor, test: Gradients) -> Tensor:
    """|(C + damping I) S v - v| / |v| of each test gradient v, [n_test], to about 25 % of itself.

    W^T ((C + damping I) S v - v) = error^T v, and the mean square of a vector's products with random W is its length.
    """
    found = (test @ error)[0]                                                               # [n_test, PROBES]
    return found.square().mean(1).sqrt() / test.squared_norms().sqrt().clamp(min=torch.finfo(found.dtype).tiny)


def removal_scores(method, split: Split | None) -> Scores:
    """Scores [n_test, n_train] of the task's test points, or of `split`, by solving for each test point."""
    task, split = asked(method, split)
    V = Gradients(task, split, rise_slopes).dense()[0].T                                    # [p, n_test]
    size = V.abs().amax(0).clamp(min=torch.finfo(V.dtype).tiny)  # so that no square of a small gradient is lost
    V = V / size
    X = method.solver_.solve(V, method.damping_)
    error = method.curvature_ @ X + method.damping_ * X - V
    residual = error.norm(dim=0) / V.norm(dim=0).clamp(min=torch.finfo(V.dtype).tiny)
    values = (method.train_ @ X)[0].T * (size[:, None] / len(task.train))
    few, more = spread(len(split)), ten_times(method)
    damped = (method.train_ @ method.solver_.solve(V[:, few], more))[0].T
    return certified(method, split, values, residual, kept(values[few], damped))


def certified(method, split: Split, values: Tensor, residual: Tensor, share: float) -> Scores:
    """Removal effects as Scores, with what they rest on."""
    task, times = method.task_, "damping" if method.damping_ else "l2"
    stable = {f"top 10 kept at ten times the {times}": share} if ten_times(method) and len(task.train) > 10 else {}
    unit = EFFECT if task.loss is cross_entropy else f"{name_of(task.loss)} per removed example"
    unit = unit if task.measure is None else f"{name_of(task.measure)} per removed example"
    facts = method.solver_.facts(method.damping_)
    return Scores(values, repr_of(method), method.fingerprint_, split.ids, task.train.ids, unit,
                  {"gradient norm": method.gradient_norm_, "damping": method.damping_, "residual": residual.tolist(),
                   **stable, **facts},
                  {"curvature": method.curvature_name_})


def group(ids, n: int) -> Tensor:
    """Training ids [k] as given, checked."""
    wanted = f"expected a list of different training ids in 0..{n - 1}, got"
    try:
        found = torch.as_tensor(ids).reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{wanted} {type(ids).__name__}: list(range(...))?") from error
    if not len(found):
        raise ValueError(f"{wanted} none")
    if found.dtype == torch.bool:
        raise ValueError(f"{wanted} a mask of {len(found)}: mask.nonzero()[:, 0]?")
    if found.is_floating_point() or found.is_complex():
        raise ValueError(f"{wanted} numbers of {found.dtype}: ids.long()?")
    if len(outside := found[(found < 0) | (found >= n)]):
        raise ValueError(f"{wanted} {int(outside[0])}")
    values, times = found.unique(return_counts=True)
    if len(twice := values[times > 1]):
        raise ValueError(f"{wanted} {int(twice[0])} more than once")
    return found.long().cpu()


def reading(task: Task, split: Split, flat: Tensor) -> Tensor:
    """What a removal raises, the losses or minus the task's measure, [n] at parameters `flat`."""
    with as_found(task.model), torch.no_grad():
        outputs = torch.cat([outputs_at(task, flat, x) for x in split.x.split(1000)])
    return task.loss(outputs, split.y) if task.measure is None else -task.measure(outputs, split.y)


def self_influence(method) -> Tensor:
    """The rise of each training example's own loss on its removal, (1/n) g_j^T H^-1 g_j, [n_train]."""
    task, _ = asked(method, None)
    found = []
    for _, blocks in method.train_:
        for G in dense(task, blocks)[0].split(max(1, 2**24 // len(theta(task)))):           # [b, p]
            found.append((G * method.solver_.solve(G.T, method.damping_).T).sum(1))
    return torch.cat(found) / len(task.train)


def ten_times(method) -> float:
    """Ten times the damping in force; without any, the damping that makes ten times the l2."""
    return 10 * method.damping_ or 9 * method.task_.l2


def spread(n: int, most: int = 10) -> Tensor:
    """Up to `most` row numbers, evenly spread over n."""
    return torch.linspace(0, n - 1, min(n, most)).long()


def kept(values: Tensor, damped: Tensor, k: int = 10) -> float:
    """Of each row's k strongest training examples, the mean share that is among the k strongest after more damping."""
    k = min(k, values.shape[1])
    before, after = (S.abs().topk(k, dim=1).indices for S in (values, damped))
    return float((before[:, :, None] == after[:, None]).any(2).float().mean())


def repr_of(method) -> str:
    """The dataclass's repr with functions and classes by their names."""
    fields = {name: getattr(method, name) for name in method.__dataclass_fields__}
    shown = ", ".join(f"{name}={getattr(value, '__name__', value)}" for name, value in fields.items())
    return f"{type(method).__name__}({shown})"
