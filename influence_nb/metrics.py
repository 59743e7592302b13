"""How well predicted effects follow measured ones: correlations, slope, linear datamodelling score, noise ceiling.

All compare along the last axis: predicted and actual are [n_test, m], one row a test point, one column a removal, and a
metric gives one number a row. Where a row does not vary, no correlation is defined: an error, never a silent nan or 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor


class Interval(NamedTuple):
    """A value and its 95 % interval, from random halves."""

    value: float
    low: float
    high: float


def pearson(predicted, actual) -> Tensor:
    """Pearson's correlation of each row: how nearly actual is a rising straight line of predicted.

    >>> pearson([1, 2, 3, 4], [1, 3, 2, 4])
    tensor(0.8000, dtype=torch.float64)

    Args:
        predicted, actual: arrays [n_test, m], or [m] of one test point.

    Returns:
        Tensor [n_test] in float64.

    Raises:
        ValueError: shapes differ, m < 2, a number is not finite, or a row does not vary.
    """
    x, y = checked(predicted, actual)
    return torch.from_numpy(correlation(x, y))


def spearman(predicted, actual) -> Tensor:
    """Spearman's rank correlation of each row, ties at their mean rank.

    Args, Returns, Raises: as for `pearson`.
    """
    x, y = checked(predicted, actual)
    return torch.from_numpy(correlation(rankdata(x, axis=-1), rankdata(y, axis=-1)))


def slope(predicted, actual) -> Tensor:
    """The slope of actual on predicted of each row, by least squares with an intercept.

    1 where sizes are right; above 1, the true effects are larger than predicted.

    Args, Returns, Raises: as for `pearson`; only predicted must vary.
    """
    x, y = (v - v.mean(-1, keepdims=True) for v in checked(predicted, actual, varying=1))
    size = np.abs(x).max(-1, keepdims=True)  # no square of a small number is lost
    return torch.from_numpy(np.asarray((x / size * y).sum(-1) / (x / size * x).sum(-1)))


def interval(metric: Callable, predicted, actual, seed: int = 0, repeats: int = 1000) -> Interval:
    """The mean of a metric over test points, with a 95 % interval from random halves.

    Half of the test points and half of the removals are drawn, over and over: the claim is about other test points and
    other training examples than these. A mean over a half drawn without repetition varies as much as one over a whole
    that is drawn anew; and it repeats no removal, which would make ties and lower every correlation near 1. Since both
    sides are drawn, noise of each pair by itself counts up to three times, and the interval is then too wide. A test
    point of which a half holds no two different values is left out of it.

    Args:
        metric: (predicted, actual) -> [n_test], for example `spearman`.
        predicted, actual: arrays [n_test, m].

    Cost: `repeats` times the metric.

    Returns:
        Interval(value, low, high); of fewer than 4 removals, which have no halves, low and high are NaN.

    Source: half-samples, McCarthy (1969); both sides of a table drawn, Owen (2007).

    Raises:
        ValueError: as `metric` does.
    """
    x, y = map(np.atleast_2d, checked(predicted, actual, varying=0))
    value, random, means = float(metric(x, y).mean()), np.random.default_rng(seed), []
    if x.shape[1] < 4:
        return Interval(value, np.nan, np.nan)
    constant = ~varies(y)  # which a slope allows
    while len(means) < repeats:
        drawn = rows, _ = np.ix_(*(random.permutation(size)[:max(k, size // 2)] for k, size in zip((1, 2), x.shape)))
        vary = varies(x[drawn]) & (varies(y[drawn]) | constant[rows[:, 0]])
        if vary.any():
            means.append(float(metric(x[drawn][vary], y[drawn][vary]).mean()))
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(value, min(value, float(low)), max(value, float(high)))  # ranks of half as many agree a little less


def lds(scores, w, truth, seed: int = 0, repeats: int = 1000) -> Interval:
    """Linear datamodelling score: how well sums of scores rank the measured effects of removing many examples.

        LDS = mean_i Spearman_k( sum_j (1 - w_kj) S_ij , truth_ik )

    Compare only scores of the same w: it falls as subsets remove more.

    Args:
        scores: [n_test, n_train], positive = helpful.
        w: [m, n_train] training weights of the retrainings.
        truth: [n_test, m] from `removal_effects`, positive = helpful.
        seed, repeats: of the interval, as for `interval`.

    Source: Park et al. (2023), section 2. They sum over the examples that stay and predict an output; the sum over
    those that are gone predicts its fall, and the correlation is the same.

    Raises:
        ValueError: the shapes do not belong together, or as for `spearman`.
    """
    S, w, truth = map(array, (scores, w, truth))
    if S.ndim != 2 or w.ndim != 2 or w.shape[1] != S.shape[1] or truth.shape != (len(S), len(w)):
        raise ValueError(f"expected scores [n_test, n_train], w [m, n_train] and truth [n_test, m], got {S.shape}, "
                         f"{w.shape} and {truth.shape}")
    return interval(spearman, S @ (1 - w).T, truth, seed, repeats)


def noise_ceiling(replicates, metric: Callable = spearman, seed: int = 0, splits: int = 100) -> Tensor:
    """The correlation of the true expected effects with their mean over s runs: on average, no prediction has more.

    The means over two halves of h runs correlate by r, averaged over random splits. By Spearman and Brown the mean of
    all s runs then has the reliability R = k r / (1 + (k - 1) r), k = s/h, and the ceiling is sqrt(R); 0 where r < 0.
    For Pearson's correlation and noise that is independent and of one size; near that for Spearman's.

    Args:
        replicates: [s, n_test, m] from `expected_effects`.

    Returns:
        Tensor [n_test].

    Source: Spearman (1910); Brown (1910).
    """
    runs = array(replicates)
    if runs.ndim != 3 or len(runs) < 2:
        raise ValueError(f"replicates must be [s, n_test, m] with s of 2 or more, got {runs.shape}")
    h, random = len(runs) // 2, np.random.default_rng(seed)
    orders = [random.permutation(len(runs)) for _ in range(splits)]
    r = torch.stack([metric(runs[order[:h]].mean(0), runs[order[h:2 * h]].mean(0)) for order in orders]).mean(0)
    k, r = len(runs) / h, r.clamp(min=0)
    return (k * r / (1 + (k - 1) * r)).sqrt()


def checked(predicted, actual, varying: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 arrays of one shape [..., m], m >= 2, finite; the first `varying` of them constant in no row."""
    x, y = array(predicted), array(actual)
    if x.shape != y.shape or x.ndim == 0 or x.shape[-1] < 2:
        hint = ": transpose?" if x.shape == y.shape[::-1] != y.shape else ""
        raise ValueError(f"expected predicted and actual of one shape [n_test, m], m of 2 or more, got {x.shape} and "
                         f"{y.shape}{hint}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("predicted and actual must be finite, got NaN or infinity")
    for name, v in [("predicted", x), ("actual", y)][:varying]:
        if not varies(v).all():
            rows = np.flatnonzero(~varies(v))
            raise ValueError(f"expected effects that vary, got {name} constant in {len(rows)} rows, first in row "
                             f"{rows[0]}: nothing correlates with it; leave these test points out")
    return x, y


def array(values) -> np.ndarray:
    """Numbers in float64, from wherever they are."""
    return np.asarray(values.detach().cpu().double() if isinstance(values, Tensor) else values, dtype=float)


def varies(x: np.ndarray) -> np.ndarray:
    """Which rows hold two different numbers."""
    return (x != x[..., :1]).any(-1)


def correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's correlation along the last axis."""
    x, y = (v - v.mean(-1, keepdims=True) for v in (x, y))
    x, y = (v / np.abs(v).max(-1, keepdims=True) for v in (x, y))  # no square of a small number is lost
    return np.asarray((x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1)))
