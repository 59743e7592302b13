"""What the figures say: the data in their artists, their labels, their numbers against numpy's."""

import re

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba

from influence_nb import Split, plots
from influence_nb.scores import Top
from influence_nb.train import History
from influence_nb.widgets.pointcloud import PALETTE

rng = np.random.default_rng(0)


def texts(ax):
    return [text.get_text() for text in ax.texts if text.get_text()]


def frames(ax):
    return [patch.get_edgecolor() for patch in ax.patches]


def shown(ax):
    """{(column, row) of the upper left corner: image} of the tiles."""
    return {(i.get_extent()[0], i.get_extent()[3]): np.asarray(i.get_array()) for i in ax.images}


def test_class_colours_are_ten_different_ones_and_those_of_the_widgets():
    assert plots.COLOURS == list(PALETTE) and len(set(plots.COLOURS)) == 10
    assert plots.colour(torch.tensor(3)) == plots.COLOURS[3]


def test_new_figures_are_opaque_and_given_axes_are_used():
    ax = plots.loss_curve([1.0, 0.5])
    assert ax.figure.get_facecolor() == ax.get_facecolor() == to_rgba("white")
    own = plt.subplots()[1]
    assert plots.loss_curve([1.0, 0.5], ax=own) is own


def test_image_grid_shows_every_image_in_its_place_with_its_caption():
    images = rng.random((7, 1, 5, 4))
    ax = plots.image_grid(torch.tensor(images), [f"id {i}\nclass {i % 2}" for i in range(7)], columns=3)
    tiles = sorted(shown(ax).items(), key=lambda item: (item[0][1], item[0][0]))
    assert [len({row for _, row in shown(ax)}), len({column for column, _ in shown(ax)})] == [3, 3]
    for (_, tile), image in zip(tiles, images, strict=True):
        np.testing.assert_array_equal(tile, image[0])
    assert texts(ax) == [f"id {i}\nclass {i % 2}" for i in range(7)]
    assert all(image.get_clim() == (0, 1) for image in ax.images) and frames(ax) == []
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    assert all(left <= x and x + 1 <= right and top <= y and y + 1 <= bottom for x, y in shown(ax)), "none is cut off"


def test_scores_colour_the_frames_with_zero_in_the_middle():
    red, white, blue = frames(plots.image_grid(rng.random((3, 4, 4)), scores=[-2.0, 0.0, 1.0]))
    np.testing.assert_allclose(white, plots.SCORES(0.5), atol=0.01)
    np.testing.assert_allclose(red, plots.SCORES(0.0))
    np.testing.assert_allclose(blue, plots.SCORES(0.75), atol=0.01)
    assert red[0] > red[2] and blue[2] > blue[0], "harmful is red, helpful is blue"
    assert plots.centred([0.0, 0.0])(0.0) == 0.5, "also where all scores are 0"


def test_pictures_of_every_layout():
    image = rng.random((3, 5, 4))
    np.testing.assert_array_equal(plots.picture(torch.tensor(image)), image.transpose(1, 2, 0))
    np.testing.assert_array_equal(plots.picture(image[:1]), image[0])
    np.testing.assert_array_equal(plots.picture(image[0]), image[0])
    with pytest.raises(ValueError, match=r"\[h, w\], \[1, h, w\] or \[3, h, w\], got \(20,\)"):
        plots.picture(np.zeros(20))
    bytes_ax = plots.image_grid(np.full((1, 4, 4), 200, dtype=np.uint8))
    assert bytes_ax.images[0].get_clim() == (0, 255)


def test_top_grid_has_the_test_image_its_neighbours_and_what_they_are():
    train = Split(torch.rand(9, 1, 6, 6), torch.arange(9) % 3, ("cat", "dog", "owl"))
    test = Split(torch.rand(4, 1, 6, 6), torch.tensor([0, 1, 2, 0]), train.classes)
    top = Top(2, [5, 1, 0], [0.03, 0.02, 0.001], [7], [-0.04])
    ax = plots.top_grid(top, test, train, predicted=1)
    assert texts(ax) == ["test 2\nowl, predicted dog", "▲ helpful (nats per removed example)", "5 · owl\n+0.03",
                         "1 · dog\n+0.02", "0 · cat\n+0.001", "▼ harmful", "7 · dog\n-0.04"]
    tiles = [np.asarray(image.get_array()) for image in ax.images]
    for tile, image in zip(tiles, [test.x[2], train.x[5], train.x[1], train.x[0], train.x[7]], strict=True):
        np.testing.assert_array_equal(tile, image[0])
    rows = [image.get_extent()[3] for image in ax.images]
    assert rows[1] == rows[2] == rows[3] < rows[4], "helpful above harmful"
    np.testing.assert_allclose(frames(ax)[1], plots.SCORES(0.5 + 0.03 / 0.08), atol=0.01)
    np.testing.assert_allclose(frames(ax)[4], plots.SCORES(0.0))


def test_top_grid_without_class_names_and_without_a_harmful_example():
    train, test = Split(torch.rand(5, 4, 4), torch.arange(5)), Split(torch.rand(3, 4, 4), torch.arange(3))
    ax = plots.top_grid(Top(1, [4], [0.5], [], []), test, train, unit="cosine")
    assert texts(ax) == ["test 1\n1", "▲ helpful (cosine)", "4 · 4\n+0.5", "▼ harmful"]


def test_embedding_map_draws_each_class_in_its_colour_and_test_points_over_it():
    points, labels = rng.normal(size=(50, 2)), np.arange(50) % 3
    test_points = torch.tensor([[0.5, 0.25], [-1.0, 1.0]])
    ax = plots.embedding_map(points, torch.tensor(labels), ("a", "b", "c"), test_points, [2, 0], ["6558", ""])
    groups, (six, other) = ax.collections, ax.lines
    for label, group in enumerate(groups):
        np.testing.assert_array_equal(group.get_offsets(), points[labels == label])
        assert to_rgba(group.get_facecolor()[0], 1) == to_rgba(plots.COLOURS[label])
    assert len(groups) == 3
    np.testing.assert_array_equal([*six.get_xydata(), *other.get_xydata()], test_points)
    assert (six.get_color(), other.get_color()) == (plots.COLOURS[2], plots.COLOURS[0])
    assert six.get_markersize() > other.get_markersize() and six.zorder > other.zorder > groups[0].zorder
    assert texts(ax) == ["a", "b", "c", "6558"]
    np.testing.assert_allclose(ax.texts[1].get_position(), np.median(points[labels == 1], axis=0))
    assert "no unit" in ax.get_xlabel() and not len(ax.get_xticks())


def test_influence_scatter_has_the_data_the_zero_line_and_the_marked_ids():
    distance, influence, labels = rng.random(30), rng.normal(size=30), np.arange(30) % 2
    ax = plots.influence_scatter(distance, torch.tensor(influence), labels, ("even", "odd"), [3, 8], [5], "distance")
    even, odd, up, down = ax.collections
    np.testing.assert_allclose(odd.get_offsets(), np.c_[distance, influence][1::2])
    np.testing.assert_allclose(up.get_offsets(), np.c_[distance, influence][[3, 8]])
    np.testing.assert_allclose(down.get_offsets(), np.c_[distance, influence][[5]])
    heights = [marks.get_paths()[0].vertices[:3, 1] for marks in (up, down)]  # a triangle's tip is alone at its height
    assert [(np.sum(y > 0), np.sum(y < 0)) for y in heights] == [(1, 2), (2, 1)]
    assert texts(ax) == ["3", "8", "5"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["even", "odd"]
    assert list(ax.lines[0].get_ydata()) == [0, 0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("distance", "influence (nats per removed example)")
    plain = plots.influence_scatter(distance, influence)
    assert plain.get_legend() is None and len(plain.collections[0].get_offsets()) == 30


def test_predicted_actual_prints_the_slope_and_pearson_that_numpy_computes():
    predicted = rng.normal(size=40)
    actual = 1.13 * predicted + 0.2 + 0.1 * rng.normal(size=40)
    ax = plots.predicted_actual(torch.tensor(predicted), actual)
    x = predicted - predicted.mean()
    slope, r = x @ actual / (x @ x), np.corrcoef(predicted, actual)[0, 1]
    numbers = [float(v) for v in re.findall(r"\d\.\d+", texts(ax)[0])]               # value, low, high; twice
    assert 1.05 < slope < 1.2 and numbers[::3] == pytest.approx([r, slope], abs=1e-3)
    assert all(low <= value <= high for value, low, high in (numbers[:3], numbers[3:]))
    assert 0.01 < numbers[5] - numbers[4] < 0.2
    np.testing.assert_allclose(ax.collections[0].get_offsets(), np.c_[predicted, actual])
    line = ax.lines[0]
    np.testing.assert_array_equal(line.get_xdata(), line.get_ydata())
    assert ax.get_xlim() == ax.get_ylim() and ax.get_xlim()[0] < min(predicted.min(), actual.min())
    assert ax.get_xlabel() == "predicted (nats per removed example)" and ax.get_ylabel().startswith("actual (nats")


def test_predicted_actual_pools_test_points():
    predicted = rng.normal(size=(3, 20))
    ax = plots.predicted_actual(predicted, 2 * predicted)
    assert len(ax.collections[0].get_offsets()) == 60 and "slope 2.000 [2.000, 2.000]" in texts(ax)[0]


def test_predicted_actual_needs_pairs():
    with pytest.raises(ValueError, match=r"got \(1, 4\) and \(1, 3\)"):
        plots.predicted_actual(np.zeros(4), np.zeros(3))


def test_loss_curve_counts_epochs_from_one():
    ax = plots.loss_curve(History(risk=[2.0, 0.5, 0.25]))
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), [[1, 2.0], [2, 0.5], [3, 0.25]])
    assert ax.get_yscale() == "log" and (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "training risk (nats)")


def test_loss_curves_of_several_runs_are_named():
    ax = plots.loss_curve({"first": [2.0, 0.5], "second": History(risk=[2.0, 0.5, 0.25])})
    assert [len(line.get_xdata()) for line in ax.lines] == [2, 3] and ax.get_xlim() == (1, 3)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["first", "second"]
    assert len(plots.loss_curve({f"{i}": [1.0, 0.5] for i in range(12)}).lines) == 12


def test_boxes_hold_the_quartiles_of_their_class():
    values, labels = rng.normal(size=90), np.repeat([2, 5, 7], 30)
    ax = plots.box_by_class(torch.tensor(values), labels, classes=[f"c{i}" for i in range(10)], mark=5)
    ticks = ax.get_xticklabels()
    assert [tick.get_text() for tick in ticks] == ["c2", "c5", "c7"]
    assert [tick.get_weight() for tick in ticks] == ["normal", "bold", "normal"]
    assert [patch.get_facecolor()[:3] for patch in ax.patches] == [to_rgba(plots.colour(c))[:3] for c in (2, 5, 7)]
    for patch, group in zip(ax.patches, (2, 5, 7), strict=True):
        heights = patch.get_path().vertices[:, 1]
        assert np.allclose((heights.min(), heights.max()), np.quantile(values[labels == group], [0.25, 0.75]))
    with pytest.raises(ValueError, match="got .90,. and .3,."):
        plots.box_by_class(values, [1, 2, 3])
    with pytest.raises(ValueError, match="finite, got 1 that are not, of 3"):
        plots.box_by_class([1.0, np.nan, 2.0], [1, 1, 2])


def test_number_grid_writes_every_number_and_leaves_nan_empty():
    values = np.array([[0.5, -0.25, np.nan], [0.0, 1.0, -1.0]])
    ax = plots.number_grid(values, ["a", "b"], ["x", "y", "z"])
    assert texts(ax) == ["0.50", "\u22120.25", "0.00", "1.00", "\u22121.00"]
    assert texts(plots.number_grid(values, np.array(["a", "b"]), np.array(list("xyz")))) == texts(ax)
    assert ax.images[0].get_clim() == (-1, 1) and [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]
    with pytest.raises(ValueError, match="3 and 3 names"):
        plots.number_grid(values, ["a", "b", "c"], ["x", "y", "z"])


def test_weight_changes_are_laid_out_by_channel():
    change = rng.normal(size=(3, 2, 4, 4))
    drawn = plots.weight_changes(change).images[0]
    sheet = np.asarray(np.ma.filled(drawn.get_array(), np.nan))
    assert sheet.shape == (14, 9) and drawn.get_clim() == (-np.abs(change).max(), np.abs(change).max())
    np.testing.assert_array_equal(sheet[5:9, 5:9], change[1, 1])
    assert np.isnan(sheet[4]).all() and np.isnan(sheet[:, 4]).all()
    np.testing.assert_array_equal(plots.weight_changes(change[:, :, 0, 0]).images[0].get_array(), change[:, :, 0, 0])
    with pytest.raises(ValueError, match=r"got \(3,\)"):
        plots.weight_changes(np.zeros(3))
