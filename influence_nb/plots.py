"""Figures: functions (arrays, ax=None) -> ax, one message each.

Without `ax` a new figure is made, on an opaque light ground that reads on dark pages too. Class colours are Okabe and
Ito's with three more, those of the widgets; scores lie on a diverging map centred at 0, blue = helpful, red = harmful.
"""

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import Normalize

from .metrics import interval, pearson, slope
from .scores import EFFECT, Top
from .task import Split

COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#7A3BE0", "#8A5A2B", "#A6DE8C"]
HELPFUL, HARMFUL, INK, QUIET = "#0072B2", "#D55E00", "#222222", "#8A8A8A"
SCORES = plt.get_cmap("RdBu")
HALO = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}


def axes(ax, width: float, height: float):
    """`ax`, or the axes of a new figure of this size in inches."""
    if ax is None:
        ax = plt.subplots(figsize=(width, height), layout="constrained", facecolor="white")[1]
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def colour(label: int) -> str:
    """The colour of a class number."""
    return COLOURS[int(label) % len(COLOURS)]


def centred(scores) -> Normalize:
    """Limits for a diverging colour map: 0 in the middle, the largest |score| at an end."""
    scores = np.asarray(scores, dtype=float)
    largest = np.abs(scores).max(initial=0) or 1.0
    return Normalize(-largest, largest)


def picture(image) -> np.ndarray:
    """One image [h, w], [1, h, w] or [3, h, w] as imshow wants it."""
    image = np.asarray(image)
    if image.ndim == 3 and image.shape[0] in (1, 3):
        image = image.transpose(1, 2, 0)
    if image.ndim not in (2, 3):
        raise ValueError(f"an image must be [h, w], [1, h, w] or [3, h, w], got {image.shape}")
    return image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image


def tile(ax, image, column: float, row: float, caption: str = "", frame=None, size: float = 1.0):
    """Draw an image with its upper left corner at (column, row), a caption below it, in a frame of a colour."""
    image = picture(image)
    span = (column, column + size, row + size, row)
    ax.imshow(image, cmap="gray", extent=span, vmin=0, vmax=255 if image.dtype == np.uint8 else max(1, image.max()))
    if frame is not None:
        ax.add_patch(plt.Rectangle((column, row), size, size, fill=False, edgecolor=frame, linewidth=3))
    ax.text(column + size / 2, row + size + 0.05, caption, ha="center", va="top", fontsize=8, color=INK)


def bare(ax, width: float, height: float):
    """Turn `ax` into a sheet for tiles, width x height tiles of one unit."""
    ax.set(xlim=(-0.05, width), ylim=(height, -0.05), aspect="equal")
    ax.axis("off")


def image_grid(images, captions=(), scores=None, columns: int = 10, ax=None):
    """Images in rows, captions below them; with scores [n], each in a frame coloured by its score.

    Args:
        images: [n, h, w], [n, 1, h, w] or [n, 3, h, w], in 0..1 or bytes.
        captions: n strings, a line or two each.
    """
    rows, lines = -(-len(images) // columns), 1 + max((caption.count("\n") for caption in captions), default=-1)
    step = 1.1 + 0.2 * lines
    width = columns if rows > 1 else len(images)
    ax = axes(ax, 0.85 * 1.1 * width, 0.85 * step * rows)
    frames = [None] * len(images) if scores is None else SCORES(centred(scores)(np.asarray(scores, dtype=float)))
    for i, image in enumerate(images):
        tile(ax, image, 1.1 * (i % columns), step * (i // columns), captions[i] if len(captions) else "", frames[i])
    bare(ax, 1.1 * width, step * rows)
    return ax


def top_grid(top: Top, test: Split, train: Split, predicted: int | None = None, unit: str = EFFECT, ax=None):
    """A test image, and to its right the training images that helped (upper row) and harmed (lower row) its prediction.

    Each has its id, its class and its score in `unit`; frames are coloured by score, on one scale for both rows.
    """
    k = max(len(top.helpful), len(top.harmful), 1)
    name = lambda split, i: split.classes[split.y[i]] if split.classes else f"{split.y[i]}"  # noqa: E731
    ax = axes(ax, 0.95 * (2.6 + 1.12 * k), 3.4)
    said = "" if predicted is None else f", predicted {test.classes[predicted] if test.classes else predicted}"
    tile(ax, test.x[top.test_id], 0, 0.45, f"test {top.test_id}\n{name(test, top.test_id)}{said}", INK, size=2)
    shade = centred(top.helpful_scores + top.harmful_scores)
    sides = ((top.helpful, top.helpful_scores, "\u25b2 helpful"), (top.harmful, top.harmful_scores, "\u25bc harmful"))
    for row, (ids, scores, title) in enumerate(sides):
        ax.text(2.5, 1.85 * row + 0.05, f"{title} ({unit})" if row == 0 else title, fontsize=9, weight="bold",
                va="bottom", color=(HELPFUL, HARMFUL)[row])
        for column, (i, score) in enumerate(zip(ids, scores, strict=True)):
            tile(ax, train.x[i], 2.5 + 1.12 * column, 1.85 * row + 0.1, f"{i} \u00b7 {name(train, i)}\n{score:+.2g}",
                 SCORES(shade(score)))
    bare(ax, 2.5 + 1.12 * k, 3.5)
    ax.set_ylim(3.5, -0.2)
    return ax


def embedding_map(points, labels, classes=(), test_points=None, test_labels=None, names=(), ax=None):
    """A map of the training examples coloured by class, each class named at its middle, with test points over it.

    Args:
        points: [n_train, 2]; labels: [n_train] class numbers; classes: names.
        test_points: [n_test, 2], drawn as larger diamonds in the colour of `test_labels` [n_test].
        names: n_test strings to write beside the test points, which are then larger; "" for none.
    """
    points, labels = np.asarray(points), np.asarray(labels)
    ax = axes(ax, 6, 5.4)
    for label in np.unique(labels):
        own = points[labels == label]
        ax.scatter(*own.T, s=5, color=colour(label), alpha=0.55, linewidths=0, rasterized=True)
    for label in np.unique(labels):
        middle = np.median(points[labels == label], axis=0)
        ax.text(*middle, classes[label] if len(classes) else f"{label}", ha="center", va="center", weight="bold",
                fontsize=11, color=INK, bbox=HALO, zorder=5)
    if test_points is not None:
        colours = [INK] * len(test_points) if test_labels is None else [colour(label) for label in test_labels]
        named = names or [""] * len(test_points)
        for (x, y), own, name in zip(np.asarray(test_points), colours, named, strict=True):
            ax.plot(x, y, "D", markersize=10 if name else 4, color=own, markeredgecolor=INK, markeredgewidth=0.7,
                    zorder=6 if name else 4)
            ax.annotate(name, (x, y), xytext=(0, -8), textcoords="offset points", ha="center", va="top", fontsize=9,
                        weight="bold", zorder=7, bbox=HALO if name else None)
    ax.set(xticks=[], yticks=[], xlabel="map, first direction (no unit)", ylabel="map, second direction (no unit)")
    ax.spines[["left", "bottom"]].set_color(QUIET)
    return ax


def influence_scatter(distance, influence, labels=None, classes=(), helpful=(), harmful=(),
                      xlabel: str = "distance", ylabel: str = f"influence ({EFFECT})", ax=None):
    """The influence of each training example against its distance to the test point, coloured by class.

    Args:
        distance, influence: [n_train]; labels: [n_train] class numbers; classes: names for the legend.
        helpful, harmful: ids to mark with an upward and a downward triangle and their number.
    """
    distance, influence = np.asarray(distance, dtype=float), np.asarray(influence, dtype=float)
    ax = axes(ax, 6.4, 4)
    groups = np.zeros(len(distance), int) if labels is None else np.asarray(labels)
    for label in np.unique(groups):
        own = groups == label
        name = "" if labels is None else classes[label] if len(classes) else f"{label}"
        ax.scatter(distance[own], influence[own], s=9, color=colour(label), alpha=0.7, linewidths=0, label=name)
    ax.axhline(0, color=QUIET, linewidth=0.8, zorder=0)
    for ids, marker, edge in ((list(helpful), "^", HELPFUL), (list(harmful), "v", HARMFUL)):
        ax.scatter(distance[ids], influence[ids], 60, marker=marker, facecolors="none", edgecolors=edge, linewidths=1.5)
        for rank, i in enumerate(ids):  # to the right and the left in turn: neighbours in rank are neighbours in height
            side, shift = (("left", 6), ("right", -6))[rank % 2]
            ax.annotate(f"{i}", (distance[i], influence[i]), xytext=(shift, 0), textcoords="offset points", ha=side,
                        va="center", fontsize=8)
    if labels is not None:
        ax.legend(title="class", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, markerscale=2,
                  handletextpad=0.1)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    return ax


def predicted_actual(predicted, actual, unit: str = EFFECT, ax=None):
    """Estimates against the truth, with the identity line, and Pearson's r and the slope of actual on predicted, each
    with its 95 % interval.

    The slope is that of least squares with an intercept: 1 where estimates have the right scale, above 1 where they are
    too small. Several test points [n_test, m] are pooled; the intervals know which pairs are of one test point.
    """
    predicted, actual = (np.atleast_2d(np.asarray(v, dtype=float)) for v in (predicted, actual))
    if predicted.shape != actual.shape or actual.shape[1] < 2:
        raise ValueError(f"predicted and actual must be [m] or [n_test, m], m of 2 or more, got {predicted.shape} and "
                         f"{actual.shape}")
    ax = axes(ax, 4.6, 4.4)
    ends = np.array([min(predicted.min(), actual.min()), max(predicted.max(), actual.max())])
    ends = ends + np.array([-0.05, 0.05]) * (ends[1] - ends[0])
    ax.plot(ends, ends, color=QUIET, linewidth=1, linestyle="--", label="actual = predicted")
    ax.scatter(predicted, actual, s=16, color=HELPFUL, alpha=0.6, linewidths=0, rasterized=actual.size > 5000)
    said = pooled(pearson, predicted, actual), pooled(slope, predicted, actual)
    ax.text(0.04, 0.96, "Pearson {:.4f} [{:.4f}, {:.4f}]\nslope {:.3f} [{:.3f}, {:.3f}]".format(*said[0], *said[1]),
            transform=ax.transAxes, va="top", color=INK, fontsize=9)
    ax.legend(loc="lower right", frameon=False)
    ax.locator_params(nbins=5)
    ax.set(xlim=ends, ylim=ends, aspect="equal", xlabel=f"predicted ({unit})", ylabel=f"actual ({unit})")
    return ax


def pooled(metric, predicted, actual) -> tuple:
    """A metric of all pairs together, with its interval."""
    return interval(lambda *pair: metric(*(v.ravel() for v in pair)), predicted, actual, repeats=200)


def box_by_class(values, labels, classes=(), ylabel: str = f"influence ({EFFECT})", mark=None, ax=None):
    """A box of values [n] for each class number in labels [n]: quartiles, whiskers to 1.5 of their distance, outliers.

    Args:
        classes: names; mark: a class number whose name is bold, that of the test point for example.
    """
    values, labels = np.asarray(values, dtype=float), np.asarray(labels)
    if values.shape != labels.shape or values.ndim != 1 or len(values) == 0:
        raise ValueError(f"values and labels must be [n], n of 1 or more, got {values.shape} and {labels.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"values must be finite, got {(~np.isfinite(values)).sum()} that are not, of {len(values)}")
    groups = np.unique(labels).tolist()
    ax = axes(ax, 0.8 + 0.62 * len(groups), 3.6)
    boxes = ax.boxplot([values[labels == group] for group in groups], patch_artist=True, widths=0.6,
                       medianprops={"color": INK, "linewidth": 1.5},
                       flierprops={"marker": ".", "markersize": 4, "alpha": 0.5, "markeredgecolor": QUIET})
    for box, group in zip(boxes["boxes"], groups, strict=True):
        box.set(facecolor=colour(group), alpha=0.75, edgecolor=INK, linewidth=0.8)
    ax.set_xticklabels([classes[group] if len(classes) else f"{group}" for group in groups])
    if mark in groups:
        ax.get_xticklabels()[groups.index(mark)].set_weight("bold")
    ax.axhline(0, color=QUIET, linewidth=0.8, zorder=0)
    ax.set(xlabel="class", ylabel=ylabel)
    return ax


def number_grid(values, rows=(), columns=(), label: str = "Pearson", ax=None):
    """A table of numbers [r, c] as coloured cells with the numbers written in them; NaN is left empty."""
    values = np.asarray(values, dtype=float)
    if values.ndim != 2 or len(rows) not in (0, len(values)) or len(columns) not in (0, values.shape[1]):
        raise ValueError(f"values must be [rows, columns] with a name each, got {values.shape}, {len(rows)} and "
                         f"{len(columns)} names")
    ax = axes(ax, 2 + 0.72 * values.shape[1], 0.8 + 0.36 * len(values))
    limits = centred(values[np.isfinite(values)])
    ax.imshow(values, cmap=SCORES, norm=limits, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            dark = abs(value) > 0.6 * limits.vmax
            ax.text(column, row, f"{value:.2f}".replace("-", "\u2212"), ha="center", va="center", fontsize=9,
                    color="white" if dark else INK)
    turned = {"rotation": 30, "ha": "right"} if len(columns) else {}
    ax.set_xticks(range(values.shape[1]), columns if len(columns) else range(values.shape[1]), **turned)
    ax.set_yticks(range(len(values)), rows if len(rows) else range(len(values)))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title(label, fontsize=10, loc="left", color=INK)
    return ax


def weight_changes(change, ax=None):
    """What moved in a layer's weights: one small map a filter, all on one diverging scale centred at 0.

    Args:
        change: [c_out, c_in, h, w] of a convolution, or [c_out, c_in] of a linear layer, drawn as one map.
    """
    change = np.asarray(change, dtype=float)
    if change.ndim not in (2, 4):
        raise ValueError(f"change must be [c_out, c_in, h, w] or [c_out, c_in], got {change.shape}")
    maps = change if change.ndim == 4 else change[None, None]
    (n_out, n_in, h, w), shade = maps.shape, centred(change)
    sheet = np.full((n_out * (h + 1) - 1, n_in * (w + 1) - 1), np.nan)
    for i, j in np.ndindex(n_out, n_in):
        sheet[i * (h + 1):i * (h + 1) + h, j * (w + 1):j * (w + 1) + w] = maps[i, j]
    size = min(0.12, 6 / max(sheet.shape))
    ax = axes(ax, max(2.5, size * sheet.shape[1] + 1.4), max(1.6, size * sheet.shape[0] + 0.6))
    drawn = ax.imshow(sheet, cmap=SCORES, norm=shade)
    ax.set(xticks=[], yticks=[], xlabel="input channels", ylabel="output channels")
    ax.spines[:].set_visible(False)
    ax.figure.colorbar(drawn, ax=ax, shrink=0.8, label="change (units of the weights)")
    return ax


def loss_curve(history, ax=None):
    """The training risk, in nats on a logarithmic axis, of each epoch from 1: of what `fit` returned, or of a list; or
    of several, {name: either}, one line each."""
    curves = history if isinstance(history, dict) else {"": history}
    risks = {name: np.asarray(getattr(curve, "risk", curve), dtype=float) for name, curve in curves.items()}
    ax = axes(ax, 6, 3.2)
    for i, (name, risk) in enumerate(risks.items()):
        ax.plot(np.arange(1, len(risk) + 1), risk, color=colour(i), linewidth=1.5, label=name)
    longest = max(map(len, risks.values()))
    ax.set(yscale="log", xlabel="epoch", ylabel="training risk (nats)", xlim=(1, max(longest, 2)))
    ax.grid(axis="y", color="#E6E6E6", linewidth=0.6, which="both")
    if len(curves) > 1:
        ax.legend(frameon=False)
    return ax
