"""Measure what notebook 09 shows beside the published experiment:
python data/make_published_experiment.py FOLDER PROCESSES (an hour on two cores, after make_leave_one_out.py)

The published protocol retrains with Adam in batches, from weights that are no minimum, for each removed image anew; its
prediction is damped. Here it is done with the shipped network as the checkpoint, much shorter: 24 images, each after
EPOCHS passes and not after 30,000 steps, at the checkpoint's own last learning rate and with Adam's moments as they
stand there. Once as published, every image with an order of its own; and SEEDS times with one order for all images,
and for a control that removes none. Besides: training from the start without one image, and the experiment with 100
training images.

FOLDER is that of make_leave_one_out.py, whose Hessian and whose removals it takes, or makes if they are not there. It
keeps a file for everything that is finished; started again, the script goes on from there. Writes
published_experiment.npz beside itself.
"""

import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import cache, partial

import numpy as np
import torch
from make_leave_one_out import FOLDER, HERE, follow, problem, read, stored, write
from scipy.optimize import fmin_ncg

from influence_nb import GGN, Hessian, Influence, Refined, Task, converge, data, fit, fit_many, models, newton
from influence_nb.curvature import output_factors
from influence_nb.gradients import Gradients, rise_slopes
from influence_nb.parameters import theta
from influence_nb.removal import reading

ADAM = torch.optim.Adam
DAMPING, CHOSEN = 0.01, 12        # as published; images removed for each six, the strongest predicted
EPOCHS, RATE, SEEDS = (10, 40), 4e-5, 2
MOMENTS = 200                     # epochs that stand behind Adam's moments: twice their memory
FEW, FEW_STEPS, FEW_MORE = 100, ((1000, 1e-3), (1000, 1e-4), (8000, 1e-5)), 600  # images; steps; steps of a retraining
TOL, FEW_TOL, MOST, SHORT = 1e-2, 1e-4, 300, 12   # Newton decrement at the end, of the first; most passes; a few


def checkpoint(precision=torch.float32) -> Task:
    """The shipped network, which plays the published checkpoint, with the 100 test images of the leave-one-out run."""
    train, test = data.load("mnist-5500")
    model = models.trained_all_cnn().to(memory_format=torch.channels_last)
    return Task(model, train, test.take(problem()[1]), l2=1e-3).to(precision)


def part_of_hessian(k: int) -> dict:
    task = checkpoint()
    return {"H": Hessian(replace(task, train=task.train.take(slice(k, None, 4))), batch_size=100).dense().numpy()}


def newton_cg(H: np.ndarray, v: np.ndarray) -> np.ndarray:
    """(H + DAMPING I)^-1 v by the solver of the release, which stops where it meets negative curvature."""
    return fmin_ncg(lambda x: x @ (H @ x + DAMPING * x) / 2 - v @ x, v, lambda x: H @ x + DAMPING * x - v,
                    fhess_p=lambda x, p: H @ p + DAMPING * p, avextol=1e-8, maxiter=100, disp=0)


def at_checkpoint() -> dict:
    """First-order effects [100, n] with the GGN, and with the Hessian by the released solver; its spectrum."""
    task = checkpoint()
    H = sum(read(f"published-hessian-{k}.npz")["H"].double() for k in range(4)).numpy() / 4
    V = Gradients(task, task.test, rise_slopes).dense()[0].double().numpy()                  # [100, p]
    X = np.stack([newton_cg(H, v) for v in V])
    left = np.linalg.norm(X @ H + DAMPING * X - V, axis=1) / np.linalg.norm(V, axis=1)
    G = Gradients(task, task.train).dense()[0].double().numpy()                              # [n, p]
    ggn = Influence(DAMPING, GGN).fit(task)
    return {"ggn": ggn.scores().values.numpy(), "released": X @ G.T / len(G), "residual": left,
            "eigenvalues": np.linalg.eigvalsh(H), "gradient_norm": ggn.gradient_norm_}


def shares(task: Task, solver) -> torch.Tensor:
    """The part of the curvature that each example makes itself, along its strongest direction and in all, [n, 2]."""
    found = []
    for start in range(0, len(task.train), 250):
        few = replace(task, train=task.train.take(slice(start, start + 250)))
        F = Gradients(few, few.train, output_factors).dense().double() / len(task.train) ** 0.5   # [c - 1, b, p]
        own = torch.einsum("kbp,lbp->bkl", F, solver.inverse_times(F.flatten(0, 1).T).T.reshape(F.shape))
        values = torch.linalg.eigvalsh(own)
        found.append(torch.stack([values[:, -1], values.sum(1)], 1))
    return torch.cat(found)


def at_minimum() -> dict:
    """First-order effects [100, n] at the certified minimum, without and with damping; each image's leverage."""
    method, damped = (Influence(damping, stored).fit(problem()[0]) for damping in (0.0, DAMPING))
    return {"first": method.scores().values.numpy(), "damped": damped.scores().values.numpy(),
            "leverage": shares(problem()[0], method.solver_).numpy()}


def moments() -> dict:
    """Adam's state at the checkpoint: batches seen at a learning rate of 0."""
    task, kept = checkpoint(), []

    def still(parameters):
        kept.append(ADAM(parameters, lr=0.0))
        return kept[0]

    fit(task, MOMENTS, batch_size=500, optimizer=still, seed=123, progress=False)
    return {f"{name}-{k}": np.asarray(value) for k, state in kept[0].state_dict()["state"].items()
            for name, value in state.items()}


def resumed(parameters):
    """Adam with the checkpoint's moments."""
    steps, state = ADAM(parameters, lr=RATE), {}
    for name, value in read("published-moments.npz").items():
        state.setdefault(int(name.split("-")[1]), {})[name.split("-")[0]] = value
    steps.load_state_dict({"state": state, "param_groups": steps.state_dict()["param_groups"]})
    return steps


def without(task: Task, j: int | None) -> torch.Tensor:
    w = torch.ones(len(task.train))
    w[[] if j is None else [j]] = 0
    return w


def seen(task: Task, thetas: list) -> dict:
    """Weights [m, p] and the test losses [m, n_test] at them, read in float64: some effects are of 1e-6 nats."""
    exact = task.to(torch.float64)
    return {"losses": np.stack([reading(exact, exact.test, flat.double()).numpy() for flat in thetas]),
            "thetas": np.stack([flat.numpy() for flat in thetas])}


def continued(j: int | None, seed: int) -> dict:
    """Trained on from the checkpoint without image j."""
    task = checkpoint()
    told, thetas = fit(task, EPOCHS[-1], batch_size=500, optimizer=resumed, w=without(task, j), seed=seed,
                       progress=False, keep=lambda epoch: epoch in EPOCHS), []
    for point in told.checkpoints:
        task.model.load_state_dict(point.state)
        thetas.append(theta(task))
    return seen(task, thetas)


def anew(j: int | None, seed: int, epochs: int = 500) -> dict:
    """Trained from the start without image j, as make_all_cnn.py trained the checkpoint; seed 0 repeats it."""
    task = checkpoint()
    task = replace(task, model=models.all_cnn(seed).to(memory_format=torch.channels_last))
    fit(task, epochs, batch_size=500, optimizer=partial(ADAM, lr=4e-3), w=without(task, j), seed=seed, progress=False,
        schedule=lambda epoch: 1.0 if epoch < 0.5 * epochs else 0.1 if epoch < 0.8 * epochs else 0.01)
    return seen(task, [theta(task)])


def few(name: str | None = None) -> Task:
    """The task of the first 100 training images, at the weights in a file of FOLDER, in float64."""
    task = checkpoint(torch.float64)
    model = models.all_cnn().to(memory_format=torch.channels_last).to(torch.float64)
    task = replace(task, model=model, train=task.train.take(slice(FEW)))
    if name:
        newton.move(task, read(name)["thetas"][-1].double())
    return task


def few_trained() -> dict:
    """Trained in steps of all 100, the learning rate lowered after 1,000 and 2,000 steps as the thesis says."""
    task = few().to(torch.float32)
    for steps, rate in FEW_STEPS:
        fit(task, steps, batch_size=FEW, optimizer=partial(ADAM, lr=rate), progress=False)
    return seen(task, [theta(task)])


def few_published() -> dict:
    """At these weights: the damped prediction [100, 100], and what some more steps without each image make of it."""
    task = few("published-few-trained.npz")
    method = Influence(DAMPING).fit(task)
    w = torch.stack([without(task, None), *(without(task, j) for j in range(FEW))])
    told = fit_many(task.to(torch.float32), w, FEW_MORE, batch_size=FEW, optimizer=partial(ADAM, lr=FEW_STEPS[-1][1]),
                    progress=False)
    value, slope = newton.risk_and_slope(task, theta(task))
    return {"predicted": method.scores().values.numpy(), "risk": value, **seen(task, list(told.thetas)),
            "gradient_norm": float(slope.norm()), "eigenvalues": method.solver_.values.numpy()}


def few_converged() -> dict:
    """The minimum that is reached from there, and first-order influence and leverage at it."""
    task = few("published-few-trained.npz")
    found = converge(task, max_steps=5000)
    method = Influence().fit(task)
    return {"thetas": theta(task)[None].numpy(), "risk": found.risk, "gradient_norm": found.gradient_norm,
            "smallest": found.smallest_eigenvalue, "first": method.scores().values.numpy(),
            "leverage": shares(task, method.solver_).numpy()}


@cache
def few_refined() -> Refined:
    return Refined(progress=False).fit(few("published-few-converged.npz"))


def followed(method, j: int, tol: float) -> dict:
    """The removal of image j followed to its end by a fitted Refined, and what it says after SHORT passes."""
    before, early, start = None, {}, None
    for point, effect in method().orders(j):
        if before is not None and (not early or point.passes <= SHORT):
            early = {"early": effect.numpy(), "bar": (effect - before).abs().numpy(), "early_turned": point.turned}
        before, start = effect, start or point.decrement
        if point.decrement <= tol * start or point.passes >= MOST:
            break
    moved = float((point.theta - theta(method().task_)).norm())
    return early | {"effect": effect.numpy(), "turned": point.turned, "passes": point.passes, "moved": moved,
                    "left": point.decrement / start}


def do(name: str, function, *arguments) -> str:
    """Compute the arrays of one file and write it."""
    torch.set_num_threads(1)
    start = time.process_time()
    write(f"published-{name}.npz", **function(*arguments))
    return f"{name}  {time.process_time() - start:.0f} s"


def finish(pool, log, jobs: dict) -> None:
    """Do what is not done yet of some jobs {name: (function, *arguments)}."""
    left = {name: job for name, job in jobs.items() if not (FOLDER / f"published-{name}.npz").exists()}
    for ready in as_completed([pool.submit(do, name, *job) for name, job in left.items()]):
        print(ready.result(), file=log)


def chosen() -> list:
    """The training images that are removed: the strongest of each six, as predicted at the checkpoint, in turn."""
    rows = read("published-at-checkpoint.npz")["ggn"][:2].abs().topk(CHOSEN * 2).indices.T.flatten().tolist()
    return list(dict.fromkeys(rows))[:2 * CHOSEN]


def told(name: str) -> dict:
    return {key: value.numpy() for key, value in read(f"published-{name}.npz").items()}


def budget(ids: list) -> dict:
    """The arrays of the published protocol; effects [..., 100, 24], distances [..., 24]."""
    start, seeds = checkpoint(), range(SEEDS)
    origin, before = theta(start).numpy(), seen(start, [theta(start)])["losses"][0]
    own = [told(f"own-{j}") for j in ids]
    control = [told(f"control-{s}") for s in seeds]
    paired = [[told(f"paired-{s}-{j}") for j in ids] for s in seeds]
    at, low = told("at-checkpoint"), told("at-minimum")
    away = lambda run, other: np.linalg.norm(run["thetas"] - other, axis=-1)  # noqa: E731
    return {
        "removed": ids, "own": np.stack([run["losses"] - before for run in own], -1),
        "control": np.stack([run["losses"] - before for run in control]),
        "paired": np.stack([np.stack([run["losses"] - c["losses"] for run in runs], -1)
                            for runs, c in zip(paired, control)]),
        "own_moved": np.stack([away(run, origin) for run in own], -1),
        "control_moved": np.stack([away(run, origin) for run in control]),
        "paired_moved": np.stack([np.stack([away(run, c["thetas"]) for run in runs], -1)
                                  for runs, c in zip(paired, control)]),
        "anew_moved": [float(away(told(f"anew-{name}"), origin)[0]) for name in ("all", "same", "other")],
        "ggn": at["ggn"][:, ids], "released": at["released"][:, ids], "released_residual": at["residual"],
        "checkpoint_eigenvalues": at["eigenvalues"], "checkpoint_gradient": at["gradient_norm"],
        "first": low["first"][:, ids], "damped": low["damped"][:, ids], "leverage": low["leverage"]}


def columns(names: list) -> dict:
    """What was told of several followed removals, the removal as the last axis."""
    paths = [told(name) for name in names]
    return {key: np.stack([path[key] for path in paths], -1) for key in paths[0]}


def truth(ids: list) -> dict:
    """What is known of the certified removals, the removal as the last axis."""
    paths = [read(f"removal-{j}.npz") for j in ids]
    return {name: np.stack([np.asarray(path[name]) for path in paths], -1)
            for name in ("effect", "refined", "bar", "turned", "moved", "passes", "first_decrement", "decrement")}


def hundred() -> dict:
    """The arrays of the experiment with 100 training images; effects [100 test images, 100]."""
    rough, low = told("few-published"), told("few-converged")
    return columns([f"few-{j}" for j in range(FEW)]) | {
        "first": low["first"], "leverage": low["leverage"], "smallest": low["smallest"], "risk": low["risk"],
        "gradient": low["gradient_norm"], "rough_predicted": rough["predicted"], "rough_risk": rough["risk"],
        "rough_actual": (rough["losses"][1:] - rough["losses"][0]).T, "rough_gradient": rough["gradient_norm"],
        "rough_eigenvalues": rough["eigenvalues"]}


def compact(arrays: dict) -> dict:
    """Long arrays in float32."""
    arrays = {name: np.asarray(value) for name, value in arrays.items()}
    return {name: v.astype(np.float32) if v.dtype == np.float64 and v.size > 1 else v for name, v in arrays.items()}


if __name__ == "__main__":
    (FOLDER / "next").mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(int(sys.argv[2])) as pool, open(FOLDER / "published-log", "a", buffering=1) as log:
        finish(pool, log, {f"hessian-{k}": (part_of_hessian, k) for k in range(4)} | {
            "few-trained": (few_trained,), "moments": (moments,)})
        finish(pool, log, {"at-checkpoint": (at_checkpoint,), "few-published": (few_published,),
                           "few-converged": (few_converged,), "at-minimum": (at_minimum,)})
        ids = chosen()
        finish(pool, log, {f"few-{j}": (followed, few_refined, j, FEW_TOL) for j in range(FEW)} | {
            f"own-{j}": (continued, j, 1000 + j) for j in ids} | {
            f"control-{s}": (continued, None, s) for s in range(SEEDS)} | {
            f"paired-{s}-{j}": (continued, j, s) for s in range(SEEDS) for j in ids} | {
            "anew-all": (anew, None, 0), "anew-same": (anew, ids[0], 0), "anew-other": (anew, ids[0], 1)})
        missing = [j for j in ids if not (FOLDER / f"removal-{j}.npz").exists()]
        for line in pool.map(follow, missing):
            print(line, file=log)
        arrays = budget(ids) | truth(ids) | {
            f"few_{name}": values for name, values in hundred().items()}
    file = HERE / "published_experiment.npz"
    np.savez_compressed(FOLDER / "next" / file.name, test_ids=problem()[1], epochs=EPOCHS,
                        **compact(arrays))
    (FOLDER / "next" / file.name).replace(file)
