"""How soon each suspicion finds planted label flips: python data/make_label_curves.py FOLDER
(a quarter of an hour of one core)

Three cases, each of ten random draws of 10 % and of 40 % flipped labels: `pixels` with two strengths of l2, and
`network`. The scores, in order: labels.SUSPICIONS, and the two of `DERIVED`. FOLDER keeps a file for every finished
draw; started again, the script goes on from there. Writes label_curves.npz beside itself, and prints the table.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from influence_nb import Split, Task, data, fit, labels, models
from influence_nb.store import written

HERE = Path(__file__).parent
SEEDS, FRACTIONS, WITHIN = 10, (0.1, 0.4), (0.15, 0.45)
SHARES = np.linspace(0, 1, 101)                                            # of the labels, checked: flips found
REPAIRED = np.array([0, 5, 10, 15, 20, 30, 40, 50, 60, 80, 100]) / 100     # and test accuracies
DERIVED = "loss without it", "loss, asked again"
STEP = 0.05                                                                # after which a model is asked again


def pixels(fraction: float, seed: int, l2: float):
    """Softmax regression on Fashion-MNIST's sneakers and ankle boots, 400 of 14 x 14 pixels."""
    train, test = (Split(nn.functional.avg_pool2d(split.x, 2), split.y, split.classes)
                   for split in data.load("fashion-small"))
    train, test = (split.take((split.y == 7) | (split.y == 9)) for split in (train, test))
    train, test = (Split(split.x, (split.y == 9).long(), ("sneaker", "ankle boot")) for split in (train, test))
    flipped, planted = data.flip_labels(train, fraction, seed)
    return labels.last_layer(Task(models.logistic(196, 2), flipped, test, l2=l2)), planted


def network(fraction: float, seed: int):
    """The last layer of a small network trained on the flipped labels of 2,000 MNIST digits, ten classes."""
    train, test = data.load("mnist-5500")
    flipped, planted = data.flip_labels(train.take(slice(2000)), fraction, seed)
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
                        nn.Flatten(), nn.Linear(800, 32), nn.ReLU(), nn.Linear(32, 10))
    task = Task(net, flipped, test.take(slice(2000)), l2=1e-3)
    fit(task, 6, batch_size=50, seed=seed, optimizer=partial(torch.optim.Adam, lr=2e-3), progress=False)
    return labels.last_layer(task, l2=1e-2), planted


CASES = {"pixels, l2 0.001": partial(pixels, l2=1e-3), "pixels, l2 0.1": partial(pixels, l2=0.1), "network": network}


def draw(case: str, fraction: float, seed: int) -> dict:
    """All scores of one draw: flips found, test accuracies, and how many flips confident learning expects."""
    task, planted = CASES[case](fraction, seed)
    n = len(task.train)
    scores = {name: suspicion(task) for name, suspicion in labels.SUSPICIONS.items()}
    scores["random"] = labels.at_random(task, seed)
    steps = [round(share * n) for share in np.arange(STEP, 1, STEP)]
    scores |= dict(zip(DERIVED, (scores["loss"] + scores["refined self-influence"],
                                 labels.asked_again(task, planted, labels.loss, steps))))
    rows = torch.tensor(np.rint(SHARES * n)).long()
    joint = labels.confident_joint(task)
    return {"expected": int(joint.sum() - joint.diagonal().sum()),
            "found": np.stack([labels.found(score, planted)[rows] for score in scores.values()]),
            "accuracy": np.stack([labels.accuracies(task, planted, score, np.rint(REPAIRED * n).astype(int))
                                  for score in scores.values()])}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    cells = [(case, fraction, seed) for seed in range(SEEDS) for fraction in FRACTIONS for case in CASES]
    for case, fraction, seed in cells:
        path = folder / f"{case.replace(' ', '_')}-{fraction}-{seed}.npz"
        if not path.exists():
            found = draw(case, fraction, seed)
            written(path, lambda file, found=found: np.savez(file, **found))
            print(path.name, flush=True)

    def kept(name):
        rows = [np.load(folder / f"{case.replace(' ', '_')}-{fraction}-{seed}.npz")[name]
                for case in CASES for fraction in FRACTIONS for seed in range(SEEDS)]
        return np.stack(rows).reshape(len(CASES), len(FRACTIONS), SEEDS, *rows[0].shape)

    found = kept("found").astype(np.float32)
    written(HERE / "label_curves.npz", lambda file: np.savez_compressed(
        file, fractions=FRACTIONS, shares=SHARES, repaired=REPAIRED, found=found,
        accuracy=kept("accuracy").astype(np.float32), expected=kept("expected")))
    print(f"{'flips found, within':24}" + "".join(f"{case:>20}" for case in CASES))
    for m, method in enumerate([*labels.SUSPICIONS, *DERIVED]):
        cells = [found[c, f, :, m, round(100 * WITHIN[f])].mean() for c in range(len(CASES)) for f in (0, 1)]
        print(f"{method:24}" + "".join(f"{100 * cell:8.1f}" + " " * 2 * (i % 2) for i, cell in enumerate(cells)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
