"""The explorer's present state as a still picture, for pages that run no kernel."""

import io
import textwrap

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from matplotlib.patheffects import withStroke
from PIL import Image

CARD, INK, QUIET, LINE = "#FFFFFF", "#1D252D", "#5D6873", "#DDE2E7"  # an opaque light card, on dark pages too
HELPFUL, HARMFUL = "#0069A8", "#C84A00"
MUTED = 0.42  # how strong the training points are beside the highlighted ones
SHOWN = 10  # neighbours a side


def png(explorer) -> bytes:
    """Its `figure()` as PNG of at most 256 colours, which keeps 60,000 points under 300 kB."""
    canvas = explorer.figure().canvas
    canvas.draw()
    colours = Image.new("P", (1, 1))
    colours.putpalette(palette(explorer))
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    file = io.BytesIO()
    image.quantize(palette=colours, dither=Image.Dither.NONE).save(file, "PNG")
    return file.getvalue()


def palette(explorer) -> list:
    """256 colours as one list: greys, and every colour of the picture in steps towards the card and the ink."""
    pure = [np.array(to_rgb(c)) * 255 for c in (*dict.fromkeys(explorer.map.palette), HELPFUL, HARMFUL)]
    greys = [np.full(3, grey) for grey in (255, *np.linspace(0, 238, 57))]  # none that the card is taken for
    mixed = [255 + (c - 255) * share for share in (1, MUTED, 0.8, 0.6, 0.25, 0.12) for c in pure]
    dark = [c * share for share in (0.75, 0.4) for c in pure]
    both = [np.array(to_rgb(c)) * 255 for c in (INK, QUIET, LINE)]
    return np.rint(np.concatenate([both + greys + mixed + dark])[:256]).astype(int).ravel().tolist()


def figure(explorer) -> Figure:
    """Map, scatter and the gallery's two rows as a matplotlib Figure."""
    state, images = explorer.state, bool(explorer.examples.shape)
    rows = max(len(state.helpful), len(state.harmful), 1) if not images else 0
    low = 0.35 + (2.5 if images else 0.5 + 0.34 * min(rows, SHOWN)) if state.test_id is not None else 0.35
    height = 4.6 + low
    fig = Figure((11, height), dpi=100, facecolor=CARD)
    FigureCanvasAgg(fig)
    band = lambda left, bottom, width, tall: fig.add_axes((left / 11, bottom / height, width / 11, tall / height))  # noqa: E731
    draw_map(explorer, band(0.2, low + 0.25, 4.9, 4.0))
    legend(explorer, fig, low / height)
    if state.test_id is not None:
        draw_scatter(explorer, band(6.1, low + 0.6, 4.7, 3.5))
        titles = explorer.gallery.side_titles[explorer.map.method]
        draw_gallery(explorer, band(0.2, 0.1, 10.6, low - 0.45), images, explorer.map.answer, titles)
    return fig


def draw_map(explorer, ax):
    xy, test = (np.frombuffer(raw, "<f4").reshape(-1, 2) for raw in (explorer.map.train_xy, explorer.map.test_xy))
    every = np.concatenate([xy, test])
    box = ax.get_window_extent()
    (x0, y0), (x1, y1) = np.nanmin(every, 0), np.nanmax(every, 0)
    unit = max((x1 - x0) / box.width, (y1 - y0) / box.height) * 1.08 or 1
    limits = [((a + b) / 2 - unit * size / 2, (a + b) / 2 + unit * size / 2) for a, b, size in
              ((x0, x1, box.width), (y0, y1, box.height))]
    dots(explorer, ax, xy, limits)
    colours = np.array([to_rgb(c) for c in explorer.map.palette])
    shown = np.frombuffer(explorer.map.test_class, "<u2") % len(colours)
    hidden = np.frombuffer(explorer.map.test_hidden, "u1")
    alpha = np.where(hidden, 0.1, 0.6) if len(hidden) else 0.6
    ax.scatter(*test.T, s=26, marker="D", c=colours[shown], alpha=alpha, edgecolors=INK, linewidths=0.7)
    if explorer.map.ellipses:
        draw_ellipses(explorer.map, ax)
    neighbours(explorer, ax, xy)
    for test_id, size in ((getattr(explorer.state, "pinned", None), 70), (explorer.state.test_id, 90)):
        if test_id is not None:
            row = explorer.examples.row[test_id]
            ax.scatter(*test[row], s=size, marker="D", color=colours[shown[row]], edgecolors=INK, lw=1.8, zorder=5)
    ax.set(xticks=[], yticks=[])
    ax.set_title(explorer.map.title, loc="left", fontsize=10, fontweight="bold", color=INK, parse_math=False)
    ax.spines[:].set_color(LINE)


def draw_ellipses(view, ax):
    """The centre of each colour's points, with its name, and the ellipse of two standard deviations."""
    halo, named = [withStroke(linewidth=3, foreground=CARD)], []
    for group, x, y, long, short, angle in np.frombuffer(view.centres, "<f4").reshape(-1, 6):
        name, colour = view.class_names[int(group)], view.palette[int(group) % len(view.palette)]
        if short > 0:
            ax.add_patch(Ellipse((x, y), 2 * long, 2 * short, angle=np.degrees(angle), fill=False, edgecolor=colour,
                                 linewidth=1.5, zorder=2.5, path_effects=halo))
        ax.scatter(x, y, s=22, color=colour, edgecolors=CARD, linewidths=1, zorder=3)
        at = ax.transData.transform((x, y)) + (0, 10)
        taken = any((np.abs(at - other) < (40, 12)).all() for other in named)
        named.append(at - (0, 20 * taken))  # below, where above is another name
        lift = (-10 if taken else 10) * 72 / ax.figure.dpi
        ax.annotate(name, (x, y), xytext=(0, lift), textcoords="offset points", ha="center", va="center", fontsize=8,
                    fontweight="bold", color=INK, path_effects=halo, parse_math=False, zorder=3)


def draw_scatter(explorer, ax):
    xy = np.frombuffer(explorer.scatter.train_xy, "<f4").reshape(-1, 2)
    limits = [(low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1)) for low, high in
              zip(np.nanmin(xy, 0), np.nanmax(xy, 0), strict=True)]
    dots(explorer, ax, xy, limits)
    ax.axhline(0, color=LINE, linewidth=0.8, zorder=1)
    neighbours(explorer, ax, xy)
    ax.set_title(explorer.scatter.title, loc="left", fontsize=10, fontweight="bold", color=INK, parse_math=False,
                 pad=16)
    ax.text(0, 1.015, explorer.scatter.caption, transform=ax.transAxes, fontsize=7.5, color=QUIET)
    ax.set_xlabel(explorer.scatter.x_label, fontsize=9, color=INK, parse_math=False)
    ax.set_ylabel(explorer.scatter.y_label, fontsize=9, color=INK, parse_math=False)
    ax.tick_params(labelsize=8, colors=QUIET)
    ax.spines[:].set_color(LINE)


def dots(explorer, ax, xy, limits):
    """Paint the training points as an image, twice as fine as the figure: many times faster than markers."""
    box, view = ax.get_window_extent(), explorer.map
    width, height = int(2 * box.width), int(2 * box.height)
    colours = np.array([to_rgb(c) for c in view.palette]) * 255
    strength = MUTED if explorer.state.test_id is not None else 0.9
    shades = 255 + (colours[np.frombuffer(view.train_class, "<u2") % len(colours)] - 255) * strength
    hidden = np.frombuffer(view.train_hidden, "u1").astype(bool) if view.train_hidden else np.zeros(len(xy), bool)
    shades[hidden] = 238
    order = np.random.default_rng(0).permutation(len(xy))  # so that no class lies on top
    order = order[np.argsort(~hidden[order], kind="stable")]
    (x0, x1), (y0, y1) = limits
    column = ((xy[order, 0] - x0) / (x1 - x0) * width).astype(int)
    line = ((y1 - xy[order, 1]) / (y1 - y0) * height).astype(int)
    radius = np.clip(18 * (len(xy) + 1) ** -0.18, 2, 6)
    reach = int(radius)
    image = np.full((height + 2 * reach + 1, width + 2 * reach + 1, 4), 255, np.uint8)
    flat, stride = image.view(np.uint32).reshape(-1), image.shape[1]
    ink = np.column_stack([shades[order], np.full(len(xy), 255)]).astype(np.uint8).view(np.uint32).ravel()
    at = (line + reach) * stride + column + reach
    for dx in range(-reach, reach + 1):
        for dy in range(-reach, reach + 1):
            if np.hypot(dx, dy) <= radius:
                flat[at + dy * stride + dx] = ink
    ax.imshow(image[reach:reach + height, reach:reach + width], extent=(x0, x1, y0, y1), aspect="auto", zorder=0)
    ax.set(xlim=limits[0], ylim=limits[1])


def neighbours(explorer, ax, xy):
    for ids, marker, colour in ((explorer.state.harmful, "v", HARMFUL), (explorer.state.helpful, "^", HELPFUL)):
        ax.scatter(*xy[ids].T, s=52, marker=marker, color=colour, edgecolors=CARD, linewidths=0.9, zorder=4)


def legend(explorer, fig, top):
    """Classes and marks in two lines under the map, as much as fits."""
    view, lines = explorer.map, [top + 0.02, top + 0.02 - 0.17 / fig.get_figheight()]
    names = view.side_names[view.method]
    marks = [("\u25c6", INK, "test point"), ("\u25b2", HELPFUL, names[0]), ("\u25bc", HARMFUL, names[1])]
    marks += [("\u25cf", view.palette[c % len(view.palette)], name) for c, name in enumerate(view.class_names)]
    x = 0.2
    for mark, colour, name in marks:
        width = 0.3 + 0.068 * len(name)
        if x + width > 5.3:
            x = 0.2
            lines.pop(0)
        if not lines:
            break
        fig.text(x / 11, lines[0], mark, color=colour, fontsize=9)
        fig.text((x + 0.15) / 11, lines[0], name, color=INK, fontsize=8, parse_math=False)
        x += width


def draw_gallery(explorer, ax, images, answer, titles):
    """The test point and its neighbours, in inches of the figure; y grows downwards."""
    state, words = explorer.state, explorer.examples.words
    width, tall = (size / 100 for size in ax.get_window_extent().size)
    ax.axis("off")
    say(ax, 0, 0, f"Test point {state.test_id}: {words('test', state.test_id)}", fontsize=10, fontweight="bold")
    for row, (side, title, colour) in enumerate(zip(("helpful", "harmful"), titles, (HELPFUL, HARMFUL))):
        ids, scores = (answer[name][:SHOWN] for name in (side, f"{side}_scores"))
        rank = [f"{score:+.3g}".replace("-", "\u2212") for score in scores]
        if images:
            draw_images(explorer, ax, 1.6, 0.3 + 1.13 * row, title, colour, ids, rank)
        else:
            draw_texts(explorer, ax, row * width / 2, title, colour, ids, rank)
    if images:
        show(ax, explorer.examples.thumbnails("test", [state.test_id])[0], 0, 0.4, 1.25)
        loss = explorer.examples.loss[explorer.examples.row[state.test_id]]
        say(ax, 0.625, 1.7, f"loss {loss:.3g} {explorer.examples.loss_unit}", ha="center")
    ax.set(xlim=(0, width), ylim=(tall, 0), xticks=[], yticks=[])


def draw_images(explorer, ax, left, top, title, colour, ids, scores):
    say(ax, left, top, title, color=colour)
    pictures = explorer.examples.thumbnails("train", ids)
    for place, (i, score) in enumerate(zip(ids, scores, strict=True)):
        x = left + 0.9 * place
        show(ax, pictures[place], x, top + 0.18, 0.6)
        say(ax, x + 0.3, top + 0.81, explorer.examples.words("train", i, " \u2192 "), ha="center", fontsize=7)
        say(ax, x + 0.3, top + 0.94, score, ha="center", fontsize=7, color=colour)


def draw_texts(explorer, ax, left, title, colour, ids, scores):
    say(ax, left, 0.3, title, color=colour)
    for place, (i, score, text) in enumerate(zip(ids, scores, explorer.examples.texts("train", ids), strict=True)):
        top = 0.55 + 0.34 * place
        say(ax, left, top, f"{score}  {explorer.examples.words('train', i)}  #{i}", color=QUIET, fontsize=7)
        say(ax, left, top + 0.14, textwrap.shorten(text, 76, placeholder=" \u2026"))


def say(ax, x, y, text, **how):
    ax.text(x, y, text, **{"fontsize": 8, "color": INK, "va": "top", "parse_math": False, **how})


def show(ax, pixels, x, y, size):
    ax.imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=255, extent=(x, x + size, y + size, y), aspect="auto",
              interpolation="nearest")
