"""The point cloud and the gallery as Jupyter widgets: traits only, what they do is in the modules beside this file."""

import re
from pathlib import Path

import anywidget
import numpy as np
from traitlets import Bool, Bytes, Dict, Float, Int, List, Unicode

# Okabe and Ito's colours without black, and three more that keep their distance (CIE76 >= 16) under normal vision and
# simulated protanopia, deuteranopia and tritanopia, and are seen on white and on black.
PALETTE = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#7A3BE0", "#8A5A2B", "#A6DE8C"]


def source(name: str) -> str:
    """The text of a file beside this one."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def module(name: str, seen: set | None = None) -> str:
    """The ES module `name` with all modules that it imports from beside it, as one module's text."""
    seen = set() if seen is None else seen
    if name in seen:
        return ""
    seen.add(name)
    text = source(name)
    imports = re.compile(r'^import \{[^}]*\} from "\./([\w.]+)";\n', re.M)
    needed = "".join(module(other, seen) for other in imports.findall(text))
    return f"{needed}// {name}\n{imports.sub('', text)}"


def packed(values, dtype) -> bytes:
    """An array as little-endian bytes, the form in which it crosses to the browser."""
    return np.ascontiguousarray(values, dtype=np.dtype(dtype).newbyteorder("<")).tobytes()


def points(raw) -> np.ndarray:
    """Points float32 [n, 2] from the bytes in which they cross."""
    return np.frombuffer(raw, "<f4").reshape(-1, 2)


def raw(**tags) -> Bytes:
    """A synced array as bytes. What comes from the browser is a memoryview, which Bytes would refuse."""
    return Bytes(b"").tag(sync=True, from_json=lambda value, widget: bytes(value or b""), **tags)


class PointCloud(anywidget.AnyWidget):
    """Training and test points on canvases, used for the map and for the scatter. Ids of training points are rows."""

    _esm = module("pointcloud.js")
    _css = source("style.css")

    name = Unicode("map").tag(sync=True)
    source = Unicode().tag(sync=True)  # which explorer: its views share labels, thumbnails and texts
    title = Unicode().tag(sync=True)
    note = Unicode().tag(sync=True)
    caption = Unicode().tag(sync=True)  # a line under the plot
    stale = Unicode("waiting for the kernel").tag(sync=True)
    busy = Bool(False).tag(sync=True)
    legend = Bool(False).tag(sync=True)
    x_label = Unicode().tag(sync=True)  # empty: a map, with one scale and no axes
    y_label = Unicode().tag(sync=True)
    diagonal = Bool(False).tag(sync=True)  # x foretells y: one range for both axes, with the line y = x
    guess = Float(None, allow_none=True).tag(sync=True)  # x of the point to come
    kinds = List(Unicode(), ["training example", "test point"]).tag(sync=True)  # what the two layers hold
    train_names = raw()  # int32, the numbers that rows go by, over and over; empty = the row is the number
    # the points
    train_xy = raw()  # float32 [n_train, 2]
    test_xy = raw()  # float32 [n_test, 2]
    test_ids = raw()  # int32 [n_test]
    train_class, test_class = raw(), raw()  # uint16, an index into palette and class_names
    train_hidden, test_hidden = raw(), raw()  # uint8, 1 = filtered away; empty = none is
    palette = List(Unicode(), PALETTE).tag(sync=True)
    class_names = List(Unicode()).tag(sync=True)
    centres = raw()  # float32 [groups, 6] as from `ellipses`, drawn where `ellipses` is True
    ellipses = Bool(False).tag(sync=True)
    owner = Unicode().tag(sync=True)  # "test_id/method" whose points these are (scatter)
    # the question and its answer
    test_id = Int(None, allow_none=True).tag(sync=True)
    pinned = Int(None, allow_none=True).tag(sync=True)
    method = Int(0).tag(sync=True)
    k = Int(10).tag(sync=True)
    preloaded = List(Bool()).tag(sync=True)  # by method
    depth = Int(0).tag(sync=True)
    topk_ids, topk_scores = raw(), raw()  # int32 and float32 [methods, n_test, 2, depth]; id -1 where a side is shorter
    answer = Dict().tag(sync=True)
    pinned_answer = Dict().tag(sync=True)
    side_names = List().tag(sync=True)  # by method, [helpful, harmful]
    # linked with the other views
    hover = Unicode("").tag(sync=True, echo_update=False)  # "train 123", "test 6558" or ""
    selected = raw()  # int32 ids of training points
    lasso = Bool(False).tag(sync=True)
    collect = Bool(False).tag(sync=True)  # a click or a lasso adds to the selection
