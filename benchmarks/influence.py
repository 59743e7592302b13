"""How fast and how true influence is: all-CNN scores after fit, and every leave-one-out of a softmax regression.

    python benchmarks/influence.py
"""

import time

import numpy as np
import torch

from influence_nb import GGN, Influence, Split, Task, converge, data, gradients, leave_one_out, models


def timed(call, repeats: int = 1):
    """The median seconds of `repeats` calls, and the last result."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds)), result


def speed():
    """Seconds of one forward and backward pass, of fit, and of the scores of one test image with their parts."""
    task = Task(models.trained_all_cnn(), *data.load("mnist-5500"), l2=1e-3)
    six = task.test.take([6558])
    floor, _ = timed(lambda: gradients.risk_gradient(task), 3)
    fit, method = timed(lambda: Influence(damping=0.01, curvature=GGN).fit(task))
    total, _ = timed(lambda: method.scores(six), 9)
    gradient, V = timed(lambda: gradients.example_gradients(task, six).T, 9)
    solve, X = timed(lambda: method.solver_.solve(V, 0.01), 9)
    residual, _ = timed(lambda: method.curvature_ @ X, 9)
    product, _ = timed(lambda: method.train_ @ X, 9)
    rows = [("forward + backward over 5,500 images (the floor)", floor),
            ("Influence(0.01, GGN).fit, 2,616 parameters", fit),
            ("scores: 5,500 training images, 1 test image", total), ("   test gradient", gradient),
            ("   solve, from the decomposition", solve), ("   residual", residual),
            ("   product with the training gradients", product)]
    print(f"{'all-CNN on ' + str(torch.get_num_threads()) + ' threads':52}{'seconds':>10}{'x floor':>10}")
    for name, seconds in rows:
        print(f"{name:52}{seconds:10.4f}{seconds / floor:10.3f}")


def truth(n: int, l2: float):
    """All n leave-one-outs of softmax regression on the digits, in float64, against exact influence."""
    train, test = (split.to(torch.float64) for split in data.load("digits"))
    task = Task(models.logistic(64, 10).double(), Split(train.x[:n], train.y[:n], train.classes), test, l2=l2)
    converge(task)
    seconds, scores = timed(lambda: Influence().fit(task).scores())
    retraining, actual = timed(lambda: leave_one_out(task, range(n), progress=False))
    x, y = scores.values.flatten().numpy(), actual.flatten().numpy()
    worst = min(np.corrcoef(a, b)[0, 1] for a, b in zip(scores.values.numpy(), actual.numpy(), strict=True))
    print(f"{n:8}{l2:8.3f}{np.corrcoef(x, y)[0, 1]:10.5f}{np.polyfit(x, y, 1)[0]:8.3f}{worst:16.4f}"
          f"{seconds:12.2f}{retraining:12.1f}")


if __name__ == "__main__":
    speed()
    print(f"\n{'n_train':>8}{'l2':>8}{'Pearson':>10}{'slope':>8}{'worst test pt.':>16}"
          f"{'influence s':>12}{'all LOO s':>12}")
    truth(1200, 5e-2)
    truth(400, 1e-2)
