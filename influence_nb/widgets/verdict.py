"""Predicted against actual in words and bars, and the table of all retrainings, as Jupyter widgets."""

import math

import anywidget
from traitlets import Dict, Int, List, Unicode

from influence_nb.widgets.pointcloud import module, source
from influence_nb.widgets.whatifstate import agreement, counted, seconds

MINUS, NONE = "\u2212", "\u2014"


class Verdict(anywidget.AnyWidget):
    """The test point's loss now, as predicted and as found by retraining, with bars; see `said` for the content."""

    _esm = module("verdict.js")
    _css = source("style.css")

    content = Dict().tag(sync=True)


class Runs(anywidget.AnyWidget):
    """The table of retrainings; a click on one sends {"recall": number}."""

    _esm = module("runs.js")
    _css = source("style.css")

    columns = List(Unicode()).tag(sync=True)
    rows = List().tag(sync=True)  # one dict a retraining: number, cells, doubt
    shown = Int(None, allow_none=True).tag(sync=True)


def said(state, examples, what, levels) -> dict:
    """What a Verdict shows of a state: a title, rows (name, change, texts), a line, a certificate, and doubts.

    `what` heads the column of changes. With `levels` the loss itself is shown too; of a measure only its drop is known.
    """
    test_id, n = state.test_id, len(state.removed)
    content = {"test_id": test_id, "removed": n, "predicted": state.predicted, "actual": state.actual, "rows": [],
               "doubts": [state.error] if state.error else [], "status": state.status}
    if test_id is None:
        return content | {"title": "Choose a test point on the map."}
    row = examples.row[test_id]
    loss, label = float(examples.loss[row]), examples.classes[examples.label["test"][row]]
    shares = levels and examples.loss_unit == "nats"
    columns = [what, *["loss"] * levels, *[f"probability of {label}"] * shares]

    def line(name, change, blank):
        value, known = loss + (change or 0.0), change is not None or name == "now"
        after = [*[plain(value)] * levels, *[share(value)] * shares] if known else [""] * (levels + shares)
        return {"name": name, "change": change, "texts": [blank if change is None else signed(change), *after]}

    whom = f"test point {test_id} ({examples.words('test', test_id)})"
    waiting = "retraining \u2026" if state.running and state.pending == set(state.removed) else "not yet retrained"
    rows = [line("now", None, ""), line("predicted", state.predicted, NONE), line("actual", state.actual, waiting)]
    content |= {"columns": columns, "rows": rows if n else rows[:1]}
    if not n:
        return content | {"title": f"Nothing removed yet: {whom}", "line": "Pick training examples: click them, draw a "
                          "lasso, or take the most helpful, the most harmful or random ones."}
    found, doubts = certified(state.history[state.shown - 1].certificate) if state.shown else ("", [])
    first = f"First order: the sum of {counted(n, 'score')}, as if each example were removed alone."
    if shares and loss + state.predicted < 0:
        first += " It foresees a loss below 0, which cannot be: too much is removed at once."
    return content | {"title": f"Without {'this example' if n == 1 else f'these {n} examples'}: {whom}",
                      "line": first, "certificate": found, "doubts": content["doubts"] + doubts}


def listed(state) -> list[dict]:
    """The rows of a table of all retrainings: for the test point shown, and how well all test points agree."""
    rows, row = [], state.row.get(state.test_id)
    for number, run in enumerate(state.history, 1):
        own = [NONE, NONE] if row is None else [signed(run.predicted[row]), signed(run.actual[row])]
        fit = agreement(run.predicted, run.actual)
        cells = [str(len(run.ids)), *own, f"{fit[1]:.4f}" if fit else NONE, f"{fit[2]:.2f}" if fit else NONE,
                 seconds(run.seconds)]
        rows.append({"number": number, "cells": cells, "doubt": "; ".join(certified(run.certificate)[1])})
    return rows


COLUMNS = ["", "removed", "predicted", "actual", "r, all", "slope, all", "took"]


def certified(certificate) -> tuple[str, list[str]]:
    """A retraining's certificate in words, and what speaks against it."""
    facts = {str(name).replace("_", " "): value for name, value in certificate.items()}
    doubts = [words for name, words in DOUBTS.items() if facts.get(name) is False]
    smallest = facts.get("smallest eigenvalue")
    doubts += ["it ended at a saddle, not at a minimum"] if smallest is not None and smallest < 0 else []
    told = {name: value for name, value in facts.items() if value is not False and name not in ASIDE}
    words = [name if value is True else f"{NAMES.get(name, name)} {number(value)}" for name, value in told.items()]
    return ("Retrained: " + ", ".join(words) + "." if words else ""), doubts


ASIDE = ("risk", "steps")  # facts that certify nothing
NAMES = {"gradient norm": "|gradient|"}
DOUBTS = {"converged": "the retraining did not converge: its numbers are not those of a minimum",
          "same basin": "the retraining ended in another basin: this is not the effect of these examples alone"}


def number(value) -> str:
    return value if isinstance(value, str) else f"{value:.3g}".replace("-", MINUS)


def signed(value) -> str:
    """ "+0.254", "-1.20e-05": three digits, as on the cards, with a true minus."""
    text = f"{value:+#.3g}".rstrip(".") if 1e-3 <= abs(value) < 1e3 else f"{value:+.2e}" if value else "0"
    return text.replace("-", MINUS)


def plain(value) -> str:
    return signed(value).removeprefix("+")


def share(loss) -> str:
    """The probability exp(-loss) in percent; a dash for a loss below 0, which has none."""
    return NONE if loss < 0 else f"{100 * math.exp(-loss):.3g} %"
