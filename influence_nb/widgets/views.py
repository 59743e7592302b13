"""The views of an explorer or a what-if, with the arrays that go to the browser once."""

from uuid import uuid4

from ipywidgets import Widget
from traitlets import Bytes

from influence_nb.widgets.gallery import Gallery
from influence_nb.widgets.pointcloud import PointCloud, packed
from influence_nb.widgets.state import DEPTH

PRELOADED = 3_000_000  # bytes of training thumbnails that travel at once; the others are asked for by id


def map_and_gallery(answers, examples, test_ids, train_xy, test_xy, preload, **how):
    """With `preload`, the strongest neighbours of all test points are in the map."""
    names = list(answers.methods)
    given = [preload and answers.given(name) for name in names]
    ids, values = answers.preload(test_ids if any(given) else [])
    units = [answers.methods[name].unit if answers.given(name) else None for name in names]
    side_names, side_titles = map(list, zip(*map(answers.sides, units), strict=True))
    common = {"source": uuid4().hex, "side_names": side_names, **how}
    packed_ids = packed(test_ids, "i4")
    cloud = PointCloud(name="map", legend=True, test_ids=packed_ids, train_xy=train_xy, test_xy=test_xy, depth=DEPTH,
                       preloaded=given, topk_ids=packed(ids, "i4"), topk_scores=packed(values, "f4"), **common)
    labels = {f"{layer}_label": packed(examples.label[layer], "u2") for layer in ("train", "test")}
    predictions = {f"{layer}_predicted": packed(examples.predicted[layer], "u2") for layer in ("train", "test")}
    gallery = Gallery(side_titles=side_titles, classes=examples.classes, test_ids=packed_ids,
                      test_loss=packed(examples.loss, "f4"), loss_unit=examples.loss_unit, picture_shape=examples.shape,
                      **labels, **predictions, **examples.pictures("train", examples.nearest(ids, PRELOADED)),
                      **examples.pictures("test", test_ids), **common)
    return cloud, gallery


def views(answers, examples, test_ids, train_xy, test_xy, preload):
    """Map, scatter and gallery of an explorer."""
    cloud, gallery = map_and_gallery(answers, examples, test_ids, train_xy, test_xy, preload)
    scatter = PointCloud(name="scatter", x_label="distance", y_label="score", source=cloud.source,
                         side_names=cloud.side_names)
    return cloud, scatter, gallery


def close(*widgets) -> None:
    """Close widgets and all that their traits hold: layouts, styles, children. Their arrays are dropped."""
    for widget in widgets:
        if isinstance(widget, (tuple, list)):
            close(*widget)
        elif isinstance(widget, Widget) and widget.comm is not None:
            widget.unobserve_all()
            widget.close()
            close(*(getattr(widget, name) for name in widget.keys))
            for name in widget.traits(sync=True):
                if isinstance(widget.traits()[name], Bytes):
                    setattr(widget, name, b"")
