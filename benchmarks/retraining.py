"""How fast retraining is: 100 networks on random halves of the training set, side by side and one by one; and the
published network without one image after the other, to certified minima.

    python benchmarks/retraining.py
"""

import copy
import time
from dataclasses import replace
from functools import partial

import torch

from influence_nb import GGN, Refined, Split, Task, data, fit, fit_many, models, subsets

EPOCHS, M = 5, 100
MOMENTUM = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def pixels(side: int, n: int = 1000) -> tuple[Split, Split]:
    """The first n training and 200 test digits, scaled to side x side pixels."""
    train, test = data.load("mnist-5500")
    return tuple(replace(split, x=torch.nn.functional.interpolate(split.x, (side, side), mode="area"), text=())
                 for split in (train.take(slice(n)), test.take(slice(200))))


def row(name: str, model, side: int, batch_size: int):
    """Train M models both ways, and print how long that took and how far the results are apart."""
    task = Task(model, *pixels(side), l2=1e-3)
    w = subsets(len(task.train), M)
    settings = {"epochs": EPOCHS, "batch_size": batch_size, "optimizer": MOMENTUM, "progress": False}
    start = time.perf_counter()
    losses = fit_many(task, w, **settings).losses()
    many = time.perf_counter() - start
    start, apart = time.perf_counter(), 0.0
    for i in range(M):
        one = replace(task, model=copy.deepcopy(task.model))
        fit(one, w=w[i], **settings)
        apart = max(apart, float((one.losses() - losses[i]).abs().max()))
    alone = time.perf_counter() - start
    print(f"{name:34}{batch_size:7}{alone:12.1f}{many:14.2f}{alone / many:8.1f}{apart:22.1e}", flush=True)


def without_one(m: int = 6, most: int = 60):
    """Follow the removal of the first m training images (they are in random order) in the metric of the GGN, and put
    the time of a pass to the passes that the stored leave-one-out took, in the metric of the Hessian."""
    train, test = (split.to(torch.float64) for split in data.load("mnist-5500"))
    stored = data.stored("leave_one_out_all_cnn")
    task = Task(models.converged_all_cnn(), train, test.take(stored["test_ids"]), l2=1e-3)
    start = time.perf_counter()
    method = Refined(curvature=GGN, rough=1e-2).fit(task)
    print(f"\nall-CNN, 5,500 images, one thread: leave-one-out to a Newton decrement of 1e-3 of its first, "
          f"after a fit of {time.perf_counter() - start:.0f} s")
    print(f"{'image':>6}{'passes':>8}{'seconds':>9}{'left':>9}")
    passes = seconds = 0
    for j in range(m):
        start, first = time.perf_counter(), None
        for point, _ in method.orders(j):
            first = first or point.decrement
            if point.decrement <= 1e-3 * first or point.passes >= most:
                break
        took = time.perf_counter() - start
        passes, seconds = passes + point.passes, seconds + took
        print(f"{j:6}{point.passes:8}{took:9.1f}{point.decrement / first:9.0e}", flush=True)
    place = {image: k for k, image in enumerate(stored["ids"].tolist())}
    for name in ("random", "top_six", "top_right"):
        spent = int(stored["passes"][[place[image] for image in stored[name].tolist()]].sum())
        hours = spent * seconds / passes / 2 / 3600
        print(f"500 stored removals, {name:10}{spent:7} passes: {hours:.1f} hours in two processes")


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"{M} networks, 1,000 digits, {EPOCHS} epochs of SGD with momentum, float32, one thread")
    print(f"{'network':34}{'batch':>7}{'one by one':>12}{'side by side':>14}{'times':>8}{'losses apart, nats':>22}")
    row("mlp 784-32-10", models.mlp([784, 32, 10]), 28, 100)
    row("mlp 100-16-10", models.mlp([100, 16, 10]), 10, 100)
    row("mlp 100-16-10", models.mlp([100, 16, 10]), 10, 20)
    without_one()
