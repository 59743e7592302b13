from dataclasses import replace
from itertools import combinations
from math import comb

import numpy as np
import pytest
import torch
from problems import digits_task

from influence_nb import (
    Cosine,
    Influence,
    Representer,
    Split,
    Task,
    confused,
    converge,
    labelled,
    models,
    recurring,
)


def lists(M, n, k, seed):
    """Scores [M, n] whose k lowest are drawn at random, and are all that is negative."""
    random = torch.Generator().manual_seed(seed)
    scores = torch.rand(M, n, generator=random)
    return scores - scores.kthvalue(k + 1, dim=1, keepdim=True).values


def test_counts_are_those_of_the_k_most_negative():
    scores = torch.tensor([[-3.0, -1, -2, 4], [-1, 5, -2, -2], [1, -1, 2, 3], [-5, 0, 1, -1]])
    found = recurring(scores, [1, 0], [2, 3], k=2)
    assert found.ids.tolist() == [2, 0, 3] and found.counts.tolist() == [2, 1, 1]
    assert found.others.tolist() == [0, 1, 1]
    assert recurring(scores, [2], [0, 1, 3], k=3).ids.tolist() == [1]  # what is not negative is in no list
    assert recurring(torch.tensor([[-1.0, -1, -1], [0, 0, 0]]), [0], [1], k=2).ids.tolist() == [0, 1]


def test_the_chances_are_those_of_all_draws():
    M, m, n, k = 9, 4, 11, 1
    scores = lists(M, n, k, seed=4)
    scores[:3, 7] = -2
    found = recurring(scores, [0, 1, 2, 3], [4, 5, 6, 7, 8], k)
    inside = (scores == scores.amin(1, keepdim=True)).double()                              # [9, 11]
    seen = int((inside.sum(0) > 0).sum())
    for j, count, by_any, by_class in zip(found.ids, found.counts, found.p_random, found.p_class):
        drawn = [inside[list(rows), j].sum() >= count for rows in combinations(range(M), m)]
        assert abs(by_class - min(1, seen * np.mean(drawn))) < 1e-12
        tail = sum(comb(m, t) * (k / n) ** t * (1 - k / n) ** (m - t) for t in range(count, m + 1))
        assert abs(by_any - min(1, n * tail)) < 1e-12
    assert found.p_class[0] < 1 and found.p_random[0] < 1


@pytest.mark.parametrize("null", ["p_random", "p_class"])
def test_where_there_is_nothing_to_find_little_is_found(null):
    least = torch.stack([getattr(recurring(lists(40, 30, 3, seed), range(12), range(12, 40), 3), null).min()
                         for seed in range(300)])
    share = float((least <= 0.1).double().mean())
    assert 0.005 < share < 0.1 + 3 * (0.1 * 0.9 / 300) ** 0.5  # of whole searches; a corrected chance is too cautious


def test_what_is_strong_in_the_whole_class_is_no_cause_of_its_mistakes():
    scores = lists(60, 200, 5, seed=0)
    scores[:, 17] = -10 - torch.rand(60)    # strong for the whole class
    scores[:, 30], scores[:15, 30] = 1, -5  # for the mistakes
    found = recurring(scores, range(15), range(15, 60))
    assert found.ids[:2].tolist() == [17, 30] and found.counts[:2].tolist() == [15, 15]
    assert (found.p_random[:2] < 1e-15).all() and found.p_class[0] == 1 and found.p_class[1] < 1e-9
    assert found.others[:2].tolist() == [45, 0] and (found.p_class[2:] > 0.05).all()


@pytest.fixture(scope="module")
def flipped():
    """Three clouds, and a fourth of 8 training examples that belongs to the second class: 0 to 5 of it have the label
    of the first."""
    random = torch.Generator().manual_seed(0)
    part, rest = torch.full((10,), 3), torch.arange(3)
    cloud = torch.cat([part[:8], rest.repeat(16), part, rest.repeat(9)])
    x = 4 * torch.eye(5, dtype=torch.float64)[cloud] + torch.randn(len(cloud), 5, generator=random, dtype=torch.float64)
    y, n = torch.tensor([0, 1, 2, 1])[cloud], 56
    y[:6] = 0
    task = Task(models.logistic(5, 3).double(), Split(x[:n], y[:n]), Split(x[n:], y[n:]), l2=1e-2)
    converge(task)
    return task


@pytest.mark.parametrize("method, finds", [(Influence(), True), (Representer(output=labelled), True),
                                           (Cosine("flat"), False)], ids=["influence", "representer", "cosine"])
def test_planted_flips_come_back_in_the_mistakes_that_they_make(flipped, method, finds):
    wrong, right = confused(flipped, 1, 0)
    assert len(wrong) >= 4 and len(right) >= 8
    scores = replace(method).fit(flipped).scores(flipped.test.take(torch.cat([wrong, right])))
    found = recurring(scores, wrong, right, k=6)
    planted = found.ids < 6
    assert (planted[:6].sum() >= 5) == finds
    if finds:
        assert found.p_random[0] < 0.01 < found.p_class.min()  # they pull at the whole class
        cured = replace(flipped, model=models.logistic(5, 3).double())
        w = torch.ones(len(flipped.train), dtype=torch.float64)
        w[found.ids[:6]] = 0
        converge(cured, w)
        assert (cured.predict()[wrong] == 1).double().mean() > 0.5


def test_values_of_a_class_and_scores_of_its_output_are_one_thing(flipped):
    wrong, right = confused(flipped, 1, 0)
    method, both = Representer(output=labelled).fit(flipped), flipped.test.take(torch.cat([right, wrong]))
    m = len(wrong)
    values = method.values(both)[:, :, 1]
    by_values = recurring(values, range(len(right), len(right) + m), range(len(right)))
    by_scores = recurring(method.scores(both), wrong, right)
    assert all(torch.equal(a, b) for a, b in zip(by_values, by_scores))
    assert all(torch.equal(a, b) for a, b in zip(by_values, recurring(values.numpy(), np.arange(len(right), len(both)),
                                                                      np.arange(len(right)))))


def test_confused_tells_mistakes_from_what_is_right():
    task = digits_task(n=23)
    predictions, y = task.predict(), task.test.y
    a, b = next((int(y[i]), int(predictions[i])) for i in task.mistakes())
    wrong, right = confused(task, a, b)
    assert wrong.tolist() == [i for i in range(9) if y[i] == a and predictions[i] == b] != []
    assert right.tolist() == [i for i in range(9) if y[i] == a and predictions[i] == a]


def test_refusals(flipped):
    scores = lists(9, 12, 2, seed=0)
    for mistakes, others, k, said in (([], [1], 2, "got 0 and 1 with 1 different"), ([1, 2], [2], 2, "2 and 1 with 2"),
                                      ([1], [], 2, "got 1 and 0"), ([1], [2], 13, "1..12 training examples, got 13"),
                                      ([1], [2], 0, "got 0")):
        with pytest.raises(ValueError, match=said):
            recurring(scores, mistakes, others, k)
    with pytest.raises(KeyError, match="no test point 9 in these scores"):
        recurring(scores, [9], [1])
    with pytest.raises(ValueError, match=r"got \(9, 12, 3\): of representer values .* values\[:, :, label\]"):
        recurring(scores[:, :, None].expand(-1, -1, 3), [1], [2])
    for label, said in ((1, 1), (1, 3), (-1, 0)):
        with pytest.raises(ValueError, match=f"two different classes in 0..2, got {label} read as {said}"):
            confused(flipped, label, said)


def test_nan_is_not_taken_for_nothing_that_recurs():
    with pytest.raises(ValueError, match="got NaN in 1 rows"):
        recurring(torch.tensor([[-1.0, float("nan")], [-1.0, 1.0]]), [0], [1], k=1)
