"""What one backward pass knows about single examples, parameter by parameter.

A layer that multiplies rows a_t with a weight W [o, i] has, for one example, the gradient

    d loss / d W = sum_t g_t a_t^T,    a_t [i] the inputs of its places t, g_t [o] the gradients of its outputs

with one place for a Linear layer, one for every patch of a convolution, one for every position in a sequence. Keeping
a and g instead of the gradient makes products of gradients cheap: (g_s . g_t')(a_s . a_t'). Source: Goodfellow (2015);
for convolutions, Rochette et al. (2019).

A block holds the gradients of one parameter for m vectors pulled back from the outputs of b examples: `Outer` as a and
g, `Tokens` as indices into an embedding and g, `Rows` as they are. All have `rows`, `times`, `combine`, `dot`
and `squares`, explained at `Rows`.
"""

from dataclasses import dataclass, replace
from functools import partial
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(eq=False)
class Rows:
    """Gradients as they are: g [m, b, p]."""

    g: Tensor

    def rows(self) -> Tensor:
        """The gradients [m, b, p]."""
        return self.g

    def arrange(self, V: Tensor) -> Tensor:
        """V [p, k] laid out for `times`; `restore` undoes it."""
        return V

    def restore(self, V: Tensor) -> Tensor:
        """V [p, k] from the layout of `arrange` and `combine`."""
        return V

    def times(self, V: Tensor) -> Tensor:
        """Products with the columns of an arranged V [p, k]: [m, b, k]."""
        return self.g @ V

    def combine(self, U: Tensor) -> Tensor:
        """The sum with weights U [m, b, k], [p, k] as `arrange` lays it out."""
        return self.g.flatten(0, 1).T @ U.flatten(0, 1)

    def dot(self, other) -> Tensor:
        """Products of the first gradients of two blocks, [b, b']."""
        return self.rows()[0] @ other.rows()[0].T

    def squares(self) -> Tensor:
        """The squared length of every gradient, [m, b]."""
        return self.g.square().sum(2)


@dataclass(eq=False)
class Outer:
    """sum_t g_t a_t^T: a [b, T, i] and g [m, b, T, o] stand for gradients [m, b, o i]."""

    a: Tensor
    g: Tensor

    def rows(self) -> Tensor:
        return torch.stack([g.mT @ self.a for g in self.g]).flatten(2)

    def arrange(self, V: Tensor) -> Tensor:
        return V.reshape(self.g.shape[-1], self.a.shape[-1], -1).transpose(0, 1).flatten(1)     # [i, o k]

    def restore(self, V: Tensor) -> Tensor:
        return V.reshape(self.a.shape[-1], self.g.shape[-1], -1).transpose(0, 1).flatten(0, 1)  # [o i, k]

    def times(self, V: Tensor) -> Tensor:
        (b, T, i), o = self.a.shape, self.g.shape[-1]
        moved = (self.a.reshape(b * T, i) @ V).view(b, T * o, -1)                           # [b, T o, k]
        return (across(self.g) @ moved).transpose(0, 1)

    def combine(self, U: Tensor) -> Tensor:
        b, T, i = self.a.shape
        pulled = across(self.g).mT @ U.transpose(0, 1)                                      # [b, T o, k]
        return self.a.reshape(b * T, i).T @ pulled.reshape(b * T, -1)                       # [i, o k]

    def dot(self, other) -> Tensor:
        if type(other) is not Outer:
            return Rows.dot(self, other)
        (b, T, i), o, (b2, T2) = self.a.shape, self.g.shape[-1], other.a.shape[:2]
        if T == T2 == 1:
            return (self.a[:, 0] @ other.a[:, 0].T) * (self.g[0, :, 0] @ other.g[0, :, 0].T)
        if b * b2 * T * T2 * (o + i) > (b * T + b2 * T2 + b * b2) * o * i:
            return Rows.dot(self, other)
        return by_places(self.a, self.g[0], other.a, other.g[0], torch.matmul)

    def squares(self) -> Tensor:
        if self.a.shape[1] == 1:
            return self.a.square().sum((1, 2)) * self.g.square().sum((2, 3))
        return torch.stack([((self.a @ self.a.mT) * (g @ g.mT)).sum((1, 2)) for g in self.g])


@dataclass(eq=False)
class Tokens:
    """sum_t onehot(a_t) g_t^T: a [b, T], rows of a table that has `size` of them, and g [m, b, T, d]."""

    a: Tensor
    g: Tensor
    size: int
    arrange, restore = Rows.arrange, Rows.restore

    def rows(self) -> Tensor:
        m, b, _, d = self.g.shape
        places = self.a[None, :, :, None].expand_as(self.g)
        return self.g.new_zeros(m, b, self.size, d).scatter_add(2, places, self.g).flatten(2)

    def times(self, V: Tensor) -> Tensor:
        found = V.view(self.size, self.g.shape[-1], -1)[self.a]                             # [b, T, d, k]
        return (across(self.g) @ found.flatten(1, 2)).transpose(0, 1)

    def combine(self, U: Tensor) -> Tensor:
        pulled = (across(self.g).mT @ U.transpose(0, 1)).unflatten(1, (-1, self.g.shape[-1]))  # [b, T, d, k]
        total = pulled.new_zeros(self.size, *pulled.shape[2:])
        return total.index_add(0, self.a.flatten(), pulled.flatten(0, 1)).flatten(0, 1)

    def dot(self, other) -> Tensor:
        if type(other) is not Tokens:
            return Rows.dot(self, other)
        return by_places(self.a, self.g[0], other.a, other.g[0], lambda s, t: (s[:, None] == t[None]).to(self.g))

    def squares(self) -> Tensor:
        same = (self.a[:, :, None] == self.a[:, None]).to(self.g)                           # [b, T, T]
        return torch.stack([(same * (g @ g.mT)).sum((1, 2)) for g in self.g])


def across(g: Tensor) -> Tensor:
    """g [m, b, T, o] example by example: [b, m, T o]."""
    return g.transpose(0, 1).flatten(2)


def joined(blocks: list):
    """The gradients of one example summed over blocks: a layer that is used more than once."""
    first, kinds = blocks[0], {type(block) for block in blocks}
    if len(blocks) == 1:
        return first
    if kinds & {Rows} or len(kinds) > 1:
        return Rows(sum(block.rows() for block in blocks))
    return replace(first, a=torch.cat([block.a for block in blocks], 1), g=torch.cat([block.g for block in blocks], 2))


def stacked(blocks: list):
    """The blocks of several vectors m as one."""
    return replace(blocks[0], g=torch.cat([block.g for block in blocks])) if len(blocks) > 1 else blocks[0]


def compact(block, m: int):
    """A block of one vector in the smaller of the ways to keep m of them."""
    if type(block) is Rows:
        return block
    dense = block.g[0, :, 0].numel() * (block.a.shape[-1] if type(block) is Outer else block.size)
    return block if block.a.numel() + m * block.g.numel() <= m * dense else Rows(block.rows())


def numbers(block) -> int:
    """How many numbers a block keeps."""
    return sum(v.numel() for v in vars(block).values() if isinstance(v, Tensor))


def by_places(a, g, a2, g2, match, most: int = 2**24) -> Tensor:
    """sum_st match(a_s, a2_t) (g_s . g2_t) for every pair of examples, [b, b'], at most `most` numbers at a time."""
    T, (b2, T2) = g.shape[1], g2.shape[:2]
    step = max(1, most // (T * b2 * T2))
    right, right_g = a2.flatten(0, 1), g2.flatten(0, 1)
    out = []
    for part, part_g in zip(a.split(step), g.split(step)):
        left = part.flatten(0, 1)
        pairs = match(left, right.T if right.ndim > 1 else right) * (part_g.flatten(0, 1) @ right_g.T)
        out.append(pairs.view(len(part), T, b2, T2).sum((1, 3)))
    return torch.cat(out)


# What each layer multiplies its weights with (`inputs`), and the blocks of its parameters from that and from g
# [m, b, ...], the gradients of its outputs. Every function takes the module first.

def linear_inputs(module, a: Tensor) -> Tensor:
    return a.reshape(len(a), -1, a.shape[-1])                                               # [b, T, i]


def linear_blocks(module, a: Tensor, g: Tensor) -> dict:
    g = g.reshape(len(g), len(a), a.shape[1], -1)                                           # [m, b, T, o]
    return {"weight": Outer(a, g), "bias": Rows(g.sum(2))}


def patches(module, a: Tensor) -> Tensor:
    """The patches that a convolution multiplies its weight with, [b, places, channels x kernel]."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    if any(module._reversed_padding_repeated_twice):
        a = F.pad(a, module._reversed_padding_repeated_twice, mode=mode)
    (b, c, *sizes), (example, channel, *steps) = a.shape, a.stride()
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    places = [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in zip(sizes, kernel, stride, dilation, strict=True)]
    moves = [s * step for s, step in zip(stride, steps, strict=True)]
    inner = [d * step for d, step in zip(dilation, steps, strict=True)]
    found = a.as_strided((b, c, *kernel, *places), (example, channel, *inner, *moves))
    return found.reshape(b, c * prod(kernel), prod(places)).mT  # copied in long runs: places lie side by side


def conv_blocks(module, a: Tensor, g: Tensor) -> dict:
    g = g.flatten(3).transpose(2, 3)                                                        # [m, b, T, o]
    bias = Rows(g.sum(2))
    if module.groups == 1:
        return {"weight": Outer(a, g), "bias": bias}
    a = a.unflatten(2, (module.groups, -1))                                                 # [b, T, groups, i]
    g = g.unflatten(3, (module.groups, -1))                                                 # [m, b, T, groups, o]
    return {"weight": Rows(torch.einsum("btgi,mbtgo->mbgoi", a, g).flatten(2)), "bias": bias}


def token_inputs(module, a: Tensor) -> Tensor:
    return a.reshape(len(a), -1)                                                            # [b, T]


def token_blocks(module, index: Tensor, g: Tensor) -> dict:
    g = g.reshape(len(g), *index.shape, -1)                                                 # [m, b, T, d]
    if module.padding_idx is not None:
        g = g * (index != module.padding_idx)[None, :, :, None]
    return {"weight": Tokens(index, g, module.num_embeddings)}


def normalised(module, a: Tensor) -> Tensor:
    """What a normalisation layer multiplies its weight with."""
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(a, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(a, module.num_groups, eps=module.eps)
    return F.batch_norm(a, module.running_mean, module.running_var, eps=module.eps)


def norm_blocks(module, a: Tensor, g: Tensor) -> dict:
    m, b, width = len(g), len(a), module.weight.numel()
    last = isinstance(module, nn.LayerNorm)                 # whether the weight lies along the last axes
    shape, places = ((m, b, -1, width), 2) if last else ((m, b, width, -1), 3)
    return {name: Rows(v.reshape(shape).sum(places)) for name, v in (("weight", g * a), ("bias", g))}


CONV = (patches, conv_blocks)
NORM = (normalised, norm_blocks)
KNOWN = {nn.Linear: (linear_inputs, linear_blocks), nn.Conv1d: CONV, nn.Conv2d: CONV, nn.Conv3d: CONV,
         nn.Embedding: (token_inputs, token_blocks), nn.LayerNorm: NORM, nn.GroupNorm: NORM,
         nn.BatchNorm1d: NORM, nn.BatchNorm2d: NORM, nn.BatchNorm3d: NORM}


def known(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with trained parameters whose gradients can be read off hooks, by name."""
    return {name: module for name, module in model.named_modules() if type(module) in KNOWN
            and any(p.requires_grad for p in module.parameters(recurse=False))
            and getattr(module, "track_running_stats", True) and getattr(module, "max_norm", None) is None
            and not getattr(module, "sparse", False) and not getattr(module, "scale_grad_by_freq", False)}


class Hooks:
    """Within `with Hooks(layers) as calls`, the calls of each layer are kept: calls[name] = [(input, its version,
    output), ...]."""

    def __init__(self, layers: dict[str, nn.Module]):
        self.layers = layers

    def __enter__(self):
        calls = {name: [] for name in self.layers}

        def keep(module, inputs, keywords, output, *, name):
            a = (*inputs, *keywords.values())[0]
            calls[name].append((a.detach(), a._version, output))
            return output.clone()  # so that an in-place activation cannot change what was kept

        self.handles = [module.register_forward_hook(partial(keep, name=name), with_kwargs=True)
                        for name, module in self.layers.items()]
        return calls

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()
