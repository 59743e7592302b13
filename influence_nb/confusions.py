"""Which training examples come back among the causes of one kind of mistake, and what chance would give.

That one example is among the k most negative of every mistake says nothing by itself. Against lists drawn at random it
always looks like a wonder, since what is strong for one test point of a class is mostly strong for all of them. Two
questions are therefore answered side by side:

    random   how likely is it that any of n examples is in so many lists, if each list were k of the n at random?
    class    how likely is it in so many of the mistakes' lists, if the mistakes were any m of the class's test points,
             given in how many lists of the whole class it is?

The second is the exact test of Fisher (1935) for a table of two by two. Where the first chance is small and the second
is not, the example pulls at the whole class, and at these mistakes no more than at the rest: it may still be what tips
them over, which only a removal tells. The finding to put the questions to is that of Yeh et al. (2018): the same four
images are among the five most negative of all twelve antelopes that are read as deer.
"""

from typing import NamedTuple

import torch
from scipy.stats import binom, hypergeom
from torch import Tensor

from .scores import Scores
from .task import Task


class Recurring(NamedTuple):
    """Training examples among the k most negative of at least one mistake, those of most mistakes first.

    Attributes:
        ids: [r], training ids.
        counts: [r], in how many of the mistakes' lists each is.
        others: [r], in how many of the others' lists.
        p_random, p_class: [r], the chances of the two questions, each for the whole family of examples that was looked
            through (Bonferroni): of n examples, and of those in any list.
    """

    ids: Tensor
    counts: Tensor
    others: Tensor
    p_random: Tensor
    p_class: Tensor


def confused(task: Task, label: int, said: int) -> tuple[Tensor, Tensor]:
    """Ids of the test points of class `label` that the model puts into class `said`, and of those it gets right.

    Raises:
        TypeError: the targets are real numbers.
        ValueError: label or said are no classes of the model, or the same.
    """
    y, predictions, c = task.test.y, task.predict(), task.outputs(task.test.take([0])).shape[1]
    if y.is_floating_point():
        raise TypeError(f"confused is for classes, got targets of {y.dtype}: task.losses() ranks them")
    if label == said or not {label, said} <= set(range(c)):
        raise ValueError(f"expected two different classes in 0..{c - 1}, got {label} read as {said}")
    return tuple(((y == label) & (predictions == found)).nonzero()[:, 0] for found in (said, label))


def recurring(scores, mistakes, others, k: int = 5) -> Recurring:
    """Which training examples come back among the k most negative scores of the mistakes, and what chance would give.

    Only negative scores are listed, so that a list may be shorter than k; `p_random` is then too cautious. Equal scores
    keep the order of their ids.

    Args:
        scores: `Scores`, or an array [n_test, n_train], such as `method.values()[:, :, label]`.
        mistakes, others: test ids (rows of an array) of the mistakes, and of what they might as well have been: for
            example those of the same class that are right. `confused` gives both.

    Returns:
        Recurring, r examples.

    Raises:
        ValueError: no mistakes or others, one that is in both or twice, or k not in 1..n_train.
        KeyError: a test point of which there are no scores.
    """
    rows, train_ids = table(scores)
    groups = [torch.as_tensor(group).reshape(-1).tolist() for group in (mistakes, others)]
    (m, rest), n = map(len, groups), len(train_ids)
    if not m or not rest or len({*groups[0], *groups[1]}) < m + rest:
        raise ValueError(f"expected mistakes and others, each test point once, got {m} and {rest} with "
                         f"{len({*groups[0], *groups[1]})} different ones: ids as `confused` gives them?")
    if not 1 <= k <= n:
        raise ValueError(f"expected k in 1..{n} training examples, got {k}")
    counts, elsewhere = (torch.bincount(torch.cat([lowest(rows(i), k) for i in group]), minlength=n)
                         for group in groups)
    seen = int(((counts + elsewhere) > 0).sum())
    order = counts.argsort(descending=True, stable=True)[:int((counts > 0).sum())]
    counts, elsewhere = counts[order], elsewhere[order]
    chances = n * binom.sf(counts - 1, m, k / n), seen * hypergeom.sf(counts - 1, m + rest, counts + elsewhere, m)
    return Recurring(train_ids[order], counts, elsewhere, *(torch.as_tensor(p).clamp(max=1) for p in chances))


def table(scores):
    """(test id -> its row [n_train], the training ids)."""
    if isinstance(scores, Scores):
        return scores.row, scores.train_ids
    values = torch.as_tensor(scores)
    if values.isnan().any():
        raise ValueError(f"expected scores, got NaN in {int(values.isnan().any(-1).sum())} rows: leave these out")
    if values.ndim != 2:
        raise ValueError(f"expected Scores, or an array [n_test, n_train], got {tuple(values.shape)}: of representer "
                         "values [n_test, n_train, c], values[:, :, label]?")
    known = Scores(values, "", "", torch.arange(len(values)), torch.arange(values.shape[1]), "ranked")
    return known.row, known.train_ids


def lowest(row: Tensor, k: int) -> Tensor:
    """The places of the k lowest of a row, of those below 0."""
    row = row.detach().cpu()
    places = (row <= row.kthvalue(k).values).nonzero()[:, 0]  # few: a row is not sorted as a whole
    places = places[row[places].argsort(stable=True)][:k]
    return places[row[places] < 0]
