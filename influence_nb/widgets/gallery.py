"""The gallery as a Jupyter widget; it carries what all views of an explorer know about its examples."""

import anywidget
from traitlets import Bool, Dict, Int, List, Unicode

from influence_nb.widgets.pointcloud import PALETTE, module, raw, source


class Gallery(anywidget.AnyWidget):
    """The test point and the training examples that helped and harmed it, as cards."""

    _esm = module("gallery.js")
    _css = source("style.css")

    source = Unicode().tag(sync=True)
    classes = List(Unicode()).tag(sync=True)
    palette = List(Unicode(), PALETTE).tag(sync=True)
    test_ids = raw()  # int32 [n_test]
    train_label, train_predicted, test_label, test_predicted = raw(), raw(), raw(), raw()  # uint16 class numbers
    test_loss = raw()  # float32 [n_test]
    loss_unit = Unicode().tag(sync=True)
    picture_shape = List(Int()).tag(sync=True)  # [height, width, channels]; empty where examples are no images
    train_picture_ids, test_picture_ids = raw(), raw()  # int32, whose thumbnails and texts are preloaded
    train_pictures, test_pictures = raw(), raw()  # uint8 [len(ids), height, width, channels]
    train_texts = List(Unicode()).tag(sync=True)
    test_texts = List(Unicode()).tag(sync=True)

    answer = Dict().tag(sync=True)
    pinned = Int(None, allow_none=True).tag(sync=True)
    pinned_answer = Dict().tag(sync=True)
    side_names = List().tag(sync=True)  # by method, [helpful, harmful]
    side_titles = List().tag(sync=True)
    headline = Unicode("").tag(sync=True)  # empty: the answer in words
    hover = Unicode("").tag(sync=True, echo_update=False)
    collect = Bool(False).tag(sync=True)  # the cards are the selection, and a click takes one out of it
    selected = raw()
