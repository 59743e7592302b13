"""The embeddings, maps and distances of one task, each computed once: what the explorer reads."""

from collections.abc import Callable
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from .distances import DISTANCES, pixel
from .embedding import embed, nearness, pca, project, tsne, umap
from .task import Task


class Atlas:
    """The maps and the distances of one task, layer by layer, each computed when first asked for and then kept.

    Ids are row numbers of `task.train` and `task.test`. Several threads may ask at once. Memory: n_train * d values for
    each layer asked for; test points are embedded when asked for.

    Args:
        task: what was trained; its model is only run.
        layers: names as in `embed`.
        projections: {name: method as for `project`}; default PCA, t-SNE and UMAP.
        distances: {name: function (test, train, y) -> [m, n], as in `distances.py`}; default DISTANCES, without pixel
            where x are no images, and without those that need classes where the targets are real numbers.
        test_ids: the test points that a projection which cannot place new points (t-SNE) is made with; others asked for
            get a map of their own. Default: each set of test points gets its own.
        seed: of the projections.
    """

    def __init__(self, task: Task, layers=("",), projections: dict | None = None, distances: dict | None = None,
                 test_ids=None, seed: int = 0):
        images, classes = task.train.x.ndim >= 3, not task.train.y.is_floating_point()
        self.task, self.seed, self.layers = task, seed, list(layers)
        self.test_ids = [] if test_ids is None else known(test_ids, len(task.test))
        self.methods = {"PCA": pca, "t-SNE": tsne, "UMAP": umap} if projections is None else dict(projections)
        self.metrics = dict(distances) if distances is not None else {
            name: function for name, function in DISTANCES.items()
            if (images or function is not pixel) and (classes or not getattr(function, "of_classes", False))}
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

    def near(self, projection: str) -> tuple | None:
        """What `near` is for a projection, (name, low, high, default); None where it is nothing."""
        return getattr(chosen(self.methods, projection, "projection"), "near", None)

    def place(self, layer: str, projection: str, test_ids, near: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The places (train [n_train, 2], test [len(test_ids), 2]) in a layer's map, float32; near as for `project`."""
        method = chosen(self.methods, projection, "projection")
        ids, key = known(test_ids, len(self.task.test)), ("map", layer, projection, nearness(method, near))
        if not getattr(method, "joint", False):
            made = self.once(key, lambda: project(self.embedding(layer), method, self.seed, near))
            return made.points, made.place(self.embedding(layer, self.task.test.x[ids]))
        shown = self.test_ids if set(ids) <= set(self.test_ids) else ids
        train, test = self.once((*key, *shown), lambda: self.joint(layer, method, shown, near))
        return train, test[[shown.index(i) for i in ids]]

    def joint(self, layer: str, method: Callable, ids: list, near: float | None) -> tuple[np.ndarray, np.ndarray]:
        """One map of the training set and some test points together."""
        train = self.embedding(layer)
        both = torch.cat([train, self.embedding(layer, self.task.test.x[ids])])
        points = project(both, method, self.seed, near).points
        return points[:len(train)], points[len(train):]

    def distance(self, layer: str, metric: str, test_id: int) -> np.ndarray:
        """The distances [n_train] of one test point to the training examples, at a layer.

        Raises:
            ValueError: there is no such layer, metric or test point; the metric is not [n_test, n_train], not finite,
                or needs classes where there are none.
        """
        function = chosen(self.metrics, metric, "distance")
        x, train = self.task.test.x[known([test_id], len(self.task.test))], self.task.train

        def row():
            given = (x, train.x) if getattr(function, "of_inputs", False) else (
                self.embedding(layer, x), self.embedding(layer))
            found = function(*given, train.y)
            if found.shape != (1, len(train)):
                raise ValueError(f"{metric} must be [n_test, n_train] = {(1, len(train))}, got {tuple(found.shape)}")
            if not torch.isfinite(found).all():
                raise ValueError(f"{metric} must be finite, got NaN or infinity for {(~torch.isfinite(found)).sum()} "
                                 f"of {len(train)} training examples: are the embeddings at {layer!r} finite?")
            return found[0].cpu().numpy()

        if getattr(function, "of_train", False):
            return self.once(("row", layer, metric), row).copy()
        return row()

    def distance_label(self, metric: str) -> str:
        """What to write at an axis: what the distance is called, and its unit."""
        function = chosen(self.metrics, metric, "distance")
        label, unit = getattr(function, "label", f"{metric} distance"), getattr(function, "unit", "")
        return label + (f" ({unit})" if unit else "")

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
