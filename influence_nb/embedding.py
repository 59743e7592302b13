"""What a layer makes of an example: embeddings, and maps of them in two dimensions.

* `embed` reads the output of any layer, [n, d];
* a projection method takes an array [n, d] and a seed and gives a `Projection`: `pca`, `tsne`, `umap`. One that looks
  at so and so many neighbours has `near = (name, low, high, default)`, and takes that number as its third argument.
"""

import warnings
from collections.abc import Callable
from difflib import get_close_matches
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn

from .task import as_found, name_of


def embed(model: nn.Module, x: Tensor, layer: str, batch_size: int = 1000) -> Tensor:
    """The output of one layer for every example, flattened: what the network knows at that depth.

    Cost: one forward pass over x; memory n * d values. The model is left as found.

    Args:
        model: any module; it is run in eval mode, without gradients.
        x: Tensor [n, ...].
        layer: a name from `model.named_modules()`; "" is the model's own output. "input" (unless a layer has that
            name) is x itself.

    Returns:
        Tensor [n, d], the same for every batch size up to rounding.

    Raises:
        ValueError: there is no such layer, it is not called exactly once a forward pass, its rows are not the examples,
            or x is empty.
        TypeError: its output is not one tensor.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if layer == "input" and "input" not in modules:
        return x.reshape(len(x), -1)
    if layer not in modules:
        near = get_close_matches(layer, modules, n=1, cutoff=0.0)[0]
        names = ", ".join(repr(name) for name in modules)
        raise ValueError(f"expected the name of a layer, got {layer!r}: did you mean {near!r}? The layers are {names}")
    if len(x) == 0 or batch_size < 1:
        raise ValueError(f"expected at least one example and a batch_size of 1 or more, got {len(x)} and {batch_size}")
    outputs, rows = [], []
    for batch in x.split(batch_size):
        with as_found(model), torch.no_grad():  # batch by batch, so that another thread gets its turn
            hook = modules[layer].register_forward_hook(lambda *given: outputs.append(detached(given[2], layer)))
            try:
                model(batch)
            finally:
                hook.remove()
            if len(outputs) != 1:
                raise ValueError(f"layer {layer!r} must be called once a forward pass, got {len(outputs)} calls: "
                                 "give each use a module of its own, or choose a layer around or inside it")
            if outputs[0].ndim == 0 or len(outputs[0]) != len(batch):
                raise ValueError(f"layer {layer!r} must give one row an example, expected {len(batch)} rows, got "
                                 f"shape {tuple(outputs[0].shape)}: choose a layer whose first axis is the batch")
            rows.append(outputs.pop().reshape(len(batch), -1))
    return torch.cat(rows)  # [n, d]


def detached(output, layer: str) -> Tensor:
    """A copy of a layer's output, so that a later in-place operation (as of `ReLU(inplace=True)`) cannot change it."""
    if not isinstance(output, Tensor):
        raise TypeError(f"layer {layer!r} must return one tensor, got a {type(output).__name__}: choose a layer inside")
    return output.detach().clone()


class Projection(NamedTuple):
    """A map of n examples, points [n, 2] float32, and `place`: embeddings [m, d] -> [m, 2] in that same map."""

    points: np.ndarray
    place: Callable


def pca(x: np.ndarray, seed: int = 0) -> Projection:
    """The two directions of largest variance (linear); each points to where its largest loading is positive."""
    fitted = PCA(2, random_state=seed).fit(x)
    return Projection(fitted.transform(x), fitted.transform)


def tsne(x: np.ndarray, seed: int = 0, near: float | None = None) -> Projection:
    """t-SNE (van der Maaten & Hinton 2008), 500 steps from a PCA start: keeps neighbours, not distances.

    `near` is the perplexity, 30 where it is left out, and at most a third of the other examples. Barnes-Hut angle 0.8:
    half the time of the usual 0.5, to the same divergence within 0.1 % on 5,500 digits.
    """
    perplexity = min(near or 30, (len(x) - 1) / 3)
    fitted = TSNE(2, perplexity=perplexity, angle=0.8, max_iter=500, init="pca", random_state=seed)
    return Projection(fitted.fit_transform(x), cannot_place)


def cannot_place(new):
    raise ValueError("t-SNE has no place for points it was not made with: project both together, "
                     "project(torch.cat([train, test]), method=tsne)")


tsne.joint = True  # Atlas projects training and test points together
tsne.near = ("perplexity", 5, 100, 30)


ONE_UMAP = Lock()  # numba's threads, and Python's list of warnings, are not made for two threads at once


def umap(x: np.ndarray, seed: int = 0, near: int | None = None) -> Projection:
    """UMAP (McInnes et al. 2018), exact nearest neighbours, 200 epochs from a PCA start.

    `near` is the number of neighbours, 15 where it is left out, and at most all others. A new point goes to the median,
    coordinate by coordinate, of the places of as many nearest neighbours. UMAP's own `transform` would move it on by a
    few more steps, and make its place depend on which other points go with it.
    """
    from umap import UMAP  # here, since importing numba takes seconds

    finder = NearestNeighbors(n_neighbors=min(int(near or 15), len(x) - 1)).fit(x)
    distance, index = finder.kneighbors(x)
    with ONE_UMAP, warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"precomputed_knn\[2\]")  # it says that transform will not work; `place` does
        fitted = UMAP(finder.n_neighbors, n_epochs=200, init="pca", random_state=seed, n_jobs=1,
                      precomputed_knn=(index.astype(np.int32), distance.astype(np.float32))).fit(x)
    points = fitted.embedding_
    return Projection(points, lambda new: np.median(points[finder.kneighbors(new, return_distance=False)], axis=1))


umap.near = ("neighbours", 5, 100, 15)


def project(embeddings, method: Callable = pca, seed: int = 0, near: float | None = None) -> Projection:
    """Draw embeddings [n, d] in two dimensions; the same seed gives the same map.

    Args:
        embeddings: Tensor or array [n, d], n >= 3.
        method: `pca`, `tsne`, `umap`, or a function of your own: (array [n, d], seed) -> Projection.
        near: t-SNE's perplexity, UMAP's neighbours: `method.near` tells the range and what None stands for.

    Raises:
        ValueError: the embeddings are not [n, d] with n >= 3, not finite, or all the same; near is out of range, or
            the method has no use for it.
    """
    x, near = flat(embeddings), nearness(method, near)
    if len(x) < 3 or (x == x[0]).all():
        raise ValueError(f"a map needs at least 3 examples that are not all the same, got {len(x)} with "
                         f"{len(np.unique(x, axis=0))} different embeddings: another layer?")
    points, place = method(planar(x), seed) if near is None else method(planar(x), seed, near)
    return Projection(np.float32(points), lambda new: np.float32(place(planar(flat(new, x.shape[1])))))


def nearness(method: Callable, near: float | None) -> float | None:
    """`near` checked, or the method's default where it is None; None for a method that has no use for it."""
    if near is None:
        return getattr(method, "near", (None,))[-1]
    if not hasattr(method, "near"):
        raise ValueError(f"expected near=None for {name_of(method)}, which looks at no neighbours, got {near}")
    name, low, high, _ = method.near
    if not low <= near <= high:
        raise ValueError(f"the {name} of {name_of(method)} must lie in {low}..{high}, got {near}")
    return near


def planar(x: np.ndarray) -> np.ndarray:
    """x, with a second column of zeros where it has only one."""
    return np.pad(x, ((0, 0), (0, 1))) if x.shape[1] == 1 else x


def flat(embeddings, width: int | None = None) -> np.ndarray:
    """Embeddings as a finite float32 array [n, d], with d = width where that is given."""
    x = embeddings.detach().cpu().float().numpy() if isinstance(embeddings, Tensor) else np.float32(embeddings)
    if x.ndim != 2 or width not in (None, x.shape[1]):
        raise ValueError(f"embeddings must be [n, {width or 'd'}], got {x.shape}: as embed() gives them?")
    if not np.isfinite(x).all():
        bad = (~np.isfinite(x)).any(1)
        raise ValueError(f"embeddings must be finite, got NaN or infinity in {bad.sum()} of {len(x)} rows, first in "
                         f"row {bad.argmax()}: does the model overflow?")
    return np.ascontiguousarray(x)
