"""What a layer makes of an example: embeddings, distances between them, and maps of them in two dimensions.

Three kinds of plain functions, each replaceable by one of your own:

* `embed` reads the output of any layer, [n, d];
* a distance takes a [n_a, d] and b [n_b, d] and gives [n_a, n_b], 0 = same: `cosine`, `euclidean`, `pixel`;
* a projection method takes an array [n, d] and a seed and gives a `Projection`: `pca`, `tsne`, `umap`.

`Atlas` puts them together for one task, computes each map once, and is what the explorer reads.
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

from .task import Task, as_found


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


# distances: (a [n_a, d], b [n_b, d]) -> [n_a, n_b], 0 = same. Memory: at most two arrays as large as the result.
def cosine(a: Tensor, b: Tensor) -> Tensor:
    """1 - cos(a, b): 0 = same direction, 1 = orthogonal, 2 = opposite. A zero vector is at 1 from everything.

    >>> cosine(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0], [0.0, 0.0]]))
    tensor([[0.0400, 1.0000]])
    """
    lengths = torch.linalg.vector_norm(a, dim=1)[:, None] * torch.linalg.vector_norm(b, dim=1)
    return (a @ b.T).div_(lengths.clamp_(min=torch.finfo(a.dtype).tiny)).neg_().add_(1).clamp_(0, 2)


def euclidean(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|, from the differences themselves, so that equal rows are at exactly 0.

    >>> euclidean(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[5., 0.]])
    """
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def pixel(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distance of the raw inputs, whatever the layer."""
    return euclidean(a.flatten(1), b.flatten(1))


cosine.unit = "1 - cos, no unit"
euclidean.unit = "units of the activation"
pixel.unit = "Euclidean, units of pixel value"
pixel.of_inputs = True  # Atlas passes x in place of the embedding


class Projection(NamedTuple):
    """A map of n examples, points [n, 2] float32, and `place`: embeddings [m, d] -> [m, 2] in that same map."""

    points: np.ndarray
    place: Callable


def pca(x: np.ndarray, seed: int = 0) -> Projection:
    """The two directions of largest variance (linear); each points to where its largest loading is positive."""
    fitted = PCA(2, random_state=seed).fit(x)
    return Projection(fitted.transform(x), fitted.transform)


def tsne(x: np.ndarray, seed: int = 0) -> Projection:
    """t-SNE (van der Maaten & Hinton 2008), perplexity 30, 500 steps from a PCA start: keeps neighbours, not distances.

    Barnes-Hut angle 0.8: half the time of the usual 0.5, to the same divergence within 0.1 % on 5,500 digits.
    """
    fitted = TSNE(2, perplexity=min(30, (len(x) - 1) / 3), angle=0.8, max_iter=500, init="pca", random_state=seed)
    return Projection(fitted.fit_transform(x), cannot_place)


def cannot_place(new):
    raise ValueError("t-SNE has no place for points it was not made with: project both together, "
                     "project(torch.cat([train, test]), method=tsne)")


tsne.joint = True  # Atlas projects training and test points together


ONE_UMAP = Lock()  # numba's threads, and Python's list of warnings, are not made for two threads at once


def umap(x: np.ndarray, seed: int = 0) -> Projection:
    """UMAP (McInnes et al. 2018), 15 exact nearest neighbours, 200 epochs from a PCA start.

    A new point goes to the median, coordinate by coordinate, of its 15 nearest neighbours' places. UMAP's own
    `transform` would move it on by a few more steps, and make its place depend on which other points go with it.
    """
    from umap import UMAP  # here, since importing numba takes seconds

    near = NearestNeighbors(n_neighbors=min(15, len(x) - 1)).fit(x)
    distance, index = near.kneighbors(x)
    with ONE_UMAP, warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"precomputed_knn\[2\]")  # it says that transform will not work; `place` does
        fitted = UMAP(near.n_neighbors, n_epochs=200, init="pca", random_state=seed, n_jobs=1,
                      precomputed_knn=(index.astype(np.int32), distance.astype(np.float32))).fit(x)
    points = fitted.embedding_
    return Projection(points, lambda new: np.median(points[near.kneighbors(new, return_distance=False)], axis=1))


def project(embeddings, method: Callable = pca, seed: int = 0) -> Projection:
    """Draw embeddings [n, d] in two dimensions; the same seed gives the same map.

    Args:
        embeddings: Tensor or array [n, d], n >= 3.
        method: `pca`, `tsne`, `umap`, or a function of your own: (array [n, d], seed) -> Projection.

    Raises:
        ValueError: the embeddings are not [n, d] with n >= 3, not finite, or all the same.
    """
    x = flat(embeddings)
    if len(x) < 3 or (x == x[0]).all():
        raise ValueError(f"a map needs at least 3 examples that are not all the same, got {len(x)} with "
                         f"{len(np.unique(x, axis=0))} different embeddings: another layer?")
    points, place = method(planar(x), seed)
    return Projection(np.float32(points), lambda new: np.float32(place(planar(flat(new, x.shape[1])))))


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


class Atlas:
    """The maps and the distances of one task, layer by layer, each computed when first asked for and then kept.

    Ids are row numbers of `task.train` and `task.test`. Several threads may ask at once. Memory: n_train * d values for
    each layer asked for; test points are embedded when asked for.

    Args:
        task: what was trained; its model is only run.
        layers: names as in `embed`.
        projections: {name: method as for `project`}; default PCA, t-SNE and UMAP.
        distances: {name: function as `cosine`}; default cosine and Euclidean, for images pixel too. A function with
            `of_inputs = True` gets raw inputs in place of embeddings; a text `unit` goes to the axis label.
        test_ids: the test points that a projection which cannot place new points (t-SNE) is made with; others asked for
            get a map of their own. Default: each set of test points gets its own.
        seed: of the projections.
    """

    def __init__(self, task: Task, layers=("",), projections: dict | None = None, distances: dict | None = None,
                 test_ids=None, seed: int = 0):
        images = task.train.x.ndim >= 3
        self.task, self.seed, self.layers = task, seed, list(layers)
        self.test_ids = [] if test_ids is None else known(test_ids, len(task.test))
        self.methods = {"PCA": pca, "t-SNE": tsne, "UMAP": umap} if projections is None else dict(projections)
        self.metrics = dict(distances) if distances is not None else (
            {"cosine": cosine, "Euclidean": euclidean} | ({"pixel": pixel} if images else {}))
        self._kept, self._locks, self._lock = {}, {}, Lock()
        for layer in self.layers:
            self.embedding(layer, task.test.x[:1])  # a wrong name should fail here, not at the first click

    @property
    def projections(self) -> list:
        return list(self.methods)

    @property
    def distances(self) -> list:
        return list(self.metrics)

    def embedding(self, layer: str, x: Tensor | None = None) -> Tensor:
        """The embedding [n, d] of x at a layer; without x, that of the training set, which is kept."""
        if x is None:
            return self.once(("embedding", layer), lambda: self.embedding(layer, self.task.train.x))
        return embed(self.task.model, x, layer)

    def place(self, layer: str, projection: str, test_ids) -> tuple[np.ndarray, np.ndarray]:
        """The places (train [n_train, 2], test [len(test_ids), 2]) in a layer's map, float32."""
        method = chosen(self.methods, projection, "projection")
        ids = known(test_ids, len(self.task.test))
        if not getattr(method, "joint", False):
            made = self.once((layer, projection), lambda: project(self.embedding(layer), method, self.seed))
            return made.points, made.place(self.embedding(layer, self.task.test.x[ids]))
        shown = self.test_ids if set(ids) <= set(self.test_ids) else ids
        train, test = self.once((layer, projection, *shown), lambda: self.joint(layer, method, shown))
        return train, test[[shown.index(i) for i in ids]]

    def joint(self, layer: str, method: Callable, ids: list) -> tuple[np.ndarray, np.ndarray]:
        """One map of the training set and some test points together."""
        train = self.embedding(layer)
        both = torch.cat([train, self.embedding(layer, self.task.test.x[ids])])
        points = project(both, method, self.seed).points
        return points[:len(train)], points[len(train):]

    def distance(self, layer: str, metric: str, test_id: int) -> np.ndarray:
        """The distances [n_train] of one test point to the training examples, at a layer, 0 = same."""
        function = chosen(self.metrics, metric, "distance")
        x = self.task.test.x[known([test_id], len(self.task.test))]
        if getattr(function, "of_inputs", False):
            return function(x, self.task.train.x)[0].cpu().numpy()
        return function(self.embedding(layer, x), self.embedding(layer))[0].cpu().numpy()

    def distance_label(self, metric: str) -> str:
        """What to write at an axis: the distance's name and unit."""
        unit = getattr(chosen(self.metrics, metric, "distance"), "unit", "")
        return f"{metric} distance" + (f" ({unit})" if unit else "")

    def once(self, key, compute: Callable):
        """The value kept under `key`, computed by the first thread that asks while the others wait."""
        with self._lock:
            lock = self._locks.setdefault(key, Lock())
        with lock:
            if key not in self._kept:
                self._kept[key] = compute()
            return self._kept[key]


def chosen(menu: dict, name: str, kind: str):
    """The entry of `menu` called `name`, or an error that lists the others."""
    if name not in menu:
        raise ValueError(f"expected a {kind} of {', '.join(map(repr, menu))}, got {name!r}")
    return menu[name]


def known(test_ids, n_test: int) -> list:
    """Test ids as a list of ints, each in 0..n_test - 1."""
    ids = [int(i) for i in test_ids]
    if wrong := [i for i in ids if not 0 <= i < n_test]:
        raise ValueError(f"test ids must lie in 0..{n_test - 1}, got {wrong[0]}")
    return ids
