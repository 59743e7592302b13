"""Retrain the converged all-CNN without each of 1,144 training images:
python data/make_leave_one_out.py FOLDER PROCESSES (some four hours on two cores)

Which images: for two sixes of the test set, 6558, which is read as a 2 in the published experiment, and the first that
is read right, the 500 of largest first-order influence each; and 500 drawn at random. What is measured: the losses of
100 test images, both sixes first. A removal is followed until the Newton decrement that is left is 1e-3 of its first,
or for 200 passes, and what `Refined` says on the way is kept. The 60 strongest are also removed, and added, by 1 %.

FOLDER keeps the Hessian, which takes a quarter of an hour, and a file for every finished removal; started again, the
script goes on from there. Writes leave_one_out_all_cnn.npz beside itself.
"""

import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from influence_nb import Hessian, Influence, Refined, Task, converge, data, models
from influence_nb.attribute.refine import trusted
from influence_nb.metrics import pearson
from influence_nb.parameters import theta

HERE, FOLDER = Path(__file__).parent, Path(sys.argv[1])
SIX, TESTS = 6558, 100                     # the misread six, and test images in all
TOP, RANDOM = 500, 500                     # training images removed: strongest for each six, and at random
NUDGES, CHECKS = 60, 12                    # of them, removed by 1 %, and retrained once more in another way
TOL, MOST = 1e-3, 200                      # Newton decrement at the end, of that of the removal; and most passes
ROUGH = 1e-2                               # passes are in float32 down to this decrement
STOP = 1e-2                                # where Refined stops by itself
MARKS = 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 48, 96, 144   # passes after which Refined is read

PLAIN = "passes", "stopped", "first_decrement", "decrement", "turned", "gradient_norm", "moved"


def write(name: str, **arrays) -> None:
    """A finished file or none at all."""
    np.savez(FOLDER / "next" / name, **arrays)
    (FOLDER / "next" / name).replace(FOLDER / name)


def read(name: str) -> dict:
    with np.load(FOLDER / name, allow_pickle=False) as arrays:
        return {key: torch.from_numpy(value) for key, value in arrays.items()}


@cache
def problem() -> tuple[Task, list]:
    """The converged network with 100 test images, and the numbers of these in the test set."""
    train, test = data.load("mnist-5500")
    task = Task(models.converged_all_cnn(), train.to(torch.float64), test.to(torch.float64), l2=1e-3)
    right = ((task.predict() == 6) & (test.y == 6)).nonzero()[0, 0].item()
    mixed = torch.randperm(len(test), generator=torch.Generator().manual_seed(0)).tolist()
    shown = [SIX, right, *(i for i in mixed if i not in (SIX, right))][:TESTS]
    return Task(task.model, task.train, test.take(shown).to(torch.float64), l2=1e-3), shown


def part_of_hessian(k: int) -> None:
    """The Hessian of every fourth image from k on; the mean of the four is the Hessian."""
    torch.set_num_threads(1)
    task = problem()[0]
    write(f"hessian-{k}.npz",
          H=Hessian(replace(task, train=task.train.take(slice(k, None, 4))), batch_size=100).dense().numpy())


def stored(task: Task) -> Hessian:
    """The Hessian, computed once."""
    H = Hessian(task)
    H.dense = lambda: sum(read(f"hessian-{k}.npz")["H"] for k in range(4)) / 4
    return H


@cache
def method() -> Refined:
    torch.set_num_threads(1)
    return Refined(curvature=stored, rough=ROUGH).fit(problem()[0])


def follow(j: int) -> str:
    """Follow one removal to its end, and write what each pass told."""
    start, told, first, stopped, before = time.monotonic(), [], None, None, None
    bar, ahead = torch.zeros(TESTS, dtype=torch.float64), True
    for point, effect in method().orders(j):
        first, was, change = first or point, ahead, (effect - (effect if before is None else before)).abs()
        ahead = trusted(point, first)
        bar = torch.maximum(change, bar) if was and not ahead else change
        told += [before] * (sum(mark < point.passes for mark in MARKS) - len(told))
        if stopped is None and point.decrement <= STOP * first.decrement:
            stopped = {"stopped": point.passes, "refined": effect.numpy(), "bar": bar.numpy()}
        before = effect
        if point.decrement <= TOL * first.decrement or point.passes >= MOST:
            break
    told += [effect] * (len(MARKS) - len(told))
    slope = float(point.slope.norm())
    if stopped is None:
        stopped = {"stopped": point.passes, "refined": effect.numpy(), "bar": np.full(len(effect), np.inf)}
    write(f"removal-{j}.npz", orders=torch.stack(told).numpy(), effect=effect.numpy(), passes=point.passes,
          first_decrement=first.decrement, decrement=point.decrement, turned=point.turned,
          gradient_norm=slope, moved=float((point.theta - theta(problem()[0])).norm()), **stopped)
    left = point.decrement / first.decrement
    return f"{j:5}  {point.passes:3} passes  {left:.1e} left  {time.monotonic() - start:5.1f} s"


@cache
def settled() -> Task:
    """The network settled as far as float64 goes: a removal of 1 % moves it by little."""
    task = problem()[0].to(torch.float64)
    converge(task, tol=1e-12, base=method().solver_)
    return task


def nudge(j: int, share: float = 0.01, name: str = "nudge") -> str:
    """Take a share of the weight from training image j, and write what follows."""
    task, w = settled().to(torch.float64), torch.ones(len(problem()[0].train)).double()
    w[j] -= share
    found = converge(task, w, tol=1e-12, base=method().solver_)
    write(f"{name}-{j}.npz", effect=(task.losses() - settled().losses()).numpy())
    return f"{j:5}  {share:+.0%}  {found.passes:3} passes  |gradient| {found.gradient_norm:.1e}"


def check(j: int) -> str:
    """Retrain without training image j by itself: the plain metric, no leverage, to a vanishing gradient. Then put it
    back, and see whether the network returns to where it was."""
    task, w = problem()[0].to(torch.float64), torch.ones(len(problem()[0].train)).double()
    w[j] = 0
    found = converge(task, w, tol=1e-8, max_steps=5000, base=method().solver_)
    effect = task.losses() - problem()[0].losses()
    back = converge(task, tol=1e-8, max_steps=5000, base=method().solver_)
    write(f"check-{j}.npz", effect=effect.numpy(), back_moved=float((theta(task) - theta(problem()[0])).norm()),
          back_risk=back.risk - method().risk_)
    return f"{j:5}  check  {found.passes:3} passes, and {back.passes:3} back"


def finish(pool, log, what: str, function, ids: list) -> None:
    """Do what is not done yet of one kind of work."""
    left = [j for j in ids if not (FOLDER / f"{what}-{j}.npz").exists()]
    for line in pool.map(function, left):
        print(line, file=log)


def collected(jobs: dict, first: torch.Tensor, sets: dict) -> dict:
    """The arrays of the data file; removals are columns, in the order of jobs["removal"]."""
    ids = jobs["removal"]
    found, nudged, raised, checked = ([read(f"{what}-{j}.npz") for j in jobs[what]]
                                      for what in ("removal", "nudge", "raise", "check"))
    columns = {name: torch.stack([f[name] for f in found], -1) for name in ("effect", "refined", "bar", "orders")}
    place = {j: k for k, j in enumerate(ids)}
    sets_of_columns = [[place[j] for j in some] for some in sets.values()]
    agreement = torch.stack([torch.stack([pearson(told[:, own], columns["effect"][:, own])
                                          for told in columns["orders"]]) for own in sets_of_columns])
    several = {"nudged": nudged, "raised": raised, "checked": checked}
    return {"ids": ids, "nudges": jobs["nudge"], "checks": jobs["check"], **sets, "marks": MARKS,
            "first": first[:, ids], "agreement": agreement, "orders": columns.pop("orders")[:, :2], **columns,
            **{name: torch.stack([f["effect"] for f in some], 1) for name, some in several.items()},
            **{name: [f[name].item() for f in checked] for name in ("back_moved", "back_risk")},
            "smallest_eigenvalues": read("first.npz")["eigenvalues"][:3],
            **{name: [f[name].item() for f in found] for name in PLAIN}}


if __name__ == "__main__":
    (FOLDER / "next").mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    task, shown = problem()
    with ProcessPoolExecutor(int(sys.argv[2])) as pool:
        list(pool.map(part_of_hessian, [k for k in range(4) if not (FOLDER / f"hessian-{k}.npz").exists()]))
    if not (FOLDER / "first.npz").exists():
        influence = Influence(curvature=stored).fit(task)
        write("first.npz", first=influence.scores().values.numpy(), eigenvalues=influence.solver_.values.numpy())
    first = read("first.npz")["first"]                                                      # [100, 5500]
    top = [first[i].abs().topk(TOP).indices.tolist() for i in (0, 1)]
    some = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(1))[:RANDOM].tolist()
    ids = list(dict.fromkeys([*(j for pair in zip(*top, strict=True) for j in pair), *some]))
    jobs = {"nudge": ids[:NUDGES], "removal": ids, "raise": ids[:NUDGES]}
    with ProcessPoolExecutor(int(sys.argv[2])) as pool, open(FOLDER / "log", "a", buffering=1) as log:
        finish(pool, log, "nudge", nudge, jobs["nudge"])
        finish(pool, log, "removal", follow, ids)
        finish(pool, log, "raise", partial(nudge, share=-0.01, name="raise"), jobs["raise"])
        ended = [j for j in ids if read(f"removal-{j}.npz")["passes"] < MOST]
        jobs["check"] = ended[::len(ended) // CHECKS][:CHECKS]
        finish(pool, log, "check", check, jobs["check"])
    arrays = collected(jobs, first, {"top_six": top[0], "top_right": top[1], "random": some})
    exact = "nudged", "raised", "checked", "smallest_eigenvalues", "back_risk"
    arrays = {name: np.asarray(values) for name, values in arrays.items()}
    np.savez_compressed(HERE / "leave_one_out_all_cnn.npz", test_ids=shown, **{
        name: v.astype(np.float32) if v.dtype == np.float64 and name not in exact else v for name, v in arrays.items()})
