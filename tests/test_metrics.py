import doctest

import numpy as np
import pytest
import torch
from problems import digits_task
from scipy import stats

from influence_nb import GradDot, Influence, metrics, removal_effects, subsets
from influence_nb.metrics import interval, lds, noise_ceiling, pearson, slope, spearman


def pairs(n_test=6, m=19, noise=1.0, seed=0):
    random = np.random.default_rng(seed)
    x = random.normal(size=(n_test, m))
    return x, 2 * x + noise * random.normal(size=(n_test, m))


def test_rows_equal_scipy_with_ties_and_in_every_shape():
    x, y = pairs()
    x, y = x.round(), y.round()  # ties
    oracles = {pearson: lambda a, b: stats.pearsonr(a, b).statistic, slope: lambda a, b: stats.linregress(a, b).slope,
               spearman: lambda a, b: stats.spearmanr(a, b).statistic}
    for metric, oracle in oracles.items():
        expected = [oracle(a, b) for a, b in zip(x, y)]
        assert np.allclose(metric(x, y), expected, atol=1e-12)
        assert np.allclose(metric(torch.tensor(x), torch.tensor(y)), expected, atol=1e-12)
        assert float(metric(x[2], y[2])) == pytest.approx(expected[2], abs=1e-12)
    assert doctest.testmod(metrics).failed == 0


def test_closed_forms():
    x, _ = pairs()
    assert torch.allclose(pearson(x, 3 * x - 1), torch.ones(6).double())
    assert torch.allclose(pearson(x, -x), -torch.ones(6).double())
    assert torch.allclose(slope(x, 3 * x - 1), torch.full((6,), 3.0).double())
    assert torch.allclose(slope(1e-200 * x, 1e-200 * x), torch.ones(6).double())  # no squares are lost
    assert torch.allclose(pearson(1e-200 * x, 1e-200 * x), torch.ones(6).double())
    assert torch.allclose(spearman(x, np.exp(x)), torch.ones(6).double())
    assert (pearson(x, np.exp(x)) < 0.99).all()
    assert torch.equal(slope(x, np.zeros_like(x)), torch.zeros(6).double())


@pytest.mark.parametrize("metric", [pearson, spearman, slope])
@pytest.mark.parametrize("x, y, words", [
    (np.ones((3, 4)), np.arange(12.0).reshape(3, 4), "predicted constant in 3 rows, first in row 0"),
    ([[1, 2], [3, 3]], [[1, 2], [1, 2]], "predicted constant in 1 rows, first in row 1"),
    (np.arange(12.0).reshape(3, 4), np.arange(12.0).reshape(4, 3), "transpose"),
    ([[1.0]], [[2.0]], "m of 2 or more"),
    ([1.0, np.nan, 2.0], [1.0, 2.0, 3.0], "must be finite"),
])
def test_degenerate_inputs_are_refused(metric, x, y, words):
    with pytest.raises(ValueError, match=words):
        metric(x, y)


@pytest.mark.parametrize("metric", [pearson, spearman])
def test_constant_truth_has_no_correlation(metric):
    with pytest.raises(ValueError, match="actual constant in 1 rows, first in row 1"):
        metric([[1, 2, 3], [1, 2, 3]], [[1, 2, 3], [5, 5, 5]])


def test_intervals_are_seeded_and_cover_the_truth():
    x, y = pairs(noise=2.0)  # correlation 1/sqrt(2)
    assert interval(pearson, x, y, repeats=50) == interval(pearson, x, y, repeats=50)
    assert interval(pearson, x, y, repeats=50) != interval(pearson, x, y, seed=1, repeats=50)
    assert interval(pearson, x, y).value == pytest.approx(float(pearson(x, y).mean()))
    found = [interval(pearson, *pairs(8, 40, 2.0, seed), repeats=200) for seed in range(60)]
    covered = sum(low <= 0.5**0.5 <= high for _, low, high in found)
    assert covered >= 54  # 95 % of 60 is 57; drawing both ways is a little too wide, never too narrow
    many = interval(pearson, *pairs(8, 400, 2.0), repeats=200)
    assert 0 < many.high - many.low < 0.6 * np.mean([high - low for _, low, high in found])


def test_the_slope_of_a_constant_truth_has_an_interval():
    x = pairs()[0]
    assert interval(slope, x, np.zeros_like(x), repeats=20) == (0, 0, 0)
    mixed = np.where(np.arange(6)[:, None] < 3, 2 * x, 5)  # three slopes of 2, three of 0
    assert interval(slope, x, mixed, repeats=200).value == pytest.approx(1)
    with pytest.raises(ValueError, match="actual constant in 3 rows, first in row 3"):
        interval(pearson, x, mixed)


def test_tensors_count_wherever_they_are():
    x, y = map(torch.tensor, pairs())
    assert torch.equal(pearson(x.requires_grad_(), y), pearson(x.detach(), y))
    half, w = x.detach().bfloat16(), subsets(19, 8)
    assert torch.equal(spearman(half, y), spearman(half.double(), y))
    truth = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    assert lds(half, w.requires_grad_(), truth, repeats=5) == lds(half.double(), w.detach(), truth, repeats=5)
    runs = torch.stack([y, y + 1, x])
    assert torch.equal(noise_ceiling(runs, splits=5), noise_ceiling(runs.detach().numpy(), splits=5))


def test_an_interval_is_of_test_points_and_of_removals():
    """One perfect and one reversed test point: which of them is drawn decides, however many removals there are."""
    x, _ = pairs(2, 300)
    wide = interval(spearman, x, x * [[1], [-1]], repeats=200)
    assert wide.value == pytest.approx(0, abs=1e-12) and wide.low == pytest.approx(-1) and wide.high == pytest.approx(1)
    spike = np.zeros((2, 20))
    spike[:, 3] = 1  # a third of the resamples leave it out
    assert interval(pearson, spike, spike, repeats=50) == pytest.approx((1, 1, 1))


def test_lds_of_a_linear_model_is_one_and_falls_for_a_gradient_product():
    """Effects of small subsets of softmax regression add up, nearly: exact influence has nearly all of the ranks."""
    task, w = digits_task(n=40, l2=5e-2), subsets(40, 30, removed=0.05)
    truth = removal_effects(task, w, progress=False)
    exact, plain = (lds(method.fit(task).scores(), w, truth, repeats=100) for method in (Influence(), GradDot()))
    assert exact.value > 0.97 and exact.low > 0.94
    assert plain.high < exact.low
    S = Influence().fit(task).scores().values
    by_hand = [stats.spearmanr([S[i, row == 0].sum() for row in w], truth[i]).statistic for i in range(9)]
    assert exact.value == pytest.approx(np.mean(by_hand), abs=1e-12)
    assert lds(-S, w, truth, repeats=2).value == pytest.approx(-exact.value, abs=1e-12)
    with pytest.raises(ValueError, match=r"\(40, 9\), \(30, 40\) and \(9, 30\)"):
        lds(S.T, w, truth)


@pytest.mark.parametrize("s, noise", [(2, 0.5), (7, 2.0), (10, 1.0)])
def test_the_ceiling_is_how_well_the_true_effects_correlate(s, noise):
    random = np.random.default_rng(s)
    true = random.normal(size=(300, 50))
    runs = true + noise * random.normal(size=(s, 300, 50)) + random.normal(size=(s, 300, 1))  # an offset a run
    expected = (1 + noise**2 / s) ** -0.5
    for metric in (pearson, spearman):
        reached = float(metric(true, runs.mean(0)).mean())
        assert float(noise_ceiling(runs, metric).mean()) == pytest.approx(reached, abs=0.01)
    assert float(noise_ceiling(runs, pearson).mean()) == pytest.approx(expected, abs=0.01)


def test_ceilings_of_noise_and_of_none():
    random = np.random.default_rng(0)
    assert float(noise_ceiling(random.normal(size=(6, 200, 400))).mean()) < 0.15
    assert torch.allclose(noise_ceiling(np.stack([pairs()[0]] * 3)), torch.ones(6).double())
    x = pairs()[0]
    assert torch.equal(noise_ceiling(np.stack([x, -x])), torch.zeros(6).double())
    with pytest.raises(ValueError, match=r"s of 2 or more, got \(1, 6, 19\)"):
        noise_ceiling(x[None])


def test_two_or_three_removals_have_no_interval():
    x, y = pairs(5, 3)
    found = interval(pearson, x, y)
    assert found.value == pytest.approx(float(pearson(x, y).mean())) and np.isnan([found.low, found.high]).all()
    assert np.isfinite(interval(pearson, *pairs(5, 4), repeats=20)).all()
