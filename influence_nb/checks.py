"""check_method: what every attribution method must do, on problems small enough to know the answer."""

import copy
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from .models import logistic
from .scores import Scores
from .task import Split, Task
from .train import converge, fit
from .truth import leave_one_out


def blobs(n_train: int = 41, n_test: int = 7, seed: int = 0) -> Task:
    """Softmax regression on three Gaussian clouds in 4 dimensions, converged in float64. Training examples 0 and 1 are
    equal, and example 2 is test point 0 with the wrong label."""
    random = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n_train + n_test,), generator=random)
    x = torch.randn(n_train + n_test, 4, generator=random, dtype=torch.float64) + 1.5 * nn.functional.one_hot(y, 4)
    x[1], y[1] = x[0], y[0]
    x[2], y[2] = x[n_train], (y[n_train] + 1) % 3
    names = ("a", "b", "c")
    task = Task(logistic(4, 3, seed=seed).double(), Split(x[:n_train], y[:n_train], names),
                Split(x[n_train:], y[n_train:], names), l2=0.05)
    converge(task)
    return task


def restless(seed: int = 0) -> Task:
    """A network with BatchNorm, dropout and a frozen layer, in train mode, on images of 6 x 6 pixels."""
    random = torch.Generator().manual_seed(seed)
    x, y = torch.rand(23, 1, 6, 6, generator=random), torch.randint(3, (23,), generator=random)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(),
                              nn.Dropout(0.5),
                              nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 3))
        model[5].weight.requires_grad_(False)
    task = Task(model, Split(x[:18], y[:18]), Split(x[18:], y[18:]), l2=0.1)
    fit(task, epochs=3, batch_size=7, progress=False, seed=seed)
    return replace(task, model=model.train())


def check_method(method, pearson: float = 0.99) -> list[str]:
    """Put an attribution method through the conformance checks, and name those it passed.

    Args:
        method: an unfitted method: `fit(task) -> self`, `scores(split=None) -> Scores`.
        pearson: how well removal effects must follow retraining; less for a method that approximates the curvature.

    Checks: `fit` returns the method; the scores are finite, [n_test, n_train], of this task, with the right ids, and
    the same twice, and again from the same instance fitted to another task and back; a part of the test points scores
    as it does in the whole; equal training examples score equally; the order of the training data does not matter; the
    scores survive a file; model, modes, flags and random state are left as found, with BatchNorm, dropout and frozen
    layers too. Where there is a `self_influence`, it is finite, [n_train], and does not depend on the order either.
    For removal effects: it is what the training examples score as test points; positive is helpful; and the scores
    follow leave-one-out retraining (Pearson >= `pearson`, slope within 0.8-1.25) on softmax regression, where first
    order is accurate.

    Returns:
        The names of the checks.

    Raises:
        ValueError: a check fails, with what was expected and what came.
    """
    passed = []

    def expect(condition, name, message):
        if not condition:
            raise ValueError(f"{type(method).__name__} fails '{name}': {message}")
        passed.append(name)

    task = blobs()
    before = snapshot(task.model)
    fitted = copy.deepcopy(method).fit(task)
    expect(isinstance(fitted, type(method)), "fit returns the method", f"got {type(fitted).__name__}")
    scores = fitted.scores()
    values = scores.values
    expect(isinstance(scores, Scores) and scores.shape == (7, 41), "shape", f"expected Scores [7, 41], got {scores!r}")
    expect(bool(torch.isfinite(values).all()), "finite", "some scores are NaN or infinite")
    expect(scores.task == task.fingerprint(), "fingerprint", "the scores do not name their task")
    with TemporaryDirectory() as folder:
        again = Scores.load(scores.save(Path(folder) / "scores"), task)
    expect(torch.equal(values, again.values) and again.method == scores.method, "file", "a saved copy differs")
    expect(torch.equal(values, fitted.scores().values), "same twice", "a second call gives other scores")
    part = fitted.scores(task.test.take([5, 2]))
    expect(part.test_ids.tolist() == [5, 2] and close(part.values, values[[5, 2]]), "part of the test points",
           "test points 5 and 2 alone score otherwise than among all")
    expect(close(values[:, 0], values[:, 1]), "duplicates", "training examples 0 and 1 are equal, their scores are not")
    order = torch.randperm(41, generator=torch.Generator().manual_seed(1))
    shuffled = replace(task, train=Split(task.train.x[order], task.train.y[order], task.train.classes))
    other = copy.deepcopy(method).fit(shuffled)
    expect(close(other.scores().values, values[:, order]), "order of the data",
           "the scores change with the order of the training data")
    if hasattr(fitted, "self_influence"):
        own = fitted.self_influence()
        expect(own.shape == (41,) and bool(torch.isfinite(own).all()), "self-influence",
               f"expected [41] finite numbers, got {tuple(own.shape)}")
        expect(close(other.self_influence(), own[order]), "self-influence in any order",
               "it changes with the order of the training data")
        if scores.is_effect:
            expect(close(own, fitted.scores(task.train).values.diagonal()), "self-influence and scores",
                   "it is not what the training examples score as test points")
    expect(close(other.fit(task).scores().values, values), "fitted anew",
           "an instance that was fitted before, to another task, gives other scores")
    expect(untouched(task.model, before), "model left as found", "weights, modes or flags have changed")

    noisy = restless()
    before, random = snapshot(noisy.model), torch.get_rng_state()
    try:
        copy.deepcopy(method).fit(noisy).scores()
    except (ValueError, TypeError):
        pass  # a method may refuse a network that is at no minimum, or float32; it must leave it as found in any case
    expect(untouched(noisy.model, before), "BatchNorm, dropout, frozen layers", "weights, modes or flags have changed")
    expect(torch.equal(random, torch.get_rng_state()), "random state", "the global random state has moved")

    if scores.is_effect:
        expect(values[0, 2] < 0, "sign",
               f"example 2 is test point 0 with a wrong label: it must harm, got {values[0, 2]:.3g}")
        truth = leave_one_out(task, range(41), progress=False)
        r = float(torch.corrcoef(torch.stack([values.flatten(), truth.flatten()]))[0, 1])
        slope = float((values * truth).sum() / values.square().sum())
        expect(r >= pearson and 0.8 <= slope <= 1.25, "leave-one-out",
               f"Pearson {r:.3f}, slope {slope:.3f} against retraining")
    return passed


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-3 * b.abs().max())


def snapshot(model: nn.Module):
    """Copies of all weights and buffers, and every mode and flag."""
    return ({name: value.clone() for name, value in model.state_dict().items()}, [m.training for m in model.modules()],
            [p.requires_grad for p in model.parameters()], [p.grad for p in model.parameters()],
            [len(m._forward_hooks) for m in model.modules()])


def untouched(model: nn.Module, before) -> bool:
    now = snapshot(model)
    return now[0].keys() == before[0].keys() and all(torch.equal(now[0][name], before[0][name]) for name in now[0]) \
        and now[1:] == before[1:]
