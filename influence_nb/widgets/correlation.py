"""How closely score and distance go together, in words: the line under the scatter."""

import numpy as np

from influence_nb.metrics import pearson, spearman

FEWEST = 3  # selected points that a correlation is given for


def correlations(x, y) -> tuple[float | None, float | None]:
    """Pearson's and Spearman's correlation of x [n] and y [n]; (None, None) where n < 3, a number is not finite, or one
    of the two is constant."""
    if len(x) < FEWEST or not (np.isfinite(x).all() and np.isfinite(y).all()) or min(np.ptp(x), np.ptp(y)) == 0:
        return None, None
    return float(pearson(x, y)), float(spearman(x, y))


def caption(xy, selected=()) -> str:
    """ "Pearson 0.312, Spearman 0.280 over all 5,500; 0.440, 0.402 over the 120 selected".

    Args:
        xy: [n_train, 2] distance and score of every training example; without rows, there is nothing to say.
        selected: ids of training examples; fewer than 3 are not spoken of.
    """
    if not len(xy):
        return ""
    words = "Pearson {}, Spearman {} over all {:,}".format(*map(said, correlations(*xy.T)), len(xy))
    if len(selected) >= FEWEST:
        words += "; {}, {} over the {:,} selected".format(*map(said, correlations(*xy[selected].T)), len(selected))
    return words


def said(r: float | None) -> str:
    """A correlation to three decimals; a dash where there is none."""
    return "\u2013" if r is None else f"{r:.3f}".replace("-", "\u2212")
