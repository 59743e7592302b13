"""A label audit's present state as a still picture, for pages that run no kernel."""

import io
import textwrap

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from influence_nb.widgets.auditstate import tally
from influence_nb.widgets.picture import CARD, HARMFUL, INK, QUIET, say, show

ACROSS, ROWS, TALL = 8, 2, 1.68  # examples in the order of suspicion, the one shown first; inches of a row of pictures


def png(audit) -> bytes:
    """Its `figure()` as PNG of few colours."""
    canvas, file = audit.figure().canvas, io.BytesIO()
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    image.quantize(64, dither=Image.Dither.NONE).save(file, "PNG")
    return file.getvalue()


def figure(audit) -> Figure:
    """The example shown, those that come after it in the order of suspicion, and what was decided on them."""
    state = audit.state
    at = state.order.index(state.shown)
    ids, decided = state.order[at:at + ACROSS * ROWS], state.final()
    images = bool(audit.desk.picture_shape)
    height = 0.7 + (TALL * ROWS if images else 0.24 * len(ids)) + 0.2 * len(audit.history)
    fig = Figure((11, height), dpi=100, facecolor=CARD)
    FigureCanvasAgg(fig)
    ax = fig.add_axes((0, 0, 1, 1))
    ax.axis("off")
    say(ax, 0.2, 0.12, f"{tally(decided, len(state.order))}. From place {at + 1}, by {audit.by}:",
        fontsize=10, fontweight="bold")
    for place, i in enumerate(ids):
        words, colour = caption(audit, i, decided.get(i))
        if images:
            x, y = 0.2 + 1.35 * (place % ACROSS), 0.5 + TALL * (place // ACROSS)
            show(ax, audit.thumbnails([i])[0], x, y, 1.1)
            for line, text in enumerate(words):
                say(ax, x, y + 1.14 + 0.15 * line, text, fontsize=7.5, color=QUIET if line == 2 else colour)
        else:
            y = 0.5 + 0.24 * place
            say(ax, 0.2, y, "  ".join(words), fontsize=7.5, color=colour)
            say(ax, 3.6, y, textwrap.shorten(audit.words([i])[0], 110, placeholder=" \u2026"))
    for line, text in enumerate(audit.told()):
        say(ax, 0.2, height - 0.2 * (len(audit.history) - line) - 0.1, text)
    ax.set(xlim=(0, 11), ylim=(height, 0), xticks=[], yticks=[])
    return fig


def caption(audit, i, event) -> tuple[list, str]:
    """Label, prediction or decision, and id of example i, in three lines; the colour of the first two."""
    label, predicted = (audit.classes[c] for c in (audit.state.labels[i], audit.predicted[i]))
    if event is None:
        return [label, f"\u2192 {predicted}" if label != predicted else "", f"#{i}"], INK
    after = "removed" if event["label"] is None else "kept" if event["decision"] == "keep" else (
        f"now {audit.classes[event['label']]}")
    return [label, after, f"#{i}"], QUIET if event["decision"] == "keep" else HARMFUL
