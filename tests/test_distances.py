"""Distances with and without classes, against scipy, scikit-learn and closed forms; what they do at their ends."""

import doctest

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from scipy.stats import spearmanr
from sklearn.covariance import EmpiricalCovariance, LedoitWolf
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestCentroid, NearestNeighbors

from influence_nb import (
    DISTANCES,
    centroid,
    centroid_relationship,
    centroid_relationship_distance,
    centroids,
    cosine,
    data,
    distances,
    embed,
    euclidean,
    mahalanobis,
    models,
    neighbours,
    own_centroid,
    pixel,
)
from influence_nb.distances import by_class

N_TRAIN, N_TEST, D = 43, 7, 5
ONE = torch.zeros(1, 1, dtype=torch.float64)  # a test point where none matters


def problem(n=N_TRAIN, n_test=N_TEST, d=D, seed=0):
    """Test points, training examples in float64 and their classes 0, 2 and 3: no example has the number 1."""
    random = torch.Generator().manual_seed(seed)
    y = torch.tensor([0, 2, 3, 2])[torch.randint(4, (n,), generator=random)]
    shape = torch.randn(d, d, generator=random, dtype=torch.float64)
    x = torch.randn(n + n_test, d, generator=random, dtype=torch.float64) @ shape + 1
    x[:n, 0] += 3.0 * y
    return x[n:], x[:n], y


def rotation(d, seed=0):
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


def unusual(x):
    """The Mahalanobis distances [n] of examples that are all of one class."""
    return mahalanobis(ONE, x, torch.zeros(len(x), dtype=torch.int64))[0]


def with_pseudo_inverse(x):
    """What `mahalanobis` would be without shrinkage."""
    x = x - x.mean(0)
    return ((x @ torch.linalg.pinv(x.T @ x / len(x), hermitian=True)) * x).sum(1).sqrt()


def test_distances_agree_with_scipy():
    test, train, _ = problem()
    np.testing.assert_allclose(cosine(test, train), cdist(test, train, "cosine"), atol=1e-14)
    np.testing.assert_allclose(euclidean(test, train), cdist(test, train), rtol=1e-12)
    images = [x[:, :4].reshape(-1, 1, 2, 2) for x in (test, train)]
    assert torch.equal(pixel(*images), euclidean(test[:, :4], train[:, :4]))
    assert doctest.testmod(distances).failed == 0 < doctest.testmod(distances).attempted


def test_distances_at_their_ends():
    """The same is 0, exactly for Euclid even far from the origin; opposite is 2; a zero vector has no direction."""
    a = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert cosine(a, torch.tensor([[6.0, 8.0], [-3.0, -4.0], [0.0, 0.0]])).tolist() == [[0, 2, 1], [1, 1, 1]]
    far = 1000 + torch.rand(40, 30)
    assert euclidean(far, far).diagonal().max() == 0
    assert cosine(far, far).min() >= 0


def test_centroids_and_the_distances_from_them():
    test, train, y = problem()
    fitted = NearestCentroid().fit(train.numpy(), y.numpy())
    means = centroids(train, y)
    np.testing.assert_allclose(means[[0, 2, 3]], fitted.centroids_, rtol=1e-12)
    assert means.shape == (4, D) and means[1].isnan().all(), "no example has the number 1"
    own = torch.from_numpy(fitted.centroids_[np.searchsorted(fitted.classes_, y.numpy())])  # [n_train, d]
    np.testing.assert_allclose(centroid(test, train, y), cdist(test, own), rtol=1e-12)
    np.testing.assert_allclose(own_centroid(test, train, y)[3], (train - own).norm(dim=1), rtol=1e-12)
    np.testing.assert_allclose(own_centroid(test, train, y)[0], centroid(train, train, y).diagonal(), rtol=1e-12)
    nearest = y[centroid(test, train, y).argmin(1)]
    assert nearest.tolist() == fitted.predict(test.numpy()).tolist()


def test_the_centroid_relationship_in_both_readings():
    test, train, y = problem()
    means = centroids(train, y)[y]
    near, own = 1 - cdist(test, means, "cosine"), 1 - cdist(train, means, "cosine").diagonal()
    np.testing.assert_allclose(centroid_relationship(test, train, y), near / own, rtol=1e-10)
    np.testing.assert_allclose(centroid_relationship_distance(test, train, y), (1 - near) / (1 - own), rtol=1e-10)
    same = centroid_relationship(train, train, y).diagonal(), centroid_relationship_distance(train, train, y).diagonal()
    np.testing.assert_allclose(torch.stack(same), 1, rtol=1e-12)


def test_the_two_readings_of_the_relationship_turn_opposite_ways():
    """The class lies along the first axis, its examples at 45 degrees; a test point turns away from it."""
    train, y = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([0, 0])
    test = torch.tensor([[1.0, 0.0], [2.0, 2.0], [0.0, 3.0], [-1.0, 0.0]])
    own = 0.5**0.5
    similar = [1 / own, 1, 0, -1 / own]
    far = [0, 1, 1 / (1 - own), 2 / (1 - own)]
    np.testing.assert_allclose(centroid_relationship(test, train, y)[:, 0], similar, atol=1e-6)
    np.testing.assert_allclose(centroid_relationship_distance(test, train, y)[:, 1], far, atol=1e-5)


def test_a_relationship_has_no_zero_below_the_line():
    """Alone in a class; at a right angle to its centroid, or just beyond; without any direction."""
    test = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    alone = torch.tensor([[2.0, 0.0]], dtype=torch.float64), torch.tensor([0])
    assert centroid_relationship(test, *alone).item() == 0
    np.testing.assert_allclose(centroid_relationship_distance(test, *alone), 1e4)
    train = torch.tensor([[0.0, 1.0], [-5e-5, 1.0], [9.0, 0.0], [9.0, -2.0], [0.0, 0.0]], dtype=torch.float64)
    found = centroid_relationship(torch.tensor([[1.0, 0.0]], dtype=torch.float64), train, torch.zeros(5).long())[0]
    np.testing.assert_allclose(found[[0, 1, 4]], [1e4, -1e4, 1e4], rtol=1e-6)
    assert found[2] == 1 and 1 < found[3] < 1.05
    zeros = torch.zeros(6, 2), torch.zeros(6).long()
    assert centroid_relationship(zeros[0], *zeros).eq(0).all()
    assert centroid_relationship_distance(zeros[0], *zeros).eq(1).all()


@pytest.mark.parametrize("d", [2, D, 40, 200])  # from more examples than dimensions to more dimensions than examples
def test_mahalanobis_is_that_of_ledoit_and_wolf_in_each_class(d):
    test, train, y = problem(d=d)
    found = mahalanobis(test, train, y)
    for k in (0, 2, 3):
        x = train[y == k].numpy()
        np.testing.assert_allclose(found[:, y == k] ** 2, np.tile(LedoitWolf().fit(x).mahalanobis(x), (N_TEST, 1)),
                                   rtol=1e-8)


def test_mahalanobis_is_the_classical_one_where_examples_abound():
    """A share s of the identity takes an eigenvalue v to (1 - s) v + s level, and falls as 1 / n_k."""
    shares, many = [], problem(20000)[1]
    for n in (200, 2000, 20000):
        x = many[:n]
        values, share = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)), LedoitWolf().fit(x.numpy()).shrinkage_
        ratio = unusual(x).numpy() ** 2 / EmpiricalCovariance().fit(x.numpy()).mahalanobis(x.numpy())
        assert (1 - 1e-9) / (1 - share + share * values.mean() / values.min()) < ratio.min()
        assert ratio.max() < (1 + 1e-9) / (1 - share + share * values.mean() / values.max())
        shares.append(share)
    np.testing.assert_allclose(shares[1:], np.array(shares[:2]) / 10, rtol=0.5)
    line = problem(d=1)[1]  # where there is nothing to shrink
    np.testing.assert_allclose(unusual(line), ((line - line.mean()).abs() / line.std(correction=0))[:, 0], rtol=1e-10)


def test_a_unit_that_is_dead_or_constant_in_a_class_changes_nothing():
    test, train, y = problem()
    of_class = torch.tensor([0.1, 0.2, 0.3, 0.7], dtype=torch.float64)[y]
    more = torch.cat([train, torch.stack([0 * of_class, 0 * of_class + 1e6, of_class], 1)], 1)
    np.testing.assert_allclose(mahalanobis(test, more, y), mahalanobis(test, train, y), rtol=1e-10)
    np.testing.assert_allclose(mahalanobis(test.float(), more.float(), y), mahalanobis(test, train, y), rtol=1e-4)


def test_singular_covariances_are_no_trouble():
    """Centred logits and a doubled column, where a covariance has no inverse: near the pseudo-inverse's value."""
    x = torch.randn(3000, D, dtype=torch.float64) * torch.arange(1, D + 1)
    for singular in (x - x.mean(1, keepdim=True), torch.cat([x, x[:, :2]], 1)):
        assert torch.linalg.matrix_rank(torch.cov(singular.T)) < singular.shape[1]
        np.testing.assert_allclose(unusual(singular), with_pseudo_inverse(singular), rtol=0.02)
        np.testing.assert_allclose(unusual(singular.float()), unusual(singular), rtol=1e-3)
        assert spearmanr(unusual(singular), with_pseudo_inverse(singular)).statistic > 0.9999


def test_an_outlier_is_found_among_fewer_examples_than_dimensions_where_a_pseudo_inverse_sees_none():
    x = torch.randn(20, 64, dtype=torch.float64)
    x[13] *= 1.5
    np.testing.assert_allclose(with_pseudo_inverse(x), 19**0.5, rtol=1e-6)
    found = unusual(x)
    assert found.argmax() == 13 and found[13] > 1.1 * found.sort().values[-2]


def test_swapped_labels_are_far_from_their_class_in_a_narrow_and_in_a_wide_layer():
    """60 of 1,200 digits; a pseudo-inverse sees nothing where a class has fewer examples than the layer has units."""
    train = data.load("mnist-5500")[0].take(range(1200))
    swapped, y = torch.randperm(1200)[:60], train.y.clone()
    y[swapped] = (y[swapped] + torch.randint(1, 10, (60,))) % 10
    model, found = models.load_weights(models.all_cnn(), data.shipped_model()), {}
    for layer in ("h3_d", "h2_c"):  # 10 and 128 units
        x = embed(model, train.x, layer)
        plain = by_class(lambda test, x: with_pseudo_inverse(x.double()), x[:1], x, y)[0]
        found[layer] = [roc_auc_score(torch.zeros(1200).index_fill(0, swapped, 1), row)
                        for row in (mahalanobis(x[:1], x, y)[0], plain)]
    assert found["h3_d"][0] > 0.98 and found["h3_d"][1] > 0.98
    assert found["h2_c"][0] > 0.9 and found["h2_c"][1] < 0.6


def test_an_outlier_of_a_long_class_is_found_where_the_distance_from_the_centroid_sees_none():
    x = torch.randn(60, D, dtype=torch.float64) * torch.tensor([30.0, 1, 1, 1, 1])
    x[13] = torch.tensor([0.0, 0, 9, 0, 0])
    y = torch.zeros(60, dtype=torch.int64)
    assert mahalanobis(ONE, x, y)[0].argmax() == 13
    assert own_centroid(x[:1], x, y)[0].argsort()[-20:].tolist().count(13) == 0


@pytest.mark.parametrize("d", [1, 3, 5408])
def test_classes_of_one_and_two_examples(d):
    """Alone, or like all others of its class: 0. Two that differ: one standard deviation each, and so their copies."""
    x = torch.randn(3, d)
    train, y = x[[0, 1, 2, 1, 1, 1, 1, 2]], torch.tensor([0, 1, 1, 2, 2, 2, 3, 3])
    np.testing.assert_allclose(mahalanobis(x, train, y)[1], [0, 1, 1, 0, 0, 0, 1, 1], rtol=1e-5)
    np.testing.assert_allclose(unusual(x[[0, 0, 1, 1]]), 1, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(-1e3, 1e3), st.floats(1e-3, 1e3), st.sampled_from([2, D, 60]))
def test_where_the_origin_is_how_the_axes_lie_and_what_the_unit_is(seed, shift, scale, d):
    """Mahalanobis does not know; a distance from a centroid knows the unit; an angle at the origin knows the origin."""
    test, train, y = problem(d=d, seed=seed)
    Q = rotation(d, seed)
    moved = [scale * (x + shift) @ Q for x in (test, train)]
    np.testing.assert_allclose(mahalanobis(*moved, y), mahalanobis(test, train, y), rtol=1e-6)
    for function in (centroid, own_centroid):
        np.testing.assert_allclose(function(*moved, y), scale * function(test, train, y), rtol=1e-6)
    turned = [scale * x @ Q for x in (test, train)]
    for function in (cosine, centroid_relationship, centroid_relationship_distance):
        np.testing.assert_allclose(function(*turned, y), function(test, train, y), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", DISTANCES)
def test_a_row_is_a_test_point_and_a_column_a_training_example(name):
    """Whoever comes along; and what is said to depend on the training set alone does so."""
    function = DISTANCES[name]
    test, train, y = problem()
    found, order = function(test, train, y), torch.randperm(N_TRAIN)
    assert found.shape == (N_TEST, N_TRAIN) and found.dtype == torch.float64
    np.testing.assert_allclose(function(test, train[order], y[order]), found[:, order], rtol=1e-8)
    np.testing.assert_allclose(function(test[2:3], train, y), found[2:3], rtol=1e-8)
    assert (found == found[0]).all() == getattr(function, "of_train", False)
    relabelled = function(test, train, y.roll(1))
    assert torch.equal(relabelled, found) != getattr(function, "of_classes", False)
    assert isinstance(function.unit, str)


@pytest.mark.parametrize("name", DISTANCES)
def test_float32_other_whole_numbers_and_dead_units(name):
    function = DISTANCES[name]
    test, train, y = (x.relu() for x in problem())
    found = function(test, train, y)
    assert (train == 0).any(1).any() and found.isfinite().all()
    single = function(test.float(), train.float(), y)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single, found, rtol=2e-3, atol=1e-5)
    for dtype in (torch.uint8, torch.int32):
        assert torch.equal(function(test, train, y.to(dtype)), found)
    dead = torch.zeros(3, D, dtype=torch.float64)
    assert function(dead, torch.cat([dead, train]), torch.cat([y[:3], y])).isfinite().all()


@pytest.mark.parametrize("name", [name for name, function in DISTANCES.items() if hasattr(function, "of_classes")])
@pytest.mark.parametrize("wrong, said", [
    (lambda x, y: (x, None), r"expected y \[n\] = \(43,\), the class numbers of train \(43, 5\), got None"),
    (lambda x, y: (x, y[:-1]), r"got \(42,\): task.train.y\?"),
    (lambda x, y: (x, y.double()), r"class numbers 0, 1, 2, ..., got torch.float64 from 0 to 3: y.long\(\)"),
    (lambda x, y: (x, y - 1), "got torch.int64 from -1 to 2"),
    (lambda x, y: (x.index_fill(0, torch.tensor([4, 9]), torch.inf), y), "infinity in 2 of 43 rows, first in row 4"),
    (lambda x, y: (x.int(), y), r"expected embeddings of floating type, got torch.int32: x.float\(\)\?"),
])
def test_what_classes_cannot_be(name, wrong, said):
    test, train, y = problem()
    with pytest.raises(ValueError, match=said):
        DISTANCES[name](test, *wrong(train, y))


def test_neighbours_are_the_nearest_and_of_equals_the_first():
    test, train, _ = problem()
    expected = NearestNeighbors(n_neighbors=6).fit(train).kneighbors(test, return_distance=False)
    assert neighbours(euclidean(test, train), 6).tolist() == expected.tolist()
    tied = torch.tensor([[1.0, 0, 1] * 20, [0.0, 1, 1] * 20])
    assert neighbours(tied, 23).tolist() == [[*range(1, 60, 3), 0, 2, 3], [*range(0, 60, 3), 1, 2, 4]]
    assert neighbours(tied.numpy()[0], 2).tolist() == [1, 4], "one row, as an atlas gives it"
    assert neighbours(tied, 60)[1].sort().values.tolist() == list(range(60))


@pytest.mark.parametrize("k", [0, -1, N_TRAIN + 1])
def test_more_neighbours_than_there_are(k):
    with pytest.raises(ValueError, match=rf"k must lie in 1\.\.43, the number of training examples, got {k}"):
        neighbours(torch.zeros(N_TEST, N_TRAIN), k)
