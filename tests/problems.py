"""Tiny seeded problems that several test files share; n_train, n_test and p differ, so that a transposition fails."""

import copy
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from influence_nb import Split, Task, Unrolled, converge, fit, models


def digits_task(n=60, n_test=9, l2=5e-2, seed=0, model=None, trained=True):
    """Softmax regression (or `model`) on random images of 3 x 3 pixels in 4 classes, converged in float64."""
    random = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (n + n_test,), generator=random)
    centres = torch.randn(4, 1, 3, 3, generator=random, dtype=torch.float64)
    x = centres[y] + torch.randn(n + n_test, 1, 3, 3, generator=random, dtype=torch.float64)
    names = ("north", "east", "south", "west")
    model = (model or models.logistic(9, 4, seed=seed)).double()
    task = Task(model, Split(x[:n], y[:n], names), Split(x[n:], y[n:], names), l2=l2)
    if trained:
        converge(task)
    return task


def mlp_task(n=40, n_test=7, l2=2e-2, seed=0):
    """A tanh network with 9-5-4 units, 74 parameters, at a minimum to |gradient| <= 1e-10 in float64."""
    task = digits_task(n, n_test, l2, seed, models.mlp([9, 5, 4], seed=seed), trained=False)
    fit(task, epochs=800, batch_size=n, optimizer=partial(torch.optim.Adam, lr=0.02), progress=False, seed=seed)
    converge(task)
    return task


def conv_net(seed=0):
    """Every layer that the hooks know: Conv2d with stride, padding and dilation, with and without bias, and Linear."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 3, 2, padding=1, bias=False), nn.Tanh(),
                             nn.Conv2d(3, 2, 2, stride=2, dilation=2, padding=1), nn.ReLU(inplace=True),
                             nn.Flatten(), nn.Linear(8, 5, bias=False), nn.Tanh(), nn.Linear(5, 4))


class Shared(nn.Module):
    """One linear layer used twice, which the hooks must notice."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.inner, self.out = nn.Linear(9, 9), nn.Linear(9, 4)

    def forward(self, x):
        return self.out(torch.tanh(self.inner(torch.tanh(self.inner(x.flatten(1))))))


class Tied(nn.Module):
    """A layer whose weight is used once more outside it, which its hook cannot see."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.inner, self.out = nn.Linear(9, 9), nn.Linear(9, 4)

    def forward(self, x):
        return self.out(torch.tanh(self.inner(x.flatten(1))) @ self.inner.weight)


def normed(seed=0):
    """LayerNorm and GroupNorm with trained parameters: the functional path."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.LayerNorm(16),
                             nn.Linear(16, 4))


SGD, ADAM = torch.optim.SGD, torch.optim.Adam
RULES = {"sgd": partial(SGD, lr=0.1), "undamped": partial(SGD, lr=0.1, dampening=0.5),  # torch damps momentum only
         "momentum": partial(SGD, lr=0.05, momentum=0.9, dampening=0.3),
         "nesterov": partial(SGD, lr=0.05, momentum=0.9, nesterov=True), "adam": partial(ADAM, lr=1e-2),
         "quick adam": partial(ADAM, lr=5e-3, betas=(0.5, 0.8), eps=1e-4)}


def falling(epoch):
    return 0.7**epoch


class Trained:
    """A network after 4 epochs of 4 steps (the last on 5 examples of 23), far from any minimum, and its run."""

    def __init__(self, optimizer=RULES["sgd"], net=None, epochs=4, batch_size=6, **settings):
        self.task = digits_task(n=23, n_test=5, l2=2e-2, model=net or models.mlp([9, 5, 4]), trained=False)
        self.task = replace(self.task, **settings)
        self.start = copy.deepcopy(self.task.model.state_dict())
        self.run = {"epochs": epochs, "batch_size": batch_size, "optimizer": optimizer, "schedule": falling, "seed": 3}
        self.history = fit(self.task, **self.run, keep=lambda epoch: True, progress=False)

    def again(self, w):
        """What a removal raises, [n_test], after the run with weights w."""
        model = copy.deepcopy(self.task.model)
        model.load_state_dict(self.start)
        task = replace(self.task, model=model)
        fit(task, **self.run, w=w, progress=False)
        return task.losses() if task.measure is None else -task.measure(task.outputs(), task.test.y)

    def moved(self, j, up):
        w = torch.ones(len(self.task.train), dtype=torch.float64)
        w[j] += up
        return self.again(w)

    def differences(self, h=1e-5):
        """- d loss_i / d w_j [n_test, n_train] by central differences."""
        return torch.stack([(self.moved(j, -h) - self.moved(j, h)) / (2 * h) for j in range(len(self.task.train))], 1)

    def method(self, **others):
        return Unrolled(**{**self.run, **others})

    def scores(self):
        return self.method().fit(self.task, self.start).scores()
