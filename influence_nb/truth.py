"""Ground truth by retraining: what the removal of training examples really does.

A retraining is one choice of training weights w [n] in the risk R(theta; w); removing j means w_j = 0, and n stays n.
Its effect on test point i is

    loss(test_i; theta(w)) - loss(test_i; theta(1))        in nats; positive = what was removed was helpful

and for a task with a measure the drop of that. theta(1) is retrained in the same way as theta(w). Two kinds:

* *Fixed* truth: one deterministic function of w. Either the stationary point that `converge` reaches from the trained
  model, or the end of a training run that is repeated with the same start, order and seed.
* *Expected* truth: the mean over runs that differ in start and order, with its standard error.
"""

import os
import pickle
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, wait
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .newton import Convergence
from .parameters import copied, theta
from .removal import group, reading
from .store import Block, Store, certificate, question
from .task import Task
from .train import Ensemble, converge


def leave_one_out(task: Task, ids, **options) -> Tensor:
    """The measured effect [n_test, m] of removing each of the training examples `ids` [m] alone.

    Args:
        options: `retrain`, `tol`, `store`, `executor`, ... as for `removal_effects`.

    Raises:
        ValueError: an id is not in the training set or given twice, or as for `removal_effects`.
    """
    return leave_group_out(task, group(ids, len(task.train))[:, None], **options)


def leave_group_out(task: Task, groups, **options) -> Tensor:
    """The measured effect [n_test, m] of removing each group of training examples, `groups` m lists of ids.

    Args, Raises: as for `leave_one_out`.
    """
    return removal_effects(task, all_but(len(task.train), groups), **options)


def all_but(n: int, groups) -> Tensor:
    """Training weights [m, n] that are 0 for the examples of each group, m lists of ids, and 1 for all others."""
    groups = [group(ids, n) for ids in groups]
    w = torch.ones(len(groups), n)
    for row, ids in zip(w, groups):
        row[ids] = 0
    return w


def subsets(n: int, m: int, removed: float = 0.5, seed: int = 0) -> Tensor:
    """Training weights [m, n] of m random subsets: 0 for round(removed x n) examples of each, drawn without repetition.

    Raises:
        ValueError: that would remove no example, or all.
    """
    k = round(removed * n)
    if not 0 < k < n:
        raise ValueError(f"removed must be a share that leaves out 1 to {n - 1} of {n} examples, got {removed} ({k})")
    random = torch.Generator().manual_seed(seed)
    return all_but(n, [torch.randperm(n, generator=random)[:k] for _ in range(m)])


def removal_effects(task: Task, w, retrain: Callable | None = None, together: int | None = None, tol: float = 1e-10,
                    store=None, executor: Executor | None = None, progress: bool = True) -> Tensor:
    """The measured effect of every row of training weights: retrain with it, look at every test point.

    Args:
        task: a trained task for the default `retrain`; else, what a training run starts from.
        w: [m, n] training weights, 0 for a removed example; see `subsets`.
        retrain: retrain(task, w=...) trains the model of the task it is given (a copy) and must give the same result
            every time, for example partial(fit, epochs=5). None: `converge` in float64 to |gradient| <= tol, from the
            minimum with all examples and with its curvature. Only the slope at the end is then certified; `turned` in
            the certificate tells which retrainings may have gone to another minimum.
        together: None: `retrain` gets one row [n] at a time. A number b: it gets b rows [b, n] at once, and returns an
            Ensemble, as partial(fit_many, epochs=5) does.
        store: a folder that keeps every finished retraining with its certificate; a second call with the same folder
            repeats none. It knows the question by the task, and by the retrainer's code with all values that it takes
            from outside. `audit(folder)` reads it.
        executor: any `concurrent.futures.Executor`. Its workers should have one torch thread each:
            ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)).
            Threads of one process take turns in `fit` and `fit_many`, for they share one random state.

    Cost: m + 1 retrainings. By default a dense Hessian and its decomposition, then a few passes over the training set
    a removed example.

    Returns:
        Tensor [n_test, m] on the model's device, positive = helpful.

    Raises:
        ValueError: w has another shape, a retraining did not converge or left its model as it was, or the store is of
            another question.
        TypeError: (default `retrain`) the model is not float64.
    """
    n, w = len(task.train), torch.as_tensor(w).detach().cpu().double()
    if w.ndim != 2 or w.shape[1] != n or not torch.isfinite(w).all():
        raise ValueError(f"training weights w must be finite and [m, n] = (m, {n}), got {tuple(w.shape)}")
    if together is not None and (retrain is None or not isinstance(together, int) or together < 1):
        raise ValueError(f"together= needs a retrain that takes {together} rows of w at once, such as fit_many")
    blocks = torch.cat([torch.ones(1, n).double(), w]).split(together or 1)
    kept = None if store is None else Store(store, question(task, retrain, tol))
    found = {k: kept and kept.get(rows.numpy()) for k, rows in enumerate(blocks)}
    bar = tqdm(desc="retraining", total=len(w) + 1, disable=not progress, leave=False)

    def finish(k: int, block: Block) -> None:
        if kept is not None:
            kept.put(block)
        found[k] = block
        bar.update(len(block.w))

    with bar:
        bar.update(sum(len(block.w) for block in found.values() if block))
        if retrain is None and not all(found.values()):
            task = copied(task)
            base = converge(task, tol=tol)
            retrain = partial(converge, tol=tol, base=base.eigen)
            if not found[0]:
                finish(0, Block(blocks[0].numpy(), readings(task, theta(task)[None]), [certificate(base)]))
        missing = {k: blocks[k].numpy() for k, block in found.items() if not block}
        work(partial(retrained, retrain, task, together is not None), missing, executor, finish)
    values = torch.from_numpy(np.concatenate([found[k].readings for k in range(len(blocks))]))
    return (values[1:] - values[0]).T.to(theta(task))


class Expected(NamedTuple):
    """Effects over s runs: their mean and its standard error [n_test, m], and those of every run [s, n_test, m]."""

    mean: Tensor
    standard_error: Tensor
    replicates: Tensor


def expected_effects(task: Task, w, retrain: Callable, seeds, model: Callable | None = None, store=None,
                     **options) -> Expected:
    """The effect of every row of training weights, as the mean over training runs with different seeds.

    Within a run all rows share start and order, and so does the run with all examples that they are compared with:
    each run's differences are unbiased, and mostly less noisy than those of unrelated runs.

    Args:
        w: [m, n] training weights.
        retrain: as for `removal_effects`, with a further argument seed=, as `fit` and `fit_many` have it.
        seeds: at least two numbers, one for each run.
        model: model(seed=...) -> the untrained model of a run, for example partial(models.mlp, [784, 32, 10]); None:
            every run starts from the model of the task, and they differ in the order of the data only.
        store: a folder; each run keeps its retrainings in one of its own within it.
        options: `together`, `executor`, `progress` as for `removal_effects`.

    Raises:
        ValueError: fewer than two seeds, or one of them twice; and as for `removal_effects`.
    """
    seeds, runs = list(seeds), []
    if len(set(seeds)) < max(2, len(seeds)):
        raise ValueError(f"seeds must be at least two different numbers, got {seeds}")
    for seed in seeds:
        start = task if model is None else replace(task, model=model(seed=seed).to(theta(task)))
        folder = None if store is None else Path(store) / f"seed-{seed}"
        runs.append(removal_effects(start, w, partial(retrain, seed=seed), store=folder, **options))
    replicates = torch.stack(runs)
    return Expected(replicates.mean(0), replicates.std(0) / len(seeds) ** 0.5, replicates)


def work(do: Callable, missing: dict, executor: Executor | None, finish: Callable) -> None:
    """finish(k, do(rows)) for every block of rows, here or by the executor; what is done is kept if one fails.

    The arguments travel as bytes, for torch would move them to shared memory, which is small in containers; with
    cloudpickle, which dask brings, a notebook's own classes travel too.
    """
    if executor is None:
        for k, rows in missing.items():
            finish(k, do(rows))
        return
    try:
        from cloudpickle import dumps
    except ImportError:
        from pickle import dumps
    parcel, left, waiting = dumps(do), iter(missing.items()), {}
    most = max(2 * (os.cpu_count() or 1), 2**30 // len(parcel))  # that are on their way at a time
    try:
        while True:
            for k, rows in islice(left, most - len(waiting)):
                waiting[executor.submit(unpacked, parcel, rows)] = k
            if not waiting:
                return
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                finish(waiting[future], future.result())
                del waiting[future]
    finally:
        for future, k in waiting.items():
            if not future.cancel() and future.done() and not future.exception():
                finish(k, future.result())


def unpacked(parcel: bytes, rows: np.ndarray) -> Block:
    """Run a pickled call on a block of rows, in a worker."""
    return pickle.loads(parcel)(rows)


def retrained(retrain: Callable, task: Task, many: bool, rows: np.ndarray) -> Block:
    """Retrain with each row of weights [b, n], on a copy of the task."""
    task, start, w = copied(task), theta(task), torch.from_numpy(rows).to(theta(task))
    try:
        found = retrain(task, w=w if many else w[0])
        if many and not (isinstance(found, Ensemble) and len(found) == len(w)):
            raise TypeError(f"with together=, retrain must return an Ensemble of {len(w)} models, as fit_many does, "
                            f"got {type(found).__name__}")
        if not (many or isinstance(found, Convergence) or (w == 1).all()) and torch.equal(theta(task), start):
            raise ValueError("expected retrain(task, w=...) to train the model of the task that it is given, got one "
                             "that leaves it as it was: does it train a copy?")
        if many:
            return Block(rows, readings(task, found.thetas), [{"risk": risk} for risk in found.risk.tolist()])
        return Block(rows, readings(task, theta(task)[None]), [certificate(found)])
    except ValueError as error:
        gone = [(row == 0).nonzero()[:, 0].tolist()[:10] or "none" for row in w[:10]]
        raise ValueError(f"retraining without {gone if many else gone[0]} failed: {error}") from error


def readings(task: Task, thetas: Tensor) -> np.ndarray:
    """What a removal raises where the examples were helpful, [b, n_test], at the rows of thetas [b, p]."""
    values = torch.stack([reading(task, task.test, flat) for flat in thetas]).double().cpu().numpy()
    if not np.isfinite(values).all():
        raise ValueError("expected finite test losses after retraining, got NaN or infinity: a smaller learning rate?")
    return values
