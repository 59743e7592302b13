"""The what-if's present state as a still picture, for pages that run no kernel."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from influence_nb.widgets.picture import CARD, HARMFUL, HELPFUL, INK, LINE, QUIET, draw_gallery, draw_map, legend, say


def figure(whatif) -> Figure:
    """Map, predicted against actual, the numbers with bars, and the cards of what is removed."""
    state, images, answer = whatif.state, bool(whatif.examples.shape), whatif.gallery.answer
    rows = 0 if images else max(len(answer.get("helpful", [])), len(answer.get("harmful", [])), 1)
    cards = 0.1 if state.test_id is None else 2.85 if images else 0.85 + 0.34 * min(rows, 10)
    low = cards + 1.35
    height = 4.6 + low
    fig = Figure((11, height), dpi=100, facecolor=CARD)
    FigureCanvasAgg(fig)
    band = lambda left, bottom, width, tall: fig.add_axes((left / 11, bottom / height, width / 11, tall / height))  # noqa: E731
    draw_map(whatif, ax := band(0.2, low + 0.25, 4.9, 4.0))
    picked = np.frombuffer(whatif.map.train_xy, "<f4").reshape(-1, 2)[state.removed]
    sizes = [110 if i in {*state.helpful, *state.harmful} else 24 for i in state.removed]  # round their triangles
    ax.scatter(*picked.T, s=sizes, color="none", edgecolors=INK, linewidths=1.1, zorder=4.5)
    legend(whatif, fig, low / height)
    draw_outcome(whatif, band(6.1, low + 0.8, 4.7, 3.45))
    draw_verdict(whatif.verdict.content, band(0.2, cards, 10.6, 1.2))
    if state.test_id is not None:
        draw_gallery(whatif, band(0.2, 0.1, 10.6, cards - 0.45), images, answer, whatif.gallery.side_titles[0])
    return fig


def draw_outcome(whatif, ax):
    """All retrainings: every test point as a faint dot, the one shown as a diamond; in colour those of these picks."""
    view = whatif.outcome
    every, own = (np.frombuffer(raw, "<f4").reshape(-1, 2) for raw in (view.train_xy, view.test_xy))
    ends = [0, *([] if view.guess is None else [view.guess]), *every.ravel(), *own.ravel()]
    low, high = (min(ends), max(ends)) if np.ptp(ends) else (-1, 1)
    limits = np.array([low, high]) + 0.05 * (high - low) * np.array([-1, 1])
    ax.plot(limits, limits, color=QUIET, linewidth=1, linestyle="--", zorder=1)
    if view.guess is not None:
        ax.axvline(view.guess, color=HELPFUL, linewidth=1, linestyle="--")
    for xy, raw, size, marker, alpha in ((every, view.train_class, 12, "o", 0.35), (own, view.test_class, 60, "D", 1)):
        for shown in (0, 1):
            of = xy[np.frombuffer(raw, "<u2")[:len(xy)] == shown]
            edge = {"edgecolors": INK, "linewidths": 1} if marker == "D" else {"linewidths": 0}
            ax.scatter(*of.T, s=size, marker=marker, color=view.palette[shown], alpha=alpha, zorder=2 + shown, **edge)
    ax.set_title(view.title, loc="left", fontsize=10, fontweight="bold", color=INK)
    ax.text(0.03, 0.97, view.note, transform=ax.transAxes, va="top", fontsize=8, color=QUIET)
    ax.set(xlim=limits, ylim=limits)
    ax.set_xlabel(view.x_label, fontsize=9, color=INK, parse_math=False)
    ax.set_ylabel(view.y_label, fontsize=9, color=INK, parse_math=False)
    ax.tick_params(labelsize=8, colors=QUIET)
    ax.spines[:].set_color(LINE)


def draw_verdict(content, ax):
    """The title and the rows now, predicted, actual; y grows downwards, in inches of the figure."""
    width, tall = (size / 100 for size in ax.get_window_extent().size)
    ax.axis("off")
    ax.set(xlim=(0, width), ylim=(tall, 0))
    say(ax, 0, 0, content["title"], fontsize=10, fontweight="bold")
    places = (4.4, 5.6, 7.4)
    for x, name in zip(places, content.get("columns", [])):
        say(ax, x, 0.24, name, ha="right", color=QUIET, fontsize=7)
    largest = max((abs(row["change"] or 0) for row in content["rows"]), default=0) or 1
    for line, row in enumerate(content["rows"]):
        y = 0.42 + 0.2 * line
        say(ax, 0, y, row["name"], color=QUIET)
        length = (row["change"] or 0) / largest
        ax.barh(y + 0.07, length, left=2, height=0.1, color=HELPFUL if length > 0 else HARMFUL)
        for x, text in zip(places, row["texts"]):
            say(ax, x, y, text, ha="right")
    ax.plot([2, 2], [0.4, 0.42 + 0.2 * len(content["rows"])], color=LINE, linewidth=0.8)
    words = [*content["doubts"], content.get("line", ""), content.get("certificate", "")]
    say(ax, 0, tall - 0.18, " ".join(words), color=QUIET, fontsize=7)
