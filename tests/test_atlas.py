"""The atlas against the functions that it puts together; what it keeps, and what it refuses."""

import threading
import time

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from influence_nb import DISTANCES, Atlas, Split, Task, embed, models, pca, project, squared_error, tsne, umap

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


def test_atlas_gives_what_the_functions_give():
    task = image_task()
    atlas = Atlas(task, layers=["h2_c", "input"])
    assert (atlas.layers, atlas.projections) == (["h2_c", "input"], ["PCA", "t-SNE", "UMAP"])
    assert atlas.distances == list(DISTANCES), "images with classes have them all"
    train, test = (embed(task.model, split.x, "h2_c") for split in (task.train, task.test))
    made = project(train, pca)
    train_xy, test_xy = atlas.place("h2_c", "PCA", [7, 2])
    assert np.array_equal(train_xy, made.points)
    np.testing.assert_allclose(test_xy, made.place(test[[7, 2]]), atol=1e-5)
    for metric in atlas.distances:
        given = (task.test.x[5:6], task.train.x) if metric == "pixel" else (test[5:6], train)
        np.testing.assert_allclose(atlas.distance("h2_c", metric, 5), DISTANCES[metric](*given, task.train.y)[0],
                                   rtol=1e-4, atol=1e-5, err_msg=metric)
    raw = torch.linalg.vector_norm((task.test.x[5] - task.train.x).flatten(1), dim=1)
    np.testing.assert_allclose(atlas.distance("h2_c", "pixel", 5), raw, rtol=1e-5)
    np.testing.assert_allclose(atlas.distance("input", "Euclidean", 5), raw, rtol=1e-5)
    assert atlas.distance_label("cosine") == "cosine distance (1 - cos, no unit)"
    assert atlas.distance_label("pixel") == "pixel distance (Euclidean, units of pixel value)"
    assert atlas.distance_label("centroid relationship") == "centroid relationship (test / training example, cos)"


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


def test_atlas_keeps_one_map_for_each_near():
    task = image_task()
    atlas = Atlas(task, test_ids=[1, 4])
    assert atlas.near("PCA") is None
    assert (atlas.near("t-SNE"), atlas.near("UMAP")) == (("perplexity", 5, 100, 30), ("neighbours", 5, 100, 15))
    for name, default in (("t-SNE", 30), ("UMAP", 15)):
        few, usual = atlas.place("", name, [4], near=6), atlas.place("", name, [4])
        assert atlas.place("", name, [1], near=6)[0] is few[0] and not np.array_equal(few[0], usual[0])
        assert atlas.place("", name, [4], near=default)[0] is usual[0]
    assert np.array_equal(few[0], project(task.outputs(task.train), umap, near=6).points)


def test_a_row_that_only_the_training_set_makes_is_computed_once():
    calls = []

    def loudness(test, train, y):
        calls.append(len(test))
        return train.norm(dim=1).expand(len(test), -1)

    loudness.of_train, task = True, image_task()
    atlas = Atlas(task, ("", "h3_d"), distances={"loudness": loudness})
    row = atlas.distance("", "loudness", 3)
    np.testing.assert_allclose(row, task.outputs(task.train).norm(dim=1), rtol=1e-5)
    row[:] = 0  # whoever asks may write on what he gets
    kept = atlas.distance("", "loudness", 5)
    assert kept.min() > 0 and calls == [1]
    assert not np.array_equal(atlas.distance("h3_d", "loudness", 5), kept) and calls == [1, 1]


def test_targets_that_are_no_classes_have_the_distances_without_classes():
    x, y = torch.randn(16, 4), torch.rand(16)
    task = Task(models.mlp([4, 1]), Split(x[:9], y[:9]), Split(x[9:], y[9:]), loss=squared_error)
    assert Atlas(task).distances == ["cosine", "Euclidean"]
    with pytest.raises(ValueError, match="expected class numbers 0, 1, 2, ..., got torch.float32"):
        Atlas(task, distances=DISTANCES).distance("", "centroid", 0)


def test_a_new_distance_and_a_new_projection_are_one_function_each():
    def city_block(test, train, y):
        return torch.cdist(test, train, p=1) + (y == 2)

    def first_two(x, seed):
        return x[:, :2], lambda new: new[:, :2]

    train, test = Split(torch.randn(9, 4), torch.arange(9) % 3), Split(torch.randn(5, 4), torch.arange(5) % 3)
    task = Task(models.logistic(4, 3), train, test)
    assert Atlas(task).distances == [name for name in DISTANCES if name != "pixel"], "rows of numbers have no pixels"
    atlas = Atlas(task, ("linear1",), {"first two": first_two}, {"city block": city_block})
    expected = (task.outputs()[3] - task.outputs(task.train)).abs().sum(1) + (train.y == 2)
    np.testing.assert_allclose(atlas.distance("linear1", "city block", 3), expected, rtol=1e-5)
    assert atlas.distance_label("city block") == "city block distance"
    np.testing.assert_allclose(atlas.place("linear1", "first two", [3])[1], task.outputs()[3:4, :2], rtol=1e-5)


@pytest.mark.parametrize("ask, said", [
    (lambda atlas: Atlas(atlas.task, ("h2_x",)), "did you mean 'h2_"),
    (lambda atlas: atlas.place("", "MDS", [0]), "a projection of 'PCA', 't-SNE', 'UMAP', got 'MDS'"),
    (lambda atlas: atlas.distance("", "manhattan", 0), "a distance of 'cosine', 'Euclidean', .*, got 'manhattan'"),
    (lambda atlas: atlas.place("", "PCA", [0, 11]), r"test ids must lie in 0\.\.10, got 11"),
    (lambda atlas: atlas.distance("", "cosine", -1), r"test ids must lie in 0\.\.10, got -1"),
    (lambda atlas: atlas.distance("nowhere", "cosine", 1), "expected the name of a layer, got 'nowhere'"),
    (lambda atlas: atlas.near("MDS"), "a projection of 'PCA', 't-SNE', 'UMAP', got 'MDS'"),
    (lambda atlas: atlas.place("", "PCA", [0], 20), "expected near=None for pca, which looks at no neighbours, got 20"),
    (lambda atlas: atlas.place("", "t-SNE", [0], 4), r"the perplexity of tsne must lie in 5\.\.100, got 4"),
    (lambda atlas: Atlas(atlas.task, distances={"norm": lambda a, b, y: b.norm(dim=1)}).distance("", "norm", 0),
     r"norm must be \[n_test, n_train\] = \(1, 37\), got \(37,\)"),
    (lambda atlas: Atlas(atlas.task, distances={"ratio": lambda a, b, y: a @ b.T / (y != 3)}).distance("", "ratio", 0),
     "ratio must be finite, got NaN or infinity for 4 of 37 training examples: are the embeddings at '' finite"),
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
