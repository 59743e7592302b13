"""Linear datamodelling scores on a network that never converged: unrolled influence beside every other method.

    python benchmarks/unrolled.py            # prints data/unrolled_lds.npz: stored results, nothing is computed
    python benchmarks/unrolled.py FOLDER     # first makes that file, in a quarter of an hour on one core; keeps what is
                                             # finished in FOLDER, and goes on from it

A 784-32-10 tanh network learns 2,000 digits for five epochs of SGD with momentum. Truth is the same run, with the same
start and order, without a random 1 % or 2 % of the digits, 120 times each; effects are read on 50 random test digits.
Every method with a damping has its best of several. `Influence` with its dense matrix is too large for 25,450
parameters: CG solves the same system. `Refined` needs that matrix too.
"""

import copy
import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from influence_nb import (
    CG,
    EKFAC,
    KFAC,
    TRAK,
    Arnoldi,
    Cosine,
    DataInf,
    GradCos,
    GradDot,
    Hessian,
    LiSSA,
    Nystroem,
    Scores,
    Task,
    TracIn,
    Unrolled,
    data,
    fit,
    fit_many,
    lds,
    models,
    removal_effects,
    slope,
    subsets,
)

SGD, ADAM = torch.optim.SGD, torch.optim.Adam
N, TESTS, M, SHARES, EPOCHS, BATCH = 2000, 50, 120, (0.01, 0.02), 5, 50
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)
MOMENTUM = partial(SGD, lr=0.02, momentum=0.9)
RUNS = [(nn.Tanh, partial(SGD, lr=lr, momentum=0.9), EPOCHS) for lr in (0.01, 0.02, 0.05, 0.1, 0.2)] + [
    (nn.Tanh, MOMENTUM, 10), (nn.Tanh, MOMENTUM, 20),
    (nn.GELU, partial(SGD, lr=0.05, momentum=0.9), EPOCHS), (nn.ReLU, partial(SGD, lr=0.05, momentum=0.9), EPOCHS),
    (nn.Tanh, partial(ADAM, lr=1e-3), EPOCHS), (nn.Tanh, partial(ADAM, lr=1e-3, eps=1e-3), EPOCHS)]


class Experiment:
    """A run, its start, and the truth about it; what is finished is kept in `folder`."""

    def __init__(self, folder: Path, activation=nn.Tanh, optimizer=MOMENTUM, epochs: int = EPOCHS, m: int = M):
        train, test = data.load("mnist-5500")
        tests = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:TESTS]
        self.folder, self.tests = folder, tests
        self.start = Task(models.mlp([784, 32, 10], activation), train.take(slice(N)), test.take(tests))
        self.run, seconds = {"epochs": epochs, "batch_size": BATCH, "optimizer": optimizer, "seed": 0}, []
        for _ in range(3):
            self.task, began = replace(self.start, model=copy.deepcopy(self.start.model)), time.process_time()
            self.history = fit(self.task, **self.run, keep=lambda epoch: True, progress=False)
            seconds.append(time.process_time() - began)
        self.training = min(seconds)
        self.w = [subsets(N, m, share, seed=k) for k, share in enumerate(SHARES)]
        self.truth = [removal_effects(self.start, w, partial(fit_many, progress=False, **self.run), together=20,
                                      store=folder / f"without-{share}") for w, share in zip(self.w, SHARES)]

    def scores(self, name: str, method) -> tuple[Scores, float]:
        """The scores of a method, and the seconds of one core that it took, from the folder where they are in it."""
        path = self.folder / f"{name}.npz"
        if not path.exists():
            began = time.process_time()
            fitted = (method.fit(self.task, self.start.model.state_dict()) if isinstance(method, Unrolled)
                      else method.fit(self.task))
            found = fitted.scores()
            found = replace(found, provenance={**found.provenance, "seconds": time.process_time() - began})
            found.save(path.with_suffix(".part.npz")).replace(path)
        found = Scores.load(path, self.task)
        return found, found.provenance["seconds"]

    def lds(self, scores: Scores, repeats: int = 1) -> list:
        return [lds(scores, w, truth, repeats=repeats) for w, truth in zip(self.w, self.truth)]


def methods(experiment: Experiment) -> dict:
    """The candidates of each row of the table, by a setting in words."""
    def swept(make):
        return {f"damping {damping:g}": make(damping) for damping in DAMPINGS}

    return {
        "Unrolled": {"": Unrolled(**experiment.run)},
        "CG, Hessian": swept(lambda d: CG(d, Hessian)), "CG, GGN": swept(CG), "LiSSA": swept(LiSSA),
        "Arnoldi": swept(Arnoldi), "Nystroem": swept(partial(Nystroem, rank=400)),
        "EKFAC, refined": swept(partial(EKFAC, refine=8)), "EKFAC": swept(EKFAC), "KFAC": swept(KFAC),
        "TRAK": swept(lambda d: TRAK(2048, damping=d)), "DataInf": swept(DataInf), "GradDot": {"": GradDot()},
        "GradCos": {"": GradCos()}, "TracIn": {"": TracIn(experiment.history.checkpoints)},
        "Cosine": {layer: Cosine(layer) for layer in ("act1", "linear2")}}


def best(experiment: Experiment, name: str, candidates: dict) -> tuple | None:
    """Setting, scores and seconds of the candidate with the highest mean score; None where all refuse."""
    found = []
    for setting, method in candidates.items():
        try:
            scores, seconds = experiment.scores(f"{name} {setting}".strip(), method)
            found.append((sum(value for value, *_ in experiment.lds(scores)), setting, scores, seconds))
        except ValueError as error:
            print(f"  {name}, {setting}: {error}", file=sys.stderr)
    return max(found, key=lambda one: one[0])[1:] if found else None


def table(experiment: Experiment) -> dict:
    """Every method at its best: its scores' LDS, with intervals, and what they predict."""
    rows, predicted = [], []
    for name, candidates in methods(experiment).items():
        if (row := best(experiment, name, candidates)) is None:
            continue
        setting, scores, seconds = row
        found = experiment.lds(scores, repeats=1000)
        print(f"  {name} {setting}: {found}", file=sys.stderr)
        predicted.append([(np.asarray(scores) @ (1 - w.numpy()).T).astype(np.float32) for w in experiment.w])
        rows.append((name, setting, [list(one) for one in found], seconds))
    names, settings, values, seconds = map(list, zip(*rows))
    arrays = {"methods": names, "settings": settings, "lds": values, "seconds": seconds, "shares": SHARES,
              "training": experiment.training, "test_ids": experiment.tests.numpy()}
    for k, share in enumerate(("1", "2")):
        gone = (experiment.w[k] == 0).nonzero()[:, 1].reshape(len(experiment.w[k]), -1)
        arrays |= {f"removed_{share}": gone.numpy().astype(np.int16), f"truth_{share}": experiment.truth[k].numpy(),
                   f"predicted_{share}": np.stack([p[k] for p in predicted])}
    return arrays


def roughness(folder: Path) -> dict:
    """For smoother and rougher runs, what the certificate says and what the scores are worth."""
    rows = []
    for activation, optimizer, epochs in RUNS:
        options = ", ".join(f"{k}={v:g}" for k, v in optimizer.keywords.items())
        run = f"{activation.__name__}, {epochs} epochs of {optimizer.func.__name__}({options})"
        experiment = Experiment(folder / run, activation, optimizer, epochs, m=60)
        scores, _ = experiment.scores("Unrolled", Unrolled(**experiment.run))
        facts = [scores.certificate["smoothness"], scores.certificate["error of a removal"],
                 *(value for value, *_ in experiment.lds(scores)), experiment.history.risk[-1]]
        print(f"  {run}: {facts}", file=sys.stderr)
        rows.append((run, facts))
    return {"runs": [run for run, _ in rows], "run_facts": np.array([facts for _, facts in rows], dtype=np.float32)}


def show(found: dict):
    """Print both tables."""
    print(f"{'method':16}{'':15}{'LDS, 1 % removed':>24}{'LDS, 2 % removed':>24}{'seconds':>9}{'trainings':>11}")
    for name, setting, values, seconds in zip(*(found[key] for key in ("methods", "settings", "lds", "seconds"))):
        words = "".join(f"{f'{v:.3f} [{low:.3f}, {high:.3f}]':>24}" for v, low, high in values)
        print(f"{name:16}{setting:15}{words}{seconds:9.1f}{seconds / found['training']:11.0f}")
    slopes = (slope(found[f"predicted_{share}"][0], found[f"truth_{share}"]).mean() for share in "12")
    print(f"slope of {found['methods'][0]}: " + ", ".join(f"{float(one):.3f}" for one in slopes))
    print(f"\n{'run':50}{'smoothness':>11}{'error':>10}{'LDS, 1 %':>10}{'LDS, 2 %':>10}{'risk':>8}")
    for run, facts in zip(found["runs"], found["run_facts"]):
        print(f"{run:50}{facts[0]:11.3f}{facts[1]:10.2g}{facts[2]:10.3f}{facts[3]:10.3f}{facts[4]:8.3f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    there = Path(__file__).resolve().parents[1] / "data" / "unrolled_lds.npz"
    if len(sys.argv) > 1:
        folder = Path(sys.argv[1])
        np.savez_compressed(there.with_suffix(".part.npz"), **table(Experiment(folder)), **roughness(folder))
        os.replace(there.with_suffix(".part.npz"), there)
    with np.load(there, allow_pickle=False) as file:
        show({name: file[name] for name in file.files})
