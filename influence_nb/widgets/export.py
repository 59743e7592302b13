"""One page that answers clicks without a kernel and without a network: the same modules, with the data beside them."""

import base64
import json
import re
import zlib
from pathlib import Path

import numpy as np

from influence_nb.widgets.correlation import caption
from influence_nb.widgets.pointcloud import module, packed, source
from influence_nb.widgets.state import DEPTH

DENSE = 8_000_000  # bytes up to which the page holds the scatter's points of every training example
PICTURES = 24_000_000  # bytes of thumbnails, before compression
BLANK = {"train_hidden": b"", "test_hidden": b"", "hover": "", "note": ""}


def write(explorer, path) -> Path:
    """Write the page of `explorer` to `path`.

    It holds the map shown, the DEPTH strongest neighbours of every test point and method, their thumbnails and texts,
    and the correlation of score and distance over all training examples. The scatter has all training examples, in 16
    bits, where that takes at most 8 MB; else the neighbours alone, and says so. Memory: one test point's at a time.
    """
    answers, examples, ids = explorer.answers, explorer.examples, explorer.test_ids
    scores = {name: answers.complete(name, ids) for name in answers.methods}
    near, values = answers.preload(ids, scores)
    with explorer.lock:
        views = {name: traits(getattr(explorer, name)) for name in ("map", "scatter", "gallery")}
        views["map"]["centres"] = packed(explorer.centres(), "f4")  # of all classes, whatever the filter
        layer, metric = explorer.maps.shown[0], explorer.state.metric  # which a reader may change meanwhile
    views["map"] |= {"preloaded": [True] * len(scores), "depth": DEPTH, "topk_ids": packed(near, "i4"),
                     "topk_scores": packed(values, "f4"), "busy": False, "lasso": False}
    for view in views.values():  # the page has no filters, and nothing is under the pointer
        view |= {name: blank for name, blank in BLANK.items() if name in view}
    units = [answers.sides(one.unit) for one in scores.values()]
    for view in views.values():
        view["side_names"] = [names for names, _ in units]
    views["gallery"] |= {"side_titles": [titles for _, titles in units], **examples.pictures("test", ids),
                         **examples.pictures("train", examples.nearest(near, PICTURES))}
    data = {**views, "methods": list(scores), "y_labels": [f"{name} ({one.unit})" for name, one in scores.items()]}
    dense = 2 * len(ids) * len(explorer.task.train) * (1 + len(scores)) <= DENSE
    rows = [told(explorer.distance(i, layer, metric), [one.row(i) for one in scores.values()], near[:, at], dense)
            for at, i in enumerate(ids)]
    *parts, data["captions"] = map(list, zip(*rows, strict=True))
    if dense:
        columns, ranges = map(np.stack, parts)
        data["points"] = {"columns": packed(columns, "u2"), "ranges": packed(ranges, "f4"), "count": columns.shape[1]}
    else:
        data["points"] = {"distances": packed(np.stack(parts[0], 1), "f4")}
        views["scatter"]["note"] = f"this page holds the {DEPTH} strongest a side only"
    block = bytearray()
    text = json.dumps(lifted(data, block)).replace("<", "\\u003c")
    page = {"style": source("style.css"), "depth": str(DEPTH), "data": text, "script": script(),
            "block": base64.b64encode(zlib.compress(bytes(block), 6)).decode()}
    path = Path(path)
    path.write_text(re.sub(r"\{\{(\w+)\}\}", lambda slot: page[slot[1]], source("page.html")), encoding="utf-8")
    return path


def told(distance, scores, near, dense) -> tuple:
    """What the scatter shows of one test point, and its captions, one a method.

    Args:
        distance: [n_train].
        scores: for each method, [n_train].
        near: ids [n_methods, 2, DEPTH].

    Returns:
        (columns, ranges, captions): distance and scores uint16 [1 + n_methods, n_train] as shares of their ranges
        [1 + n_methods, 2]; where not dense, (distances, captions): those of `near`.
    """
    columns = np.stack([distance, *(np.float32(row.detach().cpu()) for row in scores)])
    captions = [caption(np.stack([distance, row], 1)) for row in columns[1:]]
    if not dense:
        return distance[np.maximum(near, 0)], captions
    low, high = columns.min(1), columns.max(1)
    shares = (columns - low[:, None]) / np.maximum(high - low, 1e-30)[:, None]
    return np.rint(shares * 65535).astype(np.uint16), np.stack([low, high], 1), captions


def traits(view) -> dict:
    """The synced traits of a widget that its module reads."""
    return {name: value for name, value in view.get_state().items()
            if not name.startswith("_") and name not in ("layout", "tabbable", "tooltip")}


def lifted(value, block: bytearray):
    """`value` with its arrays moved into `block`, each at a multiple of 8 bytes."""
    if isinstance(value, (bytes, memoryview)):
        block.extend(b"\0" * (-len(block) % 8))
        start = len(block)
        block.extend(value)
        return {"$bytes": [start, len(value)]}
    if isinstance(value, dict):
        return {name: lifted(item, block) for name, item in value.items()}
    return [lifted(item, block) for item in value] if isinstance(value, (list, tuple)) else value


def script() -> str:
    """The modules as one script: each in a function of its own, and the page's start."""
    def enclosed(name):
        text = re.sub(r"^export default ", "return ", module(name), flags=re.M)
        return "(() => {\n" + re.sub(r"^export ", "", text, flags=re.M) + "\n})()"
    return (f"const views = {{ cloud: {enclosed('pointcloud.js')},\ngallery: {enclosed('gallery.js')} }};\n"
            f"{source('page.js')}\nstart(views, document.querySelector('main'));")
