"""Bring the shipped all-CNN to a certified minimum: python data/make_converged.py FOLDER (an hour on one core).

Starts from all_cnn_mnist-5500.npz and goes on until |gradient| <= 1e-10, in float32 as far as that carries. FOLDER
keeps the weights of every 20th step and the log; started again, the script goes on from there. Writes
all_cnn_converged.npz and all_cnn_converged.log beside itself; make_leave_one_out.py certifies that it is a minimum.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from influence_nb import GGN, Hessian, Task, converge, data, models, newton

FOLDER, HERE = Path(sys.argv[1]), Path(__file__).parent


def quarter(task, w):
    """The Hessian of every fourth image in float32: good enough for a metric, in an eighth of the time."""
    return Hessian(replace(task, train=task.train.take(slice(None, None, 4))).to(torch.float32))


class Kept(Hessian):
    """The Hessian in float32, kept in FOLDER once it is computed: near the end, one metric serves to the end."""

    def dense(self):
        if not (FOLDER / "metric.npy").exists():
            np.save(FOLDER / "next.npy", Hessian(self.task.to(torch.float32), self.w).dense().numpy())
            (FOLDER / "next.npy").replace(FOLDER / "metric.npy")
        return torch.from_numpy(np.load(FOLDER / "metric.npy", allow_pickle=False))


STAGES = [  # precision, metric, |gradient| at which the next stage begins
    (torch.float32, GGN, 1e-2),
    (torch.float32, quarter, 1e-4),
    (torch.float64, quarter, 1e-5),
    (torch.float64, Kept, 1e-10)]

if __name__ == "__main__":
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    model = models.trained_all_cnn().to(memory_format=torch.channels_last)
    task, reached = Task(model, *data.load("mnist-5500"), l2=1e-3).to(torch.float64), 0
    if (FOLDER / "point.npz").exists():
        with np.load(FOLDER / "point.npz", allow_pickle=False) as point:
            newton.move(task, torch.from_numpy(point["theta"]))
            reached = int(point["stage"])
    log, start = open(FOLDER / "log", "a", buffering=1), time.monotonic()

    def watch(point):
        if point.steps % 20 == 0 or point.slope.norm() <= STAGES[stage][2]:
            print(f"stage {stage}  step {point.steps:3}  risk {point.value:.12f}  |gradient| {point.slope.norm():.3e}  "
                  f"{time.monotonic() - start:6.0f} s", file=log)
            np.savez(FOLDER / "next.npz", theta=point.theta.numpy(), stage=stage)
            (FOLDER / "next.npz").replace(FOLDER / "point.npz")

    for stage, (precision, metric, tol) in list(enumerate(STAGES))[reached:]:
        task = task.to(precision)
        found = converge(task, tol=tol, max_steps=100_000, curvature=metric, certify=False, watch=watch)
        print(f"stage {stage}: {found}", file=log)
    models.save_weights(task.model, HERE / "all_cnn_converged")
    (HERE / "all_cnn_converged.log").write_text((FOLDER / "log").read_text())
