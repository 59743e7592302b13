"""This library beside the others on one model, one data set, one damping and one thread: cost and truth of the scores.

    python benchmarks/peers.py                                  # this library alone
    python benchmarks/peers.py --peers ~/peers/bin/python       # and the peers, from an environment that has them
    python benchmarks/peers.py --growth                         # from 1,000 to 60,000 training images

For the peers' environment see benchmarks/peers.txt. Every run is a process of its own. Cost is in CPU seconds, and in
multiples of the floor: one forward and backward pass over the training images, and one matrix product. Truth is the
same quantity in float64: the gradient product, or influence on the GGN solved to a residual of 1e-9. `Pearson` is the
mean over test points; `error` is relative, after the best positive factor for each test point.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from peers_runs import METHODS

HERE = Path(__file__).parent
PRODUCTS = {"own_products", "own_graddot", "captum_tracin", "kronfluence_identity", "dattri_graddot"}
SKIP = {"mlp": {"own_exact_ggn"}, "all_cnn": set()}  # 99,450 parameters: no dense matrix


def run(python, problem, method, out, limit=300, **sizes) -> dict:
    """One method in a process of its own: its JSON line, or why there is none."""
    command = [python, HERE / "peers_runs.py", "--problem", problem, "--method", method, "--out", out,
               *(str(word) for name, value in sizes.items() for word in (f"--{name}", value))]
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {limit} s"}
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1][:90]}
    return json.loads(done.stdout.splitlines()[-1])


def agreement(scores: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Mean Pearson over test points, and the relative error after the best positive factor for each of them."""
    truth = truth[:len(scores)]
    factor = np.maximum((scores * truth).sum(1) / (scores ** 2).sum(1), 0)[:, None]
    pearson = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(scores, truth, strict=True)])
    return float(pearson), float(np.linalg.norm(factor * scores - truth) / np.linalg.norm(truth))


def compare(problem: str, peers: str | None, folder: Path):
    """One table: every method of this library, and of the peers."""
    load = {}
    for oracle in ("oracle_graddot", "oracle"):
        run(sys.executable, problem, oracle, folder / f"{oracle}.npz", limit=3600)
        load[oracle] = np.load(folder / f"{oracle}.npz", allow_pickle=False)["scores"]
    floor = run(sys.executable, problem, "floor", folder / "floor.npz")["cpu_seconds"]
    print(f"\n{problem}: the floor is {floor:.3f} CPU seconds\n{'':26}{'CPU s':>9}{'a test pt':>11}{'x floor':>9}"
          f"{'peak MB':>9}{'Pearson':>9}{'error':>9}")
    own = [name for name in METHODS if name.startswith("own") and name not in SKIP[problem]]
    others = [name for name in METHODS if not name.startswith(("own", "oracle", "floor"))] if peers else []
    for method in own + others:
        out = folder / f"{method}.npz"
        cost = run(sys.executable if method in own else peers, problem, method, out)
        if "failed" in cost:
            print(f"{method:26}  {cost['failed']}", flush=True)
            continue
        scores = np.load(out, allow_pickle=False)["scores"]
        pearson, error = agreement(scores, load["oracle_graddot" if method in PRODUCTS else "oracle"])
        seconds = cost["cpu_seconds"]
        print(f"{method:26}{seconds:9.3f}{seconds / len(scores):11.4f}{seconds / floor:9.1f}{cost['peak_mb']:9.0f}"
              f"{pearson:9.4f}{error:9.4f}", flush=True)


def growth(folder: Path, sizes=(1_000, 5_000, 20_000, 60_000), n_test=1_000):
    """How the cost grows with the training set, for 1,000 test images at once."""
    print(f"\nmlp, {n_test:,} test images\n{'':26}" + "".join(f"{n:>12,}" for n in sizes) + f"{'peak MB':>9}")
    for method in ("floor", "own_graddot", "own_kfac", "own_ekfac", "own_nystroem"):
        costs = [run(sys.executable, "mlp", method, folder / "out.npz", **{"n-train": n, "n-test": n_test})
                 for n in sizes]
        print(f"{method:26}" + "".join(f"{c['cpu_seconds']:12.2f}" if "failed" not in c else f"{'failed':>12}"
                                       for c in costs) + f"{costs[-1].get('peak_mb', 0):9.0f}", flush=True)


def main():
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--peers", help="the python of an environment with the other libraries")
    arguments.add_argument("--problem", choices=SKIP, action="append")
    arguments.add_argument("--growth", action="store_true")
    asked = arguments.parse_args()
    with TemporaryDirectory() as folder:
        for problem in [] if asked.growth else asked.problem or SKIP:
            compare(problem, asked.peers, Path(folder))
        if asked.growth or not asked.problem:
            growth(Path(folder))


if __name__ == "__main__":
    main()
