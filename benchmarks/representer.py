"""How long a certified refit of a last layer takes, and how long it then takes to explain a test point, by representer
values and by influence: of a last layer alone, and of a small network.

    python benchmarks/representer.py
"""

import time
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from influence_nb import CG, LastLayer, Representer, Split, Task, data, fit, models

N, D, C = 50_000, 512, 10


def features(n: int = N + 1_000, d: int = D, c: int = C, apart: float = 0.3, seed: int = 0) -> tuple[Split, Split]:
    """What a network with ReLU might make of c classes, in float64, with a decaying spectrum; 1,000 are for testing."""
    random = torch.Generator().manual_seed(seed)
    y, centres = torch.randint(c, (n,), generator=random), torch.randn(c, d, generator=random)
    scale = 3 / torch.arange(1, d + 1) ** 0.5
    x = ((apart * centres[y] + torch.randn(n, d, generator=random)) * scale).relu().double()
    return Split(x[:-1000], y[:-1000]), Split(x[-1000:], y[-1000:])


def clocked(work):
    """What `work` returns, and the seconds it took, on the clock and of all processors together."""
    start, busy = time.perf_counter(), time.process_time()
    return work(), time.perf_counter() - start, time.process_time() - busy


def line(name: str, task: Task, method: Representer) -> Representer:
    """Fit, and print how long it took and what is certified."""
    method, seconds, busy = clocked(lambda: method.fit(task))
    facts = method.scores(task.test.take(range(100))).certificate
    right = float((method.outputs().argmax(1) == task.test.y).double().mean())
    print(f"{name:38}{facts['l2']:8.0e}{seconds:9.1f}{busy:9.1f}{facts['passes']:8}{facts['gradient norm']:13.1e}"
          f"{max(facts['reconstruction error']):16.1e}{right:10.3f}", flush=True)
    return method


def one_point(name: str, task: Task, methods: dict) -> None:
    """Explain a test point of one model, and print how long each method took."""
    one = task.test.take([0])
    print(f"\n{name:38}{'fit, s':>9}{'CPU s':>9}{'scores, s':>11}{'CPU s':>9}")
    for name, each in methods.items():
        each, *fitted = clocked(lambda each=each: each.fit(task))
        each.scores(one)
        _, *scored = clocked(lambda each=each: each.scores(one))
        print(f"{name:38}{fitted[0]:9.2f}{fitted[1]:9.2f}{scored[0]:11.4f}{scored[1]:9.4f}", flush=True)


def refitted(task: Task, method: Representer) -> Task:
    """The task with the last layer that a method has fitted, and its l2."""
    with torch.no_grad():
        task.model.weight.copy_(method.theta_[:-1].T)
        task.model.bias.copy_(method.theta_[-1])
    return replace(task, l2=method.facts_["l2"])


def network() -> Task:
    """784-64-10 on 2,000 images of clothes, float64."""
    train, test = (split.to(torch.float64) for split in data.load("fashion-small"))
    task = Task(models.mlp([784, 64, 10]).double(), train, test, l2=1e-3)
    fit(task, epochs=20, batch_size=50, optimizer=partial(torch.optim.Adam, lr=1e-3), progress=False)
    return task


if __name__ == "__main__":
    torch.set_num_threads(2)
    print(f"refit of {N:,} x {D + 1} features (the 1 for the bias among them), {C} classes, float64, two threads")
    print(f"{'':38}{'l2':>8}{'seconds':>9}{'CPU s':>9}{'passes':>8}{'|gradient|':>13}{'reconstruction':>16}"
          f"{'accuracy':>10}")
    for name, apart in (("classes that overlap", 0.1), ("classes that are nearly separable", 0.3)):
        train, test = features(apart=apart)
        task = Task(nn.Linear(D, C).double(), train, test, regularised=lambda name: True)
        kept = line(name, task, Representer(1e-3))
        line(name, task, Representer(1e-5))
    small, test = features(3_000, 4_096)
    line("2,000 x 4,097, by the dual", Task(nn.Linear(4_096, C).double(), small, test), Representer(1e-3))
    one_point("one test point, nearly separable, 1e-3", refitted(task, kept),
              {"representer values": Representer(), "influence, CG": CG()})
    one_point("one test point, 784-64-10 on 2,000", network(),
              {"representer values": Representer(), "influence of the last layer": LastLayer(),
               "influence, CG, damping 0.01": CG(damping=1e-2)})
