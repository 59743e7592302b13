"""Embeddings of any layer and maps of them, against numpy, scikit-learn and the model's own outputs."""

import numpy as np
import pytest
import torch
from sklearn.manifold import TSNE
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.neighbors import KNeighborsClassifier
from threadpoolctl import threadpool_limits
from torch import nn

from influence_nb import Task, data, embed, euclidean, models, pca, project, tsne, umap

N = 37


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other on a busy machine make t-SNE of a few points take seconds."""
    with threadpool_limits(1):
        yield


def blobs(n=90, d=6, classes=3):
    """Well separated groups [n, d] float32 and their numbers [n]."""
    y = np.arange(n) % classes
    centres = 8 * np.eye(classes, d)
    return np.float32(centres[y] + np.random.default_rng(0).normal(size=(n, d))), y


class TwoInOne(nn.Module):
    """A layer called twice, one that gives a tuple, one never called, one that an in-place operation overwrites."""

    def __init__(self):
        super().__init__()
        self.twice, self.pair, self.unused = nn.Linear(4, 4), nn.LSTM(4, 3, batch_first=True), nn.Linear(4, 4)
        self.first, self.relu, self.rows = nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Flatten(0, 1)

    def forward(self, x):
        x = self.relu(self.first(self.twice(self.twice(x))))
        self.rows(x[:, None, None].expand(-1, 2, 1, -1))
        return x + self.pair(x[:, None])[0].sum()


def test_a_layer_is_what_running_the_network_up_to_it_gives():
    model, x = models.all_cnn(seed=1), torch.rand(N, 1, 28, 28)
    with torch.no_grad():
        middle = model.h2_c(model.h2_a(model.h1_c(model.h1_a(x))))
        inside, outputs = model.h1_a[0](x), model(x)
    assert torch.equal(embed(model, x, "h2_c"), middle.reshape(N, 128))
    assert torch.equal(embed(model, x, "h1_a.0"), inside.reshape(N, 5408))
    assert torch.equal(embed(model, x, ""), outputs)
    assert torch.equal(embed(model, x, "softmax_linear"), outputs)
    assert torch.equal(embed(model, x, "input"), x.reshape(N, 784))
    assert not embed(model, x, "h2_c").requires_grad


def test_the_batch_size_and_a_ragged_last_batch_change_nothing():
    model, x = models.all_cnn(seed=1), torch.rand(N, 1, 28, 28)
    whole = embed(model, x, "h3_d")
    for batch_size in (1, 10, N):
        torch.testing.assert_close(embed(model, x, "h3_d", batch_size), whole, rtol=0, atol=1e-6)
    order = torch.randperm(N)
    torch.testing.assert_close(embed(model, x[order], "h3_d", 10), whole[order], rtol=0, atol=1e-6)


def test_the_model_is_left_as_found_also_after_an_error():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 2)).train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    x, narrow = torch.randn(7, 4), torch.randn(7, 3)
    state, random_state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert torch.equal(embed(model, x, "2"), embed(model, x, "1")), "dropout must be off"
    with pytest.raises(RuntimeError):
        embed(model, narrow, "2")
    assert [m.training for m in model] == [True, False, True, True] and model.training
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(m._forward_hooks for m in model.modules())


def test_a_later_in_place_operation_does_not_reach_the_embedding():
    model, x = TwoInOne(), torch.randn(7, 4)
    with torch.no_grad():
        expected = model.first(model.twice(model.twice(x)))
    assert expected.min() < 0
    assert torch.equal(embed(model, x, "first"), expected)


@pytest.mark.parametrize("layer, error, said", [
    ("twise", ValueError, "'twise': did you mean 'twice'.*'', 'twice', 'pair', 'unused', 'first', 'relu', 'rows'"),
    ("twice", ValueError, "once a forward pass, got 2 calls"),
    ("unused", ValueError, "once a forward pass, got 0 calls"),
    ("pair", TypeError, "one tensor, got a tuple"),
    ("rows", ValueError, r"expected 7 rows, got shape \(14, 1, 4\)"),
])
def test_layers_that_have_no_embedding(layer, error, said):
    with pytest.raises(error, match=said):
        embed(TwoInOne(), torch.randn(7, 4), layer)


def test_no_examples_is_an_error():
    with pytest.raises(ValueError, match="at least one example and a batch_size of 1 or more, got 0 and 1000"):
        embed(TwoInOne(), torch.empty(0, 4), "first")


def test_pca_agrees_with_the_eigenvectors_of_the_covariance():
    x, _ = blobs()
    values, vectors = np.linalg.eigh(np.cov(x.T.astype(float)))
    axes = vectors[:, ::-1][:, :2]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), [0, 1]])
    points, place = project(torch.tensor(x), pca)
    np.testing.assert_allclose(points, (x - x.mean(0)) @ axes, atol=1e-4)
    np.testing.assert_allclose(place(x[:7] + 1), (x[:7] + 1 - x.mean(0)) @ axes, atol=1e-4)
    np.testing.assert_allclose(project(x[::-1], pca).points[::-1], points, atol=1e-4)


@pytest.mark.parametrize("method", [pca, tsne, umap])
def test_a_map_is_the_same_twice_and_keeps_groups_together(method):
    x, y = blobs()
    state = np.random.get_state()[1].copy()
    first, again = project(x, method, seed=3), project(x, method, seed=3)
    assert first.points.shape == (90, 2) and first.points.dtype == np.float32
    assert np.array_equal(first.points, again.points)
    assert KNeighborsClassifier(5).fit(first.points, y).score(first.points, y) == 1
    assert np.array_equal(np.random.get_state()[1], state)


@pytest.mark.parametrize("method", [pca, umap])
def test_new_points_land_in_their_group_whoever_comes_along(method):
    x, y = blobs(99)
    points, place = project(x[:90], method)
    new = place(torch.tensor(x[90:]))
    assert new.shape == (9, 2) and new.dtype == np.float32
    assert (KNeighborsClassifier(5).fit(points, y[:90]).predict(new) == y[90:]).all()
    np.testing.assert_allclose(place(x[95:96])[0], new[5], atol=1e-4)


def test_tsne_cannot_place_and_says_what_to_do():
    with pytest.raises(ValueError, match="project both together"):
        project(blobs()[0], tsne).place(blobs()[0][:2])


def test_near_is_the_perplexity_of_tsne_and_the_neighbours_of_umap():
    x, y = blobs()
    oracle = TSNE(2, perplexity=12, angle=0.8, max_iter=500, init="pca", random_state=0).fit_transform(x)
    np.testing.assert_array_equal(project(x, tsne, near=12).points, oracle)
    assert np.array_equal(project(x, tsne, near=30).points, project(x, tsne).points), "30 is the default"
    points, place = project(x, umap, near=7)
    nearest = euclidean_distances(x[:4] + 0.5, x).argsort(1)[:, :7]
    np.testing.assert_allclose(place(x[:4] + 0.5), np.median(points[nearest], axis=1), atol=1e-6)
    assert not np.array_equal(points, project(x, umap).points)
    assert np.array_equal(project(x, umap, near=100).points, project(x, umap, near=89).points), "at most all others"


def test_a_method_of_ones_own_is_given_near_where_it_asks_for_it():
    def stretched(x, seed, near):
        return near * x[:, :2], lambda new: near * new[:, :2]

    x, stretched.near = blobs()[0], ("stretch", 1, 9, 2)
    np.testing.assert_array_equal(project(x, stretched).points, 2 * x[:, :2])
    np.testing.assert_array_equal(project(x, stretched, near=9).place(x[:3]), 9 * x[:3, :2])
    with pytest.raises(ValueError, match=r"the stretch of stretched must lie in 1\.\.9, got 10"):
        project(x, stretched, near=10)
    with pytest.raises(ValueError, match="expected near=None for pca, which looks at no neighbours, got 30"):
        project(x, near=30)


@pytest.mark.parametrize("method", [pca, tsne, umap])
@pytest.mark.parametrize("n, d", [(3, 5), (4, 2), (20, 1)])
def test_small_maps(method, n, d):
    x = np.random.default_rng(1).normal(size=(n, d))
    points = project(x, method).points
    assert points.shape == (n, 2) and np.isfinite(points).all() and np.ptp(points[:, 0]) > 0


def test_many_equal_embeddings_still_make_a_map():
    x = np.repeat(blobs(6)[0], 10, axis=0)
    for method in (pca, tsne, umap):
        assert np.isfinite(project(x, method).points).all()


@pytest.mark.parametrize("x, said", [
    (np.zeros((50, 4)), "not all the same, got 50 with 1 different"),
    (np.eye(2), "at least 3 examples"),
    (np.zeros((5, 2, 2)), r"must be \[n, d\], got \(5, 2, 2\)"),
    (np.array([[0.0, 1], [2, 3], [4, np.nan], [5, 6]]), "NaN or infinity in 1 of 4 rows, first in row 2"),
])
def test_embeddings_without_a_map(x, said):
    with pytest.raises(ValueError, match=said):
        project(x)


def test_new_points_of_another_layer_are_refused():
    with pytest.raises(ValueError, match=r"must be \[n, 6\], got \(3, 5\)"):
        project(blobs()[0]).place(np.zeros((3, 5)))


def test_a_trained_layer_forgives_a_shift_that_pixels_do_not():
    """The reason to look at layers at all: shift a digit by two pixels, and its nearest by pixels is another digit."""
    task = Task(models.load_weights(models.all_cnn(), data.shipped_model()), *data.load("mnist-5500"), l2=1e-3)
    few, shifted = task.train.take(range(1000)), task.train.x[:200].roll(2, dims=3)
    wrong = {}
    for layer in ("input", "h3_d"):
        near = euclidean(embed(task.model, shifted, layer), embed(task.model, few.x, layer)).argmin(1)
        wrong[layer] = (few.y[near] != few.y[:200]).sum().item()
    assert wrong["h3_d"] < wrong["input"]
