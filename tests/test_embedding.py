"""Embeddings of any layer, distances, maps and the atlas, against numpy, scikit-learn and the model's own outputs."""

import doctest
import threading
import time

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_distances, euclidean_distances
from sklearn.neighbors import KNeighborsClassifier
from threadpoolctl import threadpool_limits
from torch import nn

from influence_nb import Split, Task, data, embedding, models
from influence_nb.embedding import Atlas, cosine, embed, euclidean, pca, pixel, project, tsne, umap

N_TRAIN, N_TEST = 37, 11


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other on a busy machine make t-SNE of a few points take seconds."""
    with threadpool_limits(1):
        yield


def image_task():
    x = torch.rand(N_TRAIN + N_TEST, 1, 28, 28)
    y = torch.arange(N_TRAIN + N_TEST) % 10
    return Task(models.all_cnn(seed=1), Split(x[:N_TRAIN], y[:N_TRAIN]), Split(x[N_TRAIN:], y[N_TRAIN:]))


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
    task = image_task()
    model, x = task.model, task.train.x
    with torch.no_grad():
        middle = model.h2_c(model.h2_a(model.h1_c(model.h1_a(x))))
        inside = model.h1_a[0](x)
    assert torch.equal(embed(model, x, "h2_c"), middle.reshape(N_TRAIN, 128))
    assert torch.equal(embed(model, x, "h1_a.0"), inside.reshape(N_TRAIN, 5408))
    assert torch.equal(embed(model, x, ""), task.outputs(task.train))
    assert torch.equal(embed(model, x, "softmax_linear"), task.outputs(task.train))
    assert torch.equal(embed(model, x, "input"), x.reshape(N_TRAIN, 784))
    assert not embed(model, x, "h2_c").requires_grad


def test_the_batch_size_and_a_ragged_last_batch_change_nothing():
    task = image_task()
    whole = embed(task.model, task.train.x, "h3_d")
    for batch_size in (1, 10, N_TRAIN):
        torch.testing.assert_close(embed(task.model, task.train.x, "h3_d", batch_size), whole, rtol=0, atol=1e-6)
    order = torch.randperm(N_TRAIN)
    torch.testing.assert_close(embed(task.model, task.train.x[order], "h3_d", 10), whole[order], rtol=0, atol=1e-6)


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


def test_distances_agree_with_sklearn():
    a, b = torch.randn(5, 9, dtype=torch.float64), torch.randn(8, 9, dtype=torch.float64)
    np.testing.assert_allclose(cosine(a, b), cosine_distances(a, b), atol=1e-14)
    np.testing.assert_allclose(euclidean(a, b), euclidean_distances(a, b), atol=1e-12)
    images_a, images_b = a.reshape(5, 1, 3, 3), b.reshape(8, 1, 3, 3)
    assert torch.equal(pixel(images_a, images_b), euclidean(a, b))
    assert doctest.testmod(embedding).failed == 0


def test_distances_at_their_ends():
    """The same is 0, exactly for Euclid even far from the origin; opposite is 2; a zero vector has no direction."""
    a = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert cosine(a, torch.tensor([[6.0, 8.0], [-3.0, -4.0], [0.0, 0.0]])).tolist() == [[0, 2, 1], [1, 1, 1]]
    far = 1000 + torch.rand(40, 30)
    assert euclidean(far, far).diagonal().max() == 0
    assert cosine(far, far).min() >= 0


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


def test_atlas_gives_what_the_functions_give():
    task = image_task()
    atlas = Atlas(task, layers=["h2_c", "input"])
    assert (atlas.layers, atlas.projections) == (["h2_c", "input"], ["PCA", "t-SNE", "UMAP"])
    assert atlas.distances == ["cosine", "Euclidean", "pixel"]
    train, test = (embed(task.model, split.x, "h2_c") for split in (task.train, task.test))
    made = project(train, pca)
    train_xy, test_xy = atlas.place("h2_c", "PCA", [7, 2])
    assert np.array_equal(train_xy, made.points)
    np.testing.assert_allclose(test_xy, made.place(test[[7, 2]]), atol=1e-5)
    for metric, function in (("cosine", cosine), ("Euclidean", euclidean)):
        np.testing.assert_allclose(atlas.distance("h2_c", metric, 5), function(test[5:6], train)[0], atol=1e-5)
    raw = torch.linalg.vector_norm((task.test.x[5] - task.train.x).flatten(1), dim=1)
    np.testing.assert_allclose(atlas.distance("h2_c", "pixel", 5), raw, rtol=1e-5)
    np.testing.assert_allclose(atlas.distance("input", "Euclidean", 5), raw, rtol=1e-5)
    assert atlas.distance_label("cosine") == "cosine distance (1 - cos, no unit)"
    assert atlas.distance_label("pixel") == "pixel distance (Euclidean, units of pixel value)"


def test_atlas_makes_one_tsne_of_training_and_test_points():
    task = image_task()
    atlas = Atlas(task, test_ids=[1, 4, 8])
    points = project(torch.cat([task.outputs(split) for split in (task.train, task.test.take([1, 4, 8]))]), tsne).points
    train_xy, test_xy = atlas.place("", "t-SNE", [8, 1])
    np.testing.assert_array_equal(train_xy, points[:N_TRAIN])
    np.testing.assert_array_equal(test_xy, points[[N_TRAIN + 2, N_TRAIN]])
    assert atlas.place("", "t-SNE", [4])[0] is train_xy, "the map is kept"
    other, _ = atlas.place("", "t-SNE", [0, 4])
    assert not np.array_equal(other, train_xy)


def test_a_new_distance_and_a_new_projection_are_one_function_each():
    def city_block(a, b):
        return torch.cdist(a, b, p=1)

    def first_two(x, seed):
        return x[:, :2], lambda new: new[:, :2]

    train, test = Split(torch.randn(9, 4), torch.arange(9) % 3), Split(torch.randn(5, 4), torch.arange(5) % 3)
    task = Task(models.logistic(4, 3), train, test)
    assert Atlas(task).distances == ["cosine", "Euclidean"], "rows of numbers have no pixels"
    atlas = Atlas(task, ("linear1",), {"first two": first_two}, {"city block": city_block})
    expected = (task.outputs()[3] - task.outputs(task.train)).abs().sum(1)
    np.testing.assert_allclose(atlas.distance("linear1", "city block", 3), expected, rtol=1e-5)
    assert atlas.distance_label("city block") == "city block distance"
    np.testing.assert_allclose(atlas.place("linear1", "first two", [3])[1], task.outputs()[3:4, :2], rtol=1e-5)


@pytest.mark.parametrize("ask, said", [
    (lambda atlas: Atlas(atlas.task, ("h2_x",)), "did you mean 'h2_"),
    (lambda atlas: atlas.place("", "MDS", [0]), "a projection of 'PCA', 't-SNE', 'UMAP', got 'MDS'"),
    (lambda atlas: atlas.distance("", "manhattan", 0), "a distance of 'cosine', 'Euclidean', 'pixel', got 'manhattan'"),
    (lambda atlas: atlas.place("", "PCA", [0, 11]), r"test ids must lie in 0\.\.10, got 11"),
    (lambda atlas: atlas.distance("", "cosine", -1), r"test ids must lie in 0\.\.10, got -1"),
    (lambda atlas: atlas.distance("nowhere", "cosine", 1), "expected the name of a layer, got 'nowhere'"),
])
def test_atlas_refuses_what_it_does_not_have(ask, said):
    atlas = Atlas(image_task())
    with pytest.raises(ValueError, match=said):
        ask(atlas)


def test_threads_that_ask_together_get_one_map():
    calls, answers = [], []

    def slow(x, seed):
        calls.append(threading.get_ident())
        time.sleep(0.05)
        return x[:, :2], lambda new: new[:, :2]

    task = image_task()
    task.model.train()
    atlas = Atlas(task, ("h3_d",), {"slow": slow})
    threads = [threading.Thread(target=lambda: answers.append(atlas.place("h3_d", "slow", [1])[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len(answers) == 4 and all(answer is answers[0] for answer in answers)
    assert task.model.training


def test_a_trained_layer_forgives_a_shift_that_pixels_do_not():
    """The reason to look at layers at all: shift a digit by two pixels, and its nearest by pixels is another digit."""
    task = Task(models.load_weights(models.all_cnn(), data.shipped_model()), *data.load("mnist-5500"), l2=1e-3)
    few, shifted = task.train.take(range(1000)), task.train.x[:200].roll(2, dims=3)
    wrong = {}
    for layer in ("input", "h3_d"):
        near = euclidean(embed(task.model, shifted, layer), embed(task.model, few.x, layer)).argmin(1)
        wrong[layer] = (few.y[near] != few.y[:200]).sum().item()
    assert wrong["h3_d"] < wrong["input"]
