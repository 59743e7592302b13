"""A training run made again, as a function of the training weights, and the derivative of its end in them.

With fixed initial weights, order of the data and optimiser, a run is one function w -> theta_T(w) of the training
weights, converged or not. Its state s holds theta and what the optimiser remembers. Step t makes

    g = grad [ (1/b) sum_{j in batch t} w_j loss_j + (l2/2) |theta_r|^2 ](theta),      s' = step(s, g)

and the derivative of a function f of the last weights goes back, last step first, as its adjoint A = d f / d s:

    B = (d s' / d g)^T A',    d f / d w_j += (1/b) B . grad loss_j,    A = (d s' / d s)^T A' + H_t B on theta

with H_t the Hessian of the batch's risk. Only some sqrt(T) of the T states are kept; from one of them those up to the
next are made again. Source: Maclaurin, Duvenaud & Adams (2015); Engstrom et al. (2025), section 2, for the weights of
the data; the memory is that of Chen et al. (2016).
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from .curvature import flat
from .newton import move
from .parameters import parameters, theta
from .task import Task
from .train import regulariser


@dataclass(frozen=True)
class SGD:
    """A step of torch.optim.SGD and its adjoint. The state is theta and m; t counts from 0."""

    momentum: float
    dampening: float
    nesterov: bool

    def begin(self, theta: Tensor) -> Tensor:
        """The state [2, p] before the first step."""
        return torch.stack([theta, torch.zeros_like(theta)])

    def step(self, state: Tensor, g: Tensor, t: int, lr: float) -> Tensor:
        """The state after step t."""
        theta, m = state
        m = (self.momentum * m).add(g, alpha=self.share(t))
        u = g.add(m, alpha=self.momentum) if self.nesterov else m
        return torch.stack([theta.add(u, alpha=-lr), m])

    def back(self, A: Tensor, after: Tensor, g: Tensor, t: int, lr: float) -> tuple[Tensor, Tensor]:
        """From the adjoint [2, k, p] after step t: what of it reaches the state before past g, and B [k, p]."""
        theta, m = A
        u = -lr * theta
        m = m + (self.momentum * u if self.nesterov else u)
        B = self.share(t) * m + (u if self.nesterov else 0)
        return torch.stack([theta, self.momentum * m]), B

    def share(self, t: int) -> float:
        """Of g in m; torch damps neither the first step nor those without momentum."""
        return 1 - self.dampening if t and self.momentum else 1.0


@dataclass(frozen=True)
class Adam:
    """A step of torch.optim.Adam and its adjoint. The state is theta, m and v; t counts from 0."""

    betas: tuple
    eps: float

    def begin(self, theta: Tensor) -> Tensor:
        """The state [3, p] before the first step."""
        return torch.stack([theta, torch.zeros_like(theta), torch.zeros_like(theta)])

    def step(self, state: Tensor, g: Tensor, t: int, lr: float) -> Tensor:
        """The state after step t."""
        (theta, m, v), (beta1, beta2) = state, self.betas
        m = m.lerp(g, 1 - beta1)
        v = (beta2 * v).addcmul(g, g, value=1 - beta2)
        rate, root = self.corrected(t, lr)
        return torch.stack([theta.addcdiv(m, v.sqrt() / root + self.eps, value=-rate), m, v])

    def back(self, A: Tensor, after: Tensor, g: Tensor, t: int, lr: float) -> tuple[Tensor, Tensor]:
        """From the adjoint [3, k, p] after step t: what of it reaches the state before past g, and B [k, p]."""
        (theta, m, v), (_, m1, v1), (beta1, beta2) = A, after, self.betas
        rate, root = self.corrected(t, lr)
        s = v1.sqrt() / root + self.eps
        by_v = torch.where(v1 > 0, m1 / (2 * root * v1.sqrt() * s.square()), 0)  # v = 0: every g^2 was 0, or too small
        m = m - rate / s * theta
        v = v + rate * by_v * theta
        B = (1 - beta1) * m + 2 * (1 - beta2) * g * v
        return torch.stack([theta, beta1 * m, beta2 * v]), B

    def corrected(self, t: int, lr: float) -> tuple[float, float]:
        """The learning rate over 1 - beta1^(t + 1), and the root of 1 - beta2^(t + 1)."""
        return lr / (1 - self.betas[0] ** (t + 1)), (1 - self.betas[1] ** (t + 1)) ** 0.5


RULES = {torch.optim.SGD: (SGD, ("momentum", "dampening", "nesterov")), torch.optim.Adam: (Adam, ("betas", "eps"))}
ASIDE = {"params", "lr", "foreach", "fused", "capturable", "differentiable"}  # the last four: how, not what


def rule_of(optimizer: torch.optim.Optimizer) -> SGD | Adam:
    """The rule by which an optimiser makes its steps.

    Raises:
        ValueError: it is another one, or has options whose steps are not written down here.
    """
    groups, (rule, options) = optimizer.param_groups, RULES.get(type(optimizer), (None, ()))
    more = {name: v for name, v in groups[0].items() if name not in {*ASIDE, *options} and v} if rule else {}
    if rule is None or more or len(groups) > 1:
        got = type(optimizer).__name__ + "".join(f", {name}={v}" for name, v in more.items())
        raise ValueError("expected torch.optim.SGD (lr, momentum, dampening, nesterov) or torch.optim.Adam (lr, betas, "
                         f"eps), one group of parameters and no other options; got {got}, {len(groups)} group(s): for "
                         "weight decay, Task(l2=...)")
    return rule(**{name: groups[0][name] for name in options})


@dataclass(frozen=True, eq=False)
class Run:
    """A training run as `fit` makes it, on a model of its own.

    Args:
        task: with a copy of the model that every step writes to.
        rule: of the steps.
        steps: for each step, the rows of its batch and its learning rate.
        start: the state [s, p] before the first step.
        batched: for a batch's size, whether a batched backward pass may be used on it, once that is known.
    """

    task: Task
    rule: SGD | Adam
    steps: list
    start: Tensor
    batched: dict = field(default_factory=dict)

    def slope(self, theta: Tensor, rows: Tensor, graph: bool = False) -> tuple[Tensor, Tensor]:
        """The gradient [p] of the batch's risk, and the weights [b] of its examples, all 1, in which it has one."""
        move(self.task, theta)
        rows, train = rows.to(theta.device), self.task.train
        w = torch.ones(len(rows)).to(theta).requires_grad_()
        with torch.enable_grad():
            risk = (w * self.task.loss(self.task.model(train.x[rows]), train.y[rows])).mean() + regulariser(self.task)
            found = torch.autograd.grad(risk, parameters(self.task).values(), create_graph=graph, allow_unused=True,
                                        materialize_grads=True)
            return flat(found), w

    def ahead(self, state: Tensor, first: int = 0, last: int | None = None) -> Iterator[Tensor]:
        """The state [s, p] after each of the steps from `first` up to `last`."""
        for t, (rows, lr) in enumerate(self.steps[first:last], first):
            state = self.rule.step(state, self.slope(state[0], rows)[0], t, lr)
            yield state

    def back(self, A: Tensor, before: Tensor, after: Tensor, t: int, effect: Tensor) -> Tensor:
        """The adjoint [s, k, p] before step t from that after it; d f / d w of its batch is added to effect [k, n]."""
        rows, lr = self.steps[t]
        with sdpa_kernel(SDPBackend.MATH):  # the attention that has second derivatives
            g, w = self.slope(before[0], rows, graph=True)
            A, B = self.rule.back(A, after, g.detach(), t, lr)
            wanted = [*parameters(self.task).values(), w]
            if len(rows) not in self.batched:
                self.batched[len(rows)] = same(g, wanted)
            *curved, direct = pulled_back(g, wanted, B, self.batched[len(rows)])            # H_t B, and (1/b) B . g_j
        start = 0
        for piece in curved:
            A[0, :, start:start + piece[0].numel()] += piece.flatten(1)
            start += piece[0].numel()
        effect[:, rows] += direct
        return A


def pulled_back(g: Tensor, wanted: list, B: Tensor, batched: bool) -> list:
    """d (B_i . g) / d wanted for each row of B [k, p], in one batched backward pass or row by row: [k, ...] each."""
    if batched:
        found = torch.autograd.grad(g, wanted, B, is_grads_batched=True, allow_unused=True, retain_graph=True)
        return [torch.zeros(len(B), *v.shape).to(v) if d is None else d for v, d in zip(wanted, found, strict=True)]
    rows = [torch.autograd.grad(g, wanted, row, allow_unused=True, materialize_grads=True, retain_graph=True)
            for row in B]
    return [torch.stack(several) for several in zip(*rows, strict=True)]


def same(g: Tensor, wanted: list) -> bool:
    """Whether a batched backward pass gives what plain ones give; torch has none that is right for GroupNorm.

    Of random rows: those of a test point may be all 0, which shows nothing, and depend on which one comes first.
    """
    B = torch.randn(2, len(g), generator=torch.Generator().manual_seed(0)).to(g)
    try:
        pairs = zip(*(pulled_back(g, wanted, B, batched) for batched in (True, False)), strict=True)
    except RuntimeError:
        return False
    return all((a - b).norm() <= torch.finfo(g.dtype).eps ** 0.5 * b.norm() for a, b in pairs)


def run_of(task: Task, start: dict, epochs: int, batch_size: int, optimizer: Callable, schedule: Callable | None,
           seed: int) -> Run:
    """The run that `fit` makes with these arguments from the weights in `start`, a state_dict.

    Raises:
        ValueError: there is no step, the start is of another model, the optimiser has no rule here, or more than w
            decides where the run goes.
    """
    if epochs < 1:
        raise ValueError(f"expected a run of 1 epoch or more, got epochs={epochs}")
    model = copy.deepcopy(task.model)
    try:
        model.load_state_dict(start)
    except RuntimeError as error:
        raise ValueError(f"expected as start a state_dict of the task's own model, {type(model).__name__}; got "
                         f"another's ({error}): start = copy.deepcopy(model.state_dict()) before the run") from error
    task = replace(task, model=model)
    train_mode(task)
    steps, order, stepper = [], torch.Generator().manual_seed(seed), optimizer(list(parameters(task).values()))
    for epoch in range(epochs):
        lr = float(stepper.param_groups[0]["lr"]) * (schedule(epoch) if schedule else 1.0)
        steps += [(rows, lr) for rows in torch.randperm(len(task.train), generator=order).split(batch_size)]
    rule = rule_of(stepper)
    return Run(task, rule, steps, rule.begin(theta(task)))


def train_mode(task: Task) -> None:
    """Put the task's model into train mode, as `fit` does.

    Raises:
        ValueError: there it computes something else than in eval mode, or changes its buffers.
    """
    x, buffers = task.train.x[:100], [b.clone() for b in task.model.buffers()]
    with torch.random.fork_rng(), torch.no_grad():
        evaluated, trained = task.model.eval()(x), task.model.train()(x)
    moved = any(not torch.equal(a, b) for a, b in zip(buffers, task.model.buffers(), strict=True))
    if moved or not torch.allclose(evaluated, trained, rtol=torch.finfo(trained.dtype).eps ** 0.5):
        raise ValueError("expected a run that only the training weights change, but in train mode the model computes "
                         "something else than in eval mode, or its buffers move: train it without dropout, and with "
                         "GroupNorm or LayerNorm in place of BatchNorm")


def replayed(run: Run, every: int) -> tuple[list, Tensor]:
    """The states [s, p] before steps 0, every, 2 every, ..., and the last weights [p]."""
    checkpoints, state = [], run.start
    for t, after in enumerate(tqdm(run.ahead(state), desc="replaying", total=len(run.steps), leave=False)):
        checkpoints += [state] if t % every == 0 else []
        state = after
    return checkpoints, state[0]


def weight_derivatives(run: Run, checkpoints: list, every: int, slopes: Tensor) -> Tensor:
    """d f_i / d w_j [k, n] at w = 1 of k functions f of the last weights, with gradients `slopes` [k, p] there.

    Cost: for each step two gradients of its batch and k products with its Hessian, by one batched double backward
    pass, which is faster here than forward mode over reverse. Memory: 2 sqrt(T) states, and some 5 k p numbers.
    """
    effect = torch.zeros(len(slopes), len(run.task.train)).to(slopes)
    A = torch.cat([slopes[None], torch.zeros(len(run.start) - 1, *slopes.shape).to(slopes)])  # [s, k, p]
    with tqdm(total=len(run.steps), desc="unrolling", leave=False) as bar:
        for segment in reversed(range(len(checkpoints))):
            first, last = segment * every, min((segment + 1) * every, len(run.steps))
            states = [checkpoints[segment], *run.ahead(checkpoints[segment], first, last)]
            for t in reversed(range(first, last)):
                after = states.pop()
                A = run.back(A, states[-1], after, t, effect)
                bar.update()
    return effect
