"""Gradients of single examples, and derivatives of outputs, as functions of one flat parameter vector theta [p].

theta holds the parameters with requires_grad=True, flattened in the order of `named_parameters()`. The model is run
in eval mode and left as found; nothing here writes to it.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap
from torch.nn import functional as F

from .task import Split, Task, as_found


def parameters(task: Task) -> dict[str, nn.Parameter]:
    """The trained parameters by name: those with requires_grad=True."""
    return {name: p for name, p in task.model.named_parameters() if p.requires_grad}


def theta(task: Task) -> Tensor:
    """The flat parameter vector [p]."""
    return torch.cat([p.detach().reshape(-1) for p in parameters(task).values()])


def unflatten(task: Task, flat: Tensor) -> dict[str, Tensor]:
    """Named views of a flat vector [p]."""
    named = parameters(task)
    pieces = flat.split([p.numel() for p in named.values()])
    return {name: piece.view(p.shape) for (name, p), piece in zip(named.items(), pieces)}


def penalty(task: Task) -> Tensor:
    """The diagonal [p] of the regulariser's Hessian: l2 on regularised parameters, 0 on the others."""
    return torch.cat([torch.full_like(p.detach().reshape(-1), task.l2 if task.regularised(name) else 0.0)
                      for name, p in parameters(task).items()])


def outputs_at(task: Task, flat: Tensor, x: Tensor) -> Tensor:
    """The model's outputs [b, ...] with the flat parameters in place of its own."""
    return functional_call(task.model, unflatten(task, flat), (x,))


def example_gradients(task: Task, split: Split, function: Callable | None = None, batch_size: int = 500) -> Tensor:
    """The gradient [n, p] of function(outputs, y) (default: the task's loss) of every example, without the regulariser.

    Cost: one forward and backward pass, and n x p numbers of memory.
    """
    function = function or task.loss
    rows = []
    with as_found(task.model):
        for x, y in batches(split, batch_size):
            rows += pullbacks(task, x, lambda outputs, y=y: function_gradient(function, outputs, y)[None])
    return torch.cat(rows)


def function_gradient(function: Callable, outputs: Tensor, y: Tensor) -> Tensor:
    """d function(outputs_i, y_i) / d outputs_i of every example, in the shape of outputs [b, ...]."""
    return grad(lambda o: function(o, y).sum())(outputs)


def batches(split: Split, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(x, y) in blocks of `size`, the last one smaller where n is no multiple."""
    return zip(split.x.split(size), split.y.split(size))


def pullbacks(task: Task, x: Tensor, cotangents: Callable) -> Iterator[Tensor]:
    """Pull output vectors of each example back to parameters: J_i^T v_i for every example i of the batch, as [b, p].

    Args:
        x: Tensor [b, ...].
        cotangents: outputs [b, ...] -> [m, b, ...], m vectors an example; one [b, p] is yielded for each.

    One forward pass and m backward passes where every trained parameter belongs to a Linear or Conv2d that is used
    once: hooks keep each layer's input a_i and output gradient g_i, and the gradient is g_i a_i^T (of patches, for a
    convolution). Any other model goes through `vmap(vjp)`, one example at a time in effect.
    """
    layers = hooked_layers(task)
    if layers is None:
        yield from functional_pullbacks(task, x, cotangents)
        return
    seen = {}

    def keep(module, inputs, output):
        if module in seen:
            raise NotPlain
        seen[module] = (inputs[0].detach(), inputs[0]._version, output)
        return output.clone()  # so that an in-place activation cannot change what was kept

    handles = [module.register_forward_hook(keep) for module in layers.values()]
    try:
        with torch.enable_grad():
            outputs = task.model(x)
    except NotPlain:
        outputs = None
    finally:
        for handle in handles:
            handle.remove()
    weights = list(parameters(task).values())
    overwritten = any(a._version != version for a, version, _ in seen.values())
    if outputs is None or overwritten or len(seen) < len(layers):
        yield from functional_pullbacks(task, x, cotangents)
        return
    results = [seen[module][2] for module in layers.values()]
    places = [layer_places(module, seen[module][0]) for module in layers.values()]
    vectors = cotangents(outputs.detach())
    for i, v in enumerate(vectors):
        back = torch.autograd.grad(outputs, results + weights, v, retain_graph=i < len(vectors) - 1, allow_unused=True,
                                   materialize_grads=True)
        named = {}
        for (name, module), a, g in zip(layers.items(), places, back[:len(results)], strict=True):
            named |= layer_gradients(name, module, a, g)
        rows = torch.cat([named[name].reshape(len(x), -1) for name in parameters(task)], dim=1)
        if weights and not adds_up(rows, back[len(results):]):
            yield from functional_pullbacks(task, x, cotangents)
            return
        weights = []  # compared once a batch
        yield rows


def adds_up(rows: Tensor, whole) -> bool:
    """Whether the rows [b, p] sum to the batch's own gradient: not where a weight is also used outside its layer."""
    whole = torch.cat([piece.reshape(-1) for piece in whole])
    rounding = torch.finfo(rows.dtype).eps ** 0.5
    return bool((rows.sum(0) - whole).norm() <= rounding * rows.norm(dim=1).sum())


class NotPlain(Exception):
    """A layer runs twice in one forward pass: its two gradients would have to be added."""


def hooked_layers(task: Task) -> dict[str, nn.Module] | None:
    """The Linear and Conv2d layers by name if together they own every trained parameter once; else None."""
    layers, owned = {}, []
    for name, module in task.model.named_modules():
        own = [p for p, value in module.named_parameters(recurse=False) if value.requires_grad]
        if own and not is_plain(module):
            return None
        if own:
            layers[name] = module
            owned += [f"{name}.{p}" if name else p for p in own]
    return layers if sorted(owned) == sorted(parameters(task)) else None


def is_plain(module: nn.Module) -> bool:
    """Whether `layer_gradients` knows this layer."""
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return type(module) is nn.Linear


def layer_places(module: nn.Module, a: Tensor) -> Tensor:
    """A layer's inputs as rows that its weight multiplies, [b, places, i]: the patches of a convolution."""
    if isinstance(module, nn.Linear):
        return a.reshape(len(a), -1, a.shape[-1])
    (kh, kw), (sh, sw), (dh, dw), (ph, pw) = module.kernel_size, module.stride, module.dilation, module.padding
    a = F.pad(a, (pw, pw, ph, ph))
    b, c, height, width = a.shape
    rows, columns = (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1
    step = a.stride()
    patches = a.as_strided((b, rows, columns, c, kh, kw),
                           (step[0], sh * step[2], sw * step[3], step[1], dh * step[2], dw * step[3]))
    return patches.reshape(b, rows * columns, c * kh * kw)


def layer_gradients(name: str, module: nn.Module, a: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Per-example gradients {parameter: [b, ...]} from a layer's inputs a [b, places, i] and its output gradients g."""
    if isinstance(module, nn.Conv2d):
        g = g.flatten(2).transpose(1, 2)                                                    # [b, places, o]
    else:
        g = g.reshape(len(g), -1, g.shape[-1])
    prefix = f"{name}." if name else ""
    out = {f"{prefix}weight": torch.bmm(g.transpose(1, 2), a)}                              # [b, o, i]
    if module.bias is not None:
        out[f"{prefix}bias"] = g.sum(1)
    return out


def functional_pullbacks(task: Task, x: Tensor, cotangents: Callable) -> Iterator[Tensor]:
    """The same as `pullbacks` for any model, by vmap over examples."""
    flat = theta(task)
    with torch.no_grad():
        vectors = cotangents(task.model(x))

    def one(xi, vi):
        return vjp(lambda t: outputs_at(task, t, xi[None])[0], flat)[1](vi)[0]

    for v in vectors:
        yield vmap(one, chunk_size=max(1, 2**24 // len(flat)))(x, v)


def risk_gradient(task: Task, w: Tensor | None = None, batch_size: int = 1000) -> Tensor:
    """The gradient [p] of the risk R(theta; w), (1/n) sum_j w_j grad loss_j + l2 theta_r; w [n] defaults to all 1."""
    flat, n = theta(task), len(task.train)
    total = penalty(task) * flat
    weights = torch.ones(n, dtype=flat.dtype, device=flat.device) if w is None else w
    with as_found(task.model):
        for (x, y), wb in zip(batches(task.train, batch_size), weights.split(batch_size)):
            value = (wb * task.loss(task.model(x), y)).sum() / n
            pieces = torch.autograd.grad(value, parameters(task).values(), allow_unused=True, materialize_grads=True)
            total = total + torch.cat([piece.reshape(-1) for piece in pieces])
    return total


class TrainGradients:
    """The per-example gradients of a task's training set, ready to be multiplied with solved test gradients.

    They are kept, [n_train, p], where they take at most `keep` bytes; else every product streams the training set once.
    """

    def __init__(self, task: Task, keep: int = 2**31):
        flat = theta(task)
        small = len(task.train) * flat.numel() * flat.element_size() <= keep
        self.task, self.rows = task, example_gradients(task, task.train) if small else None

    def products(self, X: Tensor) -> Tensor:
        """x_i^T g_j for every column of X [p, m]: [m, n_train]."""
        if self.rows is not None:
            return X.T @ self.rows.T
        return torch.cat([X.T @ example_gradients(self.task, self.task.train.take(slice(start, start + 500))).T
                          for start in range(0, len(self.task.train), 500)], dim=1)
