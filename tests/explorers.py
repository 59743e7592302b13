"""Small explorers for tests: a task of tiny pictures, scores with ties, a method that is asked, an atlas that waits."""

import threading

import torch
from torch import nn

from influence_nb import Scores, Split, Task
from influence_nb.scores import EFFECT
from influence_nb.widgets import Explorer

N_TRAIN, SHOWN = 90, [2, 3, 4, 5, 7, 11]
CLASSES = ("cat", "dog", "owl")


def task():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(N_TRAIN + 20, 1, 4, 5, generator=generator)
    y = torch.randint(3, (N_TRAIN + 20,), generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(20, 3))
    return Task(model, Split(images[:N_TRAIN], y[:N_TRAIN], CLASSES), Split(images[N_TRAIN:], y[N_TRAIN:], CLASSES))


def made(task, unit=EFFECT, seed=1, test_ids=SHOWN):
    """Scores with many ties, so that their order is put to the test."""
    values = torch.randn(len(test_ids), len(task.train), generator=torch.Generator().manual_seed(seed))
    return Scores((values * 4).round() / 4, "Made()", task.fingerprint(), torch.tensor(test_ids),
                  torch.arange(len(task.train)), unit)


def places(task):
    return task.train.x.flatten(1)[:, :2].numpy(), task.test.x.flatten(1)[:, :2].numpy()


def explorer(task):
    methods = {"influence": made(task), "likeness": made(task, "cosine, ranked only", seed=2)}
    return Explorer(task, methods, places(task), k=4)


def finished(explorer):
    """The explorer, when all maps that were asked for are made."""
    explorer.maps.worker.submit(int).result(10)
    return explorer


class Asked:
    """A method that is asked for one split at a time, and remembers which."""

    def __init__(self, scores):
        self.held, self.asked = scores, []

    def scores(self, split):
        self.asked.append(split.ids.tolist())
        rows = torch.stack([self.held.row(i) for i in split.ids])
        return Scores(rows, "Asked()", self.held.task, split.ids, self.held.train_ids)


class Maps:
    """An atlas of two layers; a map of the second one waits until it is let go, or fails; "near" has a number."""

    layers, projections, distances = ["first", "second"], ["PCA", "near", "broken"], ["cosine", "euclidean"]

    def __init__(self, task):
        self.task, self.go, self.made = task, threading.Event(), threading.Event()

    def near(self, projection):
        return ("neighbours", 2, 40, 15) if projection == "near" else None

    def place(self, layer, projection, test_ids, near=None):
        train, test = places(self.task)
        if projection == "broken":
            raise RuntimeError("no such luck")
        if projection == "near":
            return near * train, near * test[test_ids]
        if layer == "second":
            assert self.go.wait(10)
            self.made.set()
            return -train, -test[test_ids]
        return train, test[test_ids]

    def distance(self, layer, metric, test_id):
        scale = {"cosine": 10, "euclidean": 1}[metric] * {"first": 1, "second": 2}[layer]
        return scale * (self.task.train.x - self.task.test.x[test_id]).flatten(1).norm(dim=1).numpy()

    def distance_label(self, metric):
        return f"{metric} distance (units)"


def mapped(task):
    """Yield an explorer on `Maps`, with two methods; then close it."""
    maps = Maps(task)
    methods = {"influence": made(task), "likeness": made(task, "cosine, ranked only", seed=2)}
    explorer = Explorer(task, methods, maps, k=4)
    yield explorer
    maps.go.set()
    explorer.close()
