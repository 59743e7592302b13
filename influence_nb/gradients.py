"""Gradients of single examples, and products with them, as functions of one flat parameter vector theta [p].

theta holds the parameters with requires_grad=True, flattened in the order of `named_parameters()`. The model is run
in eval mode and left as found; nothing here writes to it.
"""

from collections.abc import Callable, Iterator
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from .layers import KNOWN, Hooks, Rows, compact, joined, known, numbers, stacked
from .task import Split, Task, as_found


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


def function_gradient(function: Callable, outputs: Tensor, y: Tensor) -> Tensor:
    """d function(outputs_i, y_i) / d outputs_i of every example, in the shape of outputs [b, ...]."""
    with torch.enable_grad():
        outputs = outputs.detach().requires_grad_()
        return torch.autograd.grad(function(outputs, y).sum(), outputs, materialize_grads=True)[0]


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
    layer (see `layers`). A parameter is read off the hooks only where they agree with autograd on three examples; the
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
        self.layers, self.trusted, passing = plan(task, split.x[:3])
        probe = together([self], rows=[slice(0, 3)])
        size = theta(task).element_size() / min(3, len(split))
        kept = size * sum(numbers(block) for _, (blocks,) in probe for block in blocks.values())  # bytes of an example
        self.batch_size = batch_size or int(min(2000, max(1, block // (kept + size * passing))))
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
    flat, n = theta(task), len(task.train)
    total = penalty(task) * flat
    weights = torch.ones(n, dtype=flat.dtype, device=flat.device) if w is None else w
    with as_found(task.model):
        for (x, y), wb in zip(batches(task.train, batch_size), weights.split(batch_size)):
            value = (wb * task.loss(task.model(x), y)).sum() / n
            found = torch.autograd.grad(value, parameters(task).values(), allow_unused=True, materialize_grads=True)
            total = total + torch.cat([piece.reshape(-1) for piece in found])
    return total


def pull(task: Task, x: Tensor, cotangents: Callable, layers: dict, trusted: set | None = None,
         see: Callable | None = None) -> list[dict]:
    """The blocks of every parameter, for each set of vectors, from one forward pass and a backward pass a vector.

    Args:
        cotangents: outputs [b, ...] -> sets of vectors, each [m, b, ...].
        layers: the hooked layers, by name.
        trusted: the parameters to read off the hooks; the others go through vmap. None: all there are, no others.
        see: called with set, vector and its blocks as the layers gave them.
    """
    with Hooks(layers) as calls, torch.enable_grad():
        outputs = task.model(x)
    uses = [(name, *call[::2]) for name, made in calls.items() for call in made
            if fits(call, len(x)) and call[2].requires_grad]
    names = {id(p): name for name, p in parameters(task).items()}
    blind = {names.get(id(p)) for name, made in calls.items() if not all(fits(call, len(x)) for call in made)
             for p in layers[name].parameters(recurse=False)}
    inputs = [KNOWN[type(layers[name])][0](layers[name], a) for name, a, _ in uses]
    sets = []
    for k, vectors in enumerate(cotangents(outputs.detach())):
        found = {}  # parameter -> one block for each vector
        for i, v in enumerate(vectors):
            back = torch.autograd.grad(outputs, [out for *_, out in uses], v, retain_graph=True, allow_unused=True,
                                       materialize_grads=True) if uses else ()
            blocks = {name: block for name, block in gathered(task, layers, uses, inputs, back).items()
                      if name not in blind and (trusted is None or name in trusted)}
            if see is not None:
                see(k, i, blocks)
            for name, block in blocks.items():
                found.setdefault(name, []).append(compact(block, len(vectors)))
        blocks = {name: stacked(several) for name, several in found.items()}
        if trusted is not None and (strayed := trusted - blocks.keys()):
            raise ValueError(f"the layer of {min(strayed)} must take every batch whole, as it took the first three "
                             "examples, but this one it took in part: class Own(nn.Linear): pass, or the like, is a "
                             "type of layer whose gradients are not read off hooks")
        rest = [name for name in parameters(task) if name not in blocks] if trusted is not None else []
        sets.append(blocks | (one_by_one(task, x, vectors, rest) if rest else {}))
    return sets


PLANS = WeakKeyDictionary()


def plan(task: Task, x: Tensor) -> tuple[dict, set, int]:
    """`trusted_layers`, worked out once for a task and its trained parameters."""
    plans, names = PLANS.setdefault(task, {}), tuple(parameters(task))
    if names not in plans:
        with as_found(task.model):
            plans[names] = trusted_layers(task, x)
    return plans[names]


def fits(call: tuple, b: int) -> bool:
    """Whether a layer's call took a batch of b examples along its first axis, and its input is still as it was."""
    a, version, out = call
    return len(a) == len(out) == b and a._version == version


def gathered(task: Task, layers: dict, uses: list, inputs: list, back) -> dict:
    """The block of each parameter for one vector, its uses summed."""
    names, blocks = {id(p): name for name, p in parameters(task).items()}, {}
    for (layer, *_), a, g in zip(uses, inputs, back, strict=True):
        module = layers[layer]
        for own, block in KNOWN[type(module)][1](module, a, g[None]).items():
            name = names.get(id(getattr(module, own)))
            if name is not None:
                blocks.setdefault(name, []).append(block)
    return {name: joined(several) for name, several in blocks.items()}


def trusted_layers(task: Task, x: Tensor) -> tuple[dict, set, int]:
    """The layers to hook, the parameters whose gradients they give as autograd does, and how many numbers pass by.

    A parameter that is used outside its layer too, a layer whose first axis is not the batch, an input that is
    overwritten: all are found here, on the random pull-backs of a few examples.

    Raises:
        ValueError: the outputs of an example change with the others in its batch.
    """
    check_alone(task, x)
    layers = known(task.model)
    random = torch.Generator().manual_seed(0)

    def cotangents(outputs):
        return torch.randn(1, *outputs.shape, generator=random).to(outputs)

    seen = []
    got, = pull(task, x, lambda outputs: seen.append(cotangents(outputs)) or seen, layers)
    with Hooks(layers) as calls, torch.enable_grad():
        task.model(x)
    passing = 2 * sum(KNOWN[type(layers[name])][0](layers[name], a).numel() + out.numel()
                      for name, made in calls.items() for a, _, out in made if len(a) == len(out) == len(x))
    true = loop(task, x, seen[0], list(got))
    rounding = torch.finfo(theta(task).dtype).eps ** 0.5
    trusted = {name for name, block in got.items()
               if (block.rows() - true[name]).norm() <= rounding * true[name].norm()}
    names = {id(p): name for name, p in parameters(task).items()}
    return {name: module for name, module in layers.items()
            if any(names.get(id(p)) in trusted for p in module.parameters(recurse=False))}, trusted, passing


def check_alone(task: Task, x: Tensor) -> None:
    """Raise where examples see each other in the model, so that one example has no gradient of its own."""
    try:
        with torch.no_grad():
            together, alone = task.model(x), torch.cat([task.model(one) for one in x.split(1)])
        change = float((together - alone).norm() / together.norm().clamp(min=torch.finfo(together.dtype).tiny))
    except ValueError as error:  # BatchNorm1d refuses a single example
        raise ValueError(f"the model must take examples one at a time: {error}") from error
    if not change <= torch.finfo(together.dtype).eps ** 0.5:
        raise ValueError(f"each example must go through the model for itself, but its outputs change by {change:.2g} "
                         "with the others in the batch: is there BatchNorm without running statistics, or a mean over "
                         "the batch?")


def one_by_one(task: Task, x: Tensor, vectors: Tensor, names: list) -> dict:
    """Blocks of the named parameters by vmap over examples; in a loop where vmap cannot run the model."""
    values = {name: parameters(task)[name].detach() for name in names}

    def one(xi, vi):
        return vjp(lambda values: functional_call(task.model, values, (xi[None],))[0], values)[1](vi)[0]

    size = max(1, 2**24 // sum(v.numel() for v in values.values()))
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the attention that vmap can batch
            found = [vmap(one, chunk_size=size)(x, v) for v in vectors]
    except RuntimeError:  # an operation without a batching rule, such as a fused LSTM
        return {name: Rows(rows) for name, rows in loop(task, x, vectors, names).items()}
    return {name: Rows(torch.stack([f[name].flatten(1) for f in found])) for name in names}


def loop(task: Task, x: Tensor, vectors: Tensor, names: list) -> dict[str, Tensor]:
    """Gradients [m, b, p] of the named parameters by plain autograd, one example at a time."""
    weights, found = [parameters(task)[name] for name in names], []
    for i in range(len(x)):
        with torch.enable_grad():
            outputs = task.model(x[i:i + 1])
        for v in vectors[:, i:i + 1]:
            found.append(torch.autograd.grad(outputs, weights, v, retain_graph=True, allow_unused=True,
                                             materialize_grads=True))
    shape = (len(x), len(vectors), -1)
    return {name: torch.stack([f[k].flatten() for f in found]).view(shape).transpose(0, 1)
            for k, name in enumerate(names)}
