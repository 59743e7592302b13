"""Vectors pulled back from the outputs of a batch to each example's gradient, layer by layer.

Hooks keep what each layer took in and gave out, and a backward pass a vector adds the gradients of what it gave out.
A parameter is read off the hooks only where that agrees with autograd on four examples; all others go through vmap
over examples, or, where that cannot run the model, one by one.
"""

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from .blocks import Rows, compact, joined, stacked
from .layers import KNOWN, Hooks, known
from .parameters import parameters, theta
from .task import Task, as_found


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
            raise ValueError(f"the layer of {min(strayed)} must take every batch whole, as it took four "
                             "examples, but this one it took in part: class Own(nn.Linear): pass, or the like, is a "
                             "type of layer whose gradients are not read off hooks")
        rest = [name for name in parameters(task) if name not in blocks] if trusted is not None else []
        sets.append(blocks | (one_by_one(task, x, vectors, rest) if rest else {}))
    return sets


PLANS = WeakKeyDictionary()


def plan(task: Task) -> tuple[dict, set, int]:
    """`trusted_layers` on four training examples from first to last, once for a task and its trained parameters."""
    plans, names = PLANS.setdefault(task, {}), tuple(parameters(task))
    if names not in plans:
        rows = torch.linspace(0, len(task.train) - 1, 4).long().unique()
        with as_found(task.model):
            plans[names] = trusted_layers(task, task.train.x[rows])
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
    """
    layers = known(task.model)
    random = torch.Generator().manual_seed(0)

    def cotangents(outputs):
        return torch.randn(1, *outputs.shape, generator=random).to(outputs)

    seen = []
    got, = pull(task, x, lambda outputs: seen.append(cotangents(outputs)) or seen, layers)
    with Hooks(layers) as calls, torch.enable_grad():
        task.model(x)
    passing = 2 / len(x) * sum(KNOWN[type(layers[name])][0](layers[name], a).numel() + out.numel()
                      for name, made in calls.items() for a, _, out in made if len(a) == len(out) == len(x))
    true = loop(task, x, seen[0], list(got))
    rounding = torch.finfo(theta(task).dtype).eps ** 0.5
    trusted = {name for name, block in got.items()  # a gradient of 0 shows nothing
               if (block.rows() - true[name]).norm() <= rounding * true[name].norm() > 0}
    names = {id(p): name for name, p in parameters(task).items()}
    return {name: module for name, module in layers.items()
            if any(names.get(id(p)) in trusted for p in module.parameters(recurse=False))}, trusted, passing


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
    return {name: Rows(torch.stack([f[name].flatten(1) for f in found]).detach()) for name in names}


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
