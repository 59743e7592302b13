"""Gradients of single examples, and products with them, never formed where their factors will do.

All are functions of the flat parameter vector theta [p] (see `parameters`). The model is run in eval mode and left as
found; nothing here writes to it.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from .blocks import numbers
from .parameters import parameters, penalty, pieces, theta, weights
from .pullback import plan, pull
from .task import Split, Task, as_found, cross_entropy


def function_gradient(function: Callable, outputs: Tensor, y: Tensor) -> Tensor:
    """d function(outputs_i, y_i) / d outputs_i of every example, in the shape of outputs [b, ...].

    Of cross-entropy in float64: where the model is sure, softmax - 1 would cancel in float32.
    """
    with torch.enable_grad():
        o = (outputs.detach().double() if function is cross_entropy else outputs.detach()).requires_grad_()
        return torch.autograd.grad(function(o, y).sum(), o, materialize_grads=True)[0].to(outputs)


def batches(split: Split, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(x, y) in blocks of `size`, the last one smaller where n is no multiple."""
    return zip(split.x.split(size), split.y.split(size))


# The vectors [m, b, ...] that are pulled back from the outputs: functions of (task, outputs, y)

def loss_slopes(task: Task, outputs: Tensor, y: Tensor) -> Tensor:
    """d loss / d outputs: pulled back, the gradient of each example's loss."""
    return function_gradient(task.loss, outputs, y)[None]


def rise_slopes(task: Task, outputs: Tensor, y: Tensor) -> Tensor:
    """The slope of what a score is the rise of: the loss, or minus the task's measure."""
    return loss_slopes(task, outputs, y) if task.measure is None else -function_gradient(task.measure, outputs, y)[None]


def unit_vectors(task: Task, outputs: Tensor, y: Tensor) -> Tensor:
    """One vector for each output: pulled back, the rows of the Jacobian."""
    c = outputs[0].numel()
    return torch.eye(c).to(outputs)[:, None].expand(c, len(outputs), c).reshape(c, *outputs.shape)


class Gradients:
    """The matrix J [m, n, p] of gradients J_i^T v of every example i and each of its m vectors v, without forming it.

    With hooks, a batch costs one forward and m backward passes, and its gradients are kept as the two factors of each
    layer (see `blocks`). A parameter is read off the hooks only where they agree with autograd on a few examples; the
    gradients of all others come from `vmap` over examples, or, where that cannot run the model, one by one.

    Args:
        split: n examples.
        vectors: (task, outputs [b, ...], y [b]) -> [m, b, ...]; default: the slope of the loss, with m = 1.
        batch_size: examples at a time; None for as many as take `block` bytes.
        block: bytes of memory for a batch.
        keep: bytes up to which the factors of all batches are kept; else every product runs the model again.
    """

    def __init__(self, task: Task, split: Split, vectors: Callable = loss_slopes, batch_size: int | None = None,
                 block: int = 2**25, keep: int = 2**30):
        self.task, self.split, self.vectors, self.kept = task, split, vectors, None
        self.layers, self.trusted, passing = plan(task)
        probe = together([self], rows=[slice(0, 3)])
        size = theta(task).element_size()
        kept = size * sum(numbers(b) for _, (blocks,) in probe for b in blocks.values()) / min(3, len(split))
        self.batch_size = batch_size or int(min(1000, max(1, block // (kept + size * passing))))
        self.keeps = kept * len(split) <= keep

    def __iter__(self) -> Iterator[tuple[slice, dict]]:
        """(rows, blocks by parameter) of one batch after another."""
        yield from self.kept if self.kept is not None else ((where, blocks) for where, (blocks,) in together([self]))

    def dense(self) -> Tensor:
        """J [m, n, p]."""
        return torch.cat([dense(self.task, blocks) for _, blocks in self], dim=1)

    def __matmul__(self, V: Tensor) -> Tensor:
        """J V [m, n, k] for V [p, k]: the Jacobian-vector product of every column."""
        named, found = None, []
        for _, blocks in self:
            named = named or arranged(blocks, pieces(self.task, V))
            found.append(times(blocks, named))
        return torch.cat(found, dim=1)

    def transposed(self, U: Tensor) -> Tensor:
        """J^T U [p, k] for U [m, n, k]: the vector-Jacobian product, summed over examples and vectors."""
        total = 0
        for where, blocks in self:
            total = combine(blocks, U[:, where], total)
        return restored(self.task, blocks, total)

    def gram(self, V: Tensor, w: Tensor) -> Tensor:
        """J^T diag(w) J V [p, k] for V [p, k] and a weight w [n] for each example, in one pass."""
        named, total = None, 0
        for where, blocks in self:
            named = named or arranged(blocks, pieces(self.task, V))
            total = combine(blocks, w[where, None] * times(blocks, named), total)
        return restored(self.task, blocks, total)

    def dot(self, other: "Gradients") -> Tensor:
        """The products [n, n'] of the first gradients (m = 1) of two sets, layer by layer."""
        S = torch.empty(len(self.split), len(other.split)).to(theta(self.task))
        for columns, right in other:
            for rows, left in self:
                S[rows, columns] = sum(left[name].dot(right[name]) for name in left)
        return S

    def squared_norms(self) -> Tensor:
        """|J_i^T v|^2 summed over the m vectors, [n]."""
        return torch.cat([sum(block.squares().sum(0) for block in blocks.values()) for _, blocks in self])


def together(parts: list, see: Callable | None = None, rows: list | None = None) -> Iterator[tuple[slice, list]]:
    """(rows, [blocks of each part]) of several Gradients of one split, with one forward pass a batch; each is kept
    where it may be.

    Args:
        see: see(rows, part, vector, blocks) is shown every vector's factors before they are compacted.
        rows: the batches, by default all of them.
    """
    first, kept = parts[0], [[] for _ in parts]
    n, size = len(first.split), min(part.batch_size for part in parts) if rows is None else 0
    for where in rows or [slice(start, min(start + size, n)) for start in range(0, n, size)]:
        x, y = first.split.x[where], first.split.y[where]
        with as_found(first.task.model):
            found = pull(first.task, x, lambda o, y=y: [part.vectors(first.task, o, y) for part in parts],
                         first.layers, first.trusted, see and partial(see, where))
        for part, blocks, store in zip(parts, found, kept, strict=True):
            store += [(where, blocks)] if rows is None and part.keeps else []
        yield where, found
    for part, store in zip(parts, kept, strict=True):
        part.kept = store or part.kept


def dense(task: Task, blocks: dict) -> Tensor:
    """The gradients [m, b, p] of a batch from its blocks."""
    return torch.cat([blocks[name].rows() for name in parameters(task)], dim=2)


def arranged(blocks: dict, named: dict) -> dict:
    """Parts of vectors [p, k] laid out for products with these blocks, and with those of every other batch."""
    return {name: blocks[name].arrange(V) for name, V in named.items()}


def times(blocks: dict, named: dict) -> Tensor:
    """J V [m, b, k] of a batch, V arranged by parameter."""
    return sum(blocks[name].times(V) for name, V in named.items())


def combine(blocks: dict, U: Tensor, total) -> dict:
    """J^T U of a batch, added to the total so far (0 at first), by parameter."""
    return {name: block.combine(U) + (total[name] if total else 0) for name, block in blocks.items()}


def restored(task: Task, blocks: dict, total: dict) -> Tensor:
    """The total as one matrix [p, k]."""
    return torch.cat([blocks[name].restore(total[name]) for name in parameters(task)])


def example_gradients(task: Task, split: Split, function: Callable | None = None,
                      batch_size: int | None = None) -> Tensor:
    """The gradient [n, p] of function(outputs, y) (default: the task's loss) of every example, without the regulariser.

    Cost: one forward and backward pass, and n x p numbers of memory.
    """
    function = function or task.loss
    slopes = lambda task, outputs, y: function_gradient(function, outputs, y)[None]  # noqa: E731
    return Gradients(task, split, slopes, batch_size, keep=0).dense()[0]


def risk_gradient(task: Task, w: Tensor | None = None, batch_size: int = 500) -> Tensor:
    """The gradient [p] of the risk R(theta; w), (1/n) sum_j w_j grad loss_j + l2 theta_r; w [n] defaults to all 1."""
    w, n, total = weights(task, w), len(task.train), penalty(task) * theta(task)
    with as_found(task.model):
        for (x, y), wb in zip(batches(task.train, batch_size), w.split(batch_size), strict=True):
            value = (wb * task.loss(task.model(x), y)).sum() / n
            found = torch.autograd.grad(value, parameters(task).values(), allow_unused=True, materialize_grads=True)
            total = total + torch.cat([piece.reshape(-1) for piece in found])
    return total
