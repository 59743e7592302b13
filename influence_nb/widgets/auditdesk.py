"""The example that a label audit asks about, as a Jupyter widget, with what speaks for its label and against it."""

import anywidget
from traitlets import Dict, Int, List, Unicode

from influence_nb.widgets.auditstate import tally
from influence_nb.widgets.pointcloud import PALETTE, module, raw, source

KEYS = "0123456789abcdefghijlmnopqstvwxyz"  # of the classes, in order: k, r and u keep, remove and undo


class Desk(anywidget.AnyWidget):
    """The example to be decided on, with its neighbours, and the keys; see `laid` for the content."""

    _esm = module("audit.js")
    _css = source("style.css")

    content = Dict().tag(sync=True)
    pictures = raw()  # uint8 [1 + neighbours, height, width, channels], the example's own first
    picture_shape = List(Int()).tag(sync=True)  # empty where examples are no images
    classes = List(Unicode()).tag(sync=True)
    letters = Unicode(KEYS).tag(sync=True)
    palette = List(Unicode(), PALETTE).tag(sync=True)


def laid(audit) -> dict:
    """What a Desk shows of an audit: the example shown, its neighbours, what was decided, and what came of it."""
    state, i = audit.state, audit.state.shown
    decided, near = state.final(), neighbours(audit.scores, i, audit.k)
    ids, event = [i, *near["helpful"], *near["harmful"]], decided.get(i)
    words = dict(zip(ids, audit.words(ids) or [""] * len(ids)))

    def card(j):
        return {"id": j, "label": int(state.labels[j]), "predicted": int(audit.predicted[j]), "text": words[j]}

    content = {**card(i), "turn": state.turn, "place": state.order.index(i) + 1, "count": len(state.order),
               "score": f"{audit.by} {float(audit.suspicion[i]):.3g}", "decision": event and event["decision"],
               "after": event and event["label"], "tally": tally(decided, len(state.order)),
               "done": len(decided) == len(state.order), "titles": near["titles"], "error": state.error,
               "history": audit.told()}
    for side in ("helpful", "harmful"):
        content[side] = [{**card(j), "value": value} for j, value in zip(near[side], near[f"{side}_scores"])]
    return content


def neighbours(scores, i, k) -> dict:
    """The k training examples a side that speak most for and against the label of example i, itself left out."""
    if scores is None:
        return {"helpful": [], "helpful_scores": [], "harmful": [], "harmful_scores": [], "titles": []}
    top, found = scores.top(i, k + 1), {}
    for side in ("helpful", "harmful"):
        pairs = [(j, s) for j, s in zip(getattr(top, side), getattr(top, f"{side}_scores")) if j != i][:k]
        found |= {side: [j for j, _ in pairs], f"{side}_scores": [float(s) for _, s in pairs]}
    titles = ([f"For this label ({scores.unit})", f"Against it ({scores.unit})"] if scores.is_effect
              else [f"Highest: {scores.unit}", f"Lowest: {scores.unit}"])
    return {**found, "titles": titles}
