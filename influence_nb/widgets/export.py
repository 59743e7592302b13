"""One page that answers clicks without a kernel and without a network: the same modules, with the data beside them."""

import base64
import json
import re
import zlib
from pathlib import Path

import numpy as np

from influence_nb.widgets.pointcloud import module, packed, source
from influence_nb.widgets.state import DEPTH

DENSE = 8_000_000  # bytes up to which the page holds the scatter's points of every training example
PICTURES = 24_000_000  # bytes of thumbnails, before compression
BLANK = {"train_hidden": b"", "test_hidden": b"", "hover": "", "note": ""}


def write(explorer, path) -> Path:
    """Write the page of `explorer` to `path`.

    It holds the map shown, the DEPTH strongest neighbours of every test point and method, their thumbnails and texts.
    The scatter has all training examples, in 16 bits, where that takes at most 8 MB; else the neighbours alone, and
    says so.
    """
    answers, examples, ids = explorer.answers, explorer.examples, explorer.test_ids
    scores = {name: answers.complete(name, ids) for name in answers.methods}
    near, values = answers.preload(ids, scores)
    with explorer.lock:
        views = {name: traits(getattr(explorer, name)) for name in ("map", "scatter", "gallery")}
    views["map"] |= {"preloaded": [True] * len(scores), "depth": DEPTH, "topk_ids": packed(near, "i4"),
                     "topk_scores": packed(values, "f4"), "busy": False, "lasso": False}
    for view in views.values():  # the page has no filters, and nothing is under the pointer
        view |= {name: blank for name, blank in BLANK.items() if name in view}
    units = [answers.sides(one.unit) for one in scores.values()]
    for view in views.values():
        view["side_names"] = [names for names, _ in units]
    views["gallery"] |= {"side_titles": [titles for _, titles in units], **examples.pictures("test", ids),
                         **examples.pictures("train", examples.nearest(near, PICTURES))}
    distances = np.stack([explorer.distance(i) for i in ids])  # [n_test, n_train]
    data = {**views, "methods": list(scores), "y_labels": [f"{name} ({one.unit})" for name, one in scores.items()]}
    if 2 * distances.size * (1 + len(scores)) <= DENSE:
        values = [np.stack([np.float32(one.row(i).detach().cpu()) for i in ids]) for one in scores.values()]
        columns = np.stack([distances, *values], 1)  # [n_test, 1 + n_methods, n_train]
        low, high = columns.min(2), columns.max(2)  # [n_test, 1 + n_methods]
        scaled = (columns - low[..., None]) / np.maximum(high - low, 1e-30)[..., None] * 65535
        data["points"] = {"columns": packed(np.rint(scaled), "u2"), "ranges": packed(np.stack([low, high], -1), "f4"),
                          "count": columns.shape[1]}
    else:
        found = distances[np.arange(len(ids))[None, :, None, None], np.maximum(near, 0)]
        data["points"] = {"distances": packed(found, "f4")}
        views["scatter"]["note"] = f"this page holds the {DEPTH} strongest a side only"
    block = bytearray()
    text = json.dumps(lifted(data, block)).replace("<", "\\u003c")
    page = {"style": source("style.css"), "depth": str(DEPTH), "data": text, "script": script(),
            "block": base64.b64encode(zlib.compress(bytes(block), 6)).decode()}
    path = Path(path)
    path.write_text(re.sub(r"\{\{(\w+)\}\}", lambda slot: page[slot[1]], source("page.html")), encoding="utf-8")
    return path


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
