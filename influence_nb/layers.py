"""The layers whose gradients can be read off hooks: what each multiplies its weight with, and the blocks that follow.

A block (see `blocks`) holds the gradients of one parameter, example by example.
"""

from functools import partial
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import Outer, Rows, Tokens

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
