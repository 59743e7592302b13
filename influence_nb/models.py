"""Small networks with seeded initialisation, and plain-array files for their weights.

Building one leaves the global random state as it was.
"""

import zipfile
from collections import OrderedDict
from itertools import pairwise
from math import sqrt
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .data import shipped_model


def logistic(n_in: int, n_classes: int, bias: bool = True, seed: int = 0) -> nn.Sequential:
    """Softmax regression on the flattened input: one linear layer, n_in -> n_classes."""
    return mlp([n_in, n_classes], bias=bias, seed=seed)


def mlp(sizes, activation=nn.Tanh, bias: bool = True, seed: int = 0) -> nn.Sequential:
    """A fully connected network on the flattened input.

    Args:
        sizes: widths from input to output, for example [784, 32, 10].
        activation: what stands between two linear layers, a module class.
    """
    if len(sizes) < 2:
        raise ValueError(f"sizes must hold at least input and output width, got {list(sizes)}")
    layers = OrderedDict(flat=nn.Flatten())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for depth, (n_in, n_out) in enumerate(pairwise(sizes), 1):
            layers[f"linear{depth}"] = nn.Linear(n_in, n_out, bias=bias)
            if depth < len(sizes) - 1:
                layers[f"act{depth}"] = activation()
    return nn.Sequential(layers)


class SpatialMean(nn.Module):
    """The mean over height and width, [b, c, h, w] -> [b, c]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def all_cnn(seed: int = 0) -> nn.Sequential:
    """The all-convolutional tanh network of the published experiment, 2,616 parameters, on [b, 1, 28, 28].

    Its eight representations are the layers h1_a, h1_c, h2_a, h2_c, h3_a, h3_c, h3_d and softmax_linear. Weights start
    from a normal distribution cut at two standard deviations (2/sqrt(fan-in), and 1/sqrt(fan-in) for the last layer),
    biases from 0.

    Source: Koh & Liang (2017), section 4.2, and their released all-CNN.
    """

    def conv(n_in, n_out, size, stride=1):
        return nn.Sequential(nn.Conv2d(n_in, n_out, size, stride), nn.Tanh())

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(OrderedDict(
            h1_a=conv(1, 8, 3),               # [b, 8, 26, 26]
            h1_c=conv(8, 8, 3, stride=2),     # [b, 8, 12, 12]
            h2_a=conv(8, 8, 3),               # [b, 8, 10, 10]
            h2_c=conv(8, 8, 3, stride=2),     # [b, 8, 4, 4]
            h3_a=conv(8, 8, 3),               # [b, 8, 2, 2]
            h3_c=conv(8, 10, 1),              # [b, 10, 2, 2]
            h3_d=SpatialMean(),               # [b, 10]
            softmax_linear=nn.Linear(10, 10)))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                fan_in = parameter[0].numel()
                std = (1 if name.startswith("softmax") else 2) / sqrt(fan_in)
                nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
    return model


def save_weights(model: nn.Module, path) -> Path:
    """Write parameters and buffers to an .npz of plain arrays (nothing pickled)."""
    path = Path(path) if Path(path).suffix == ".npz" else Path(f"{path}.npz")
    np.savez_compressed(path, **{name: value.detach().cpu().numpy() for name, value in model.state_dict().items()})
    return path


def load_weights(model: nn.Module, path) -> nn.Module:
    """Read what `save_weights` wrote into `model`, which is returned.

    Raises:
        ValueError: the file is damaged, or holds other names or shapes than the model.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            state = {name: torch.from_numpy(file[name]) for name in file.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"expected weights written by save_weights, got {Path(path).name}, which is damaged or "
                         f"something else ({error})") from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the weights in {Path(path).name} are of another model: {error}") from error
    return model


def converged_all_cnn() -> nn.Sequential:
    """The all-CNN at a certified minimum on mnist-5500, l2 = 0.001, in float64 (data/make_converged.py made it)."""
    return load_weights(all_cnn().double(), shipped_model("all_cnn_converged")).eval()


def trained_all_cnn() -> nn.Sequential:
    """The all-CNN trained on mnist-5500 that ships with the project (data/make_all_cnn.py made it), in eval mode."""
    return load_weights(all_cnn(), shipped_model("all_cnn_mnist-5500")).eval()
