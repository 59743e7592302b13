"""Click a test point; see which training examples helped and harmed its prediction."""

import threading
import time
from pathlib import Path

import ipywidgets as w
import numpy as np
from traitlets import link

from influence_nb.widgets import export, picture
from influence_nb.widgets.answers import Answers
from influence_nb.widgets.controls import toolbar
from influence_nb.widgets.correlation import caption
from influence_nb.widgets.ellipses import ellipses
from influence_nb.widgets.examples import Examples
from influence_nb.widgets.fixedmap import FixedMap
from influence_nb.widgets.maps import Maps
from influence_nb.widgets.pointcloud import PALETTE, packed, points
from influence_nb.widgets.state import ExplorerState
from influence_nb.widgets.views import close, views

RIGHT_WRONG = ["#8FA3B5", "#D55E00"]


class Explorer(w.VBox):
    """A map of the training set with test points over it. Choosing a test point highlights its most helpful and most
    harmful training examples, on the map, in a scatter of score against distance, with their correlation under it, and
    in a gallery. Layer, distance, projection and its number of neighbours can be chosen; classes can have ellipses.

    Args:
        task: a Task of classes.
        methods: {name: Scores, or a fitted method with .scores(split)}; the first is shown first.
        embedding: an Atlas, or a pair of arrays (train_xy [n_train, 2], test_xy [n_test, 2]).
        test_ids: the test points shown; left out, those that the Scores hold, or the model's mistakes.
        k: neighbours a side, 1 to 25.
        preload: send the strongest neighbours of all test points to the browser at once, so that a click is answered
            there, also while the kernel works. False: each click asks the kernel.

    Raises:
        TypeError, ValueError: targets are no classes, scores of another task, test points without scores, an embedding
            of another length.
    """

    def __init__(self, task, methods, embedding, test_ids=None, k=10, preload=True):
        self.task, self.answers = task, Answers(task, methods)
        self.test_ids = self.answers.shown(test_ids)
        self.atlas = atlas = embedding if hasattr(embedding, "place") else FixedMap(embedding, task, self.test_ids)
        self.examples = Examples(task, self.test_ids)
        ranges = {name: found for name in atlas.projections if (found := atlas.near(name))}
        self.state = ExplorerState(self.test_ids, len(task.train), self.examples.classes, methods, atlas.layers,
                                   atlas.projections, atlas.distances, self.answers.fingerprint, ranges)
        self.lock = threading.RLock()
        self.maps = Maps(atlas, self.state, self.lock, len(task.train), self.test_ids, self._arrived, self._working)
        self.matched = ""  # how many points the filters leave, in words
        self.map, self.scatter, self.gallery = views(self.answers, self.examples, self.test_ids,
                                                     *self.maps.places(self.maps.shown), preload)
        self.toolbar, self.controls = toolbar(self.state, self.cancel)
        plots = w.HBox([self.map, self.scatter])
        plots.add_class("inb-plots")
        super().__init__([self.toolbar, plots, self.gallery])
        self.add_class("inb-explorer")
        self._bind()
        self._colour()
        self.map.title = self.maps.title()
        self.state.k = k
        self.state.test_id = self.test_ids[int(self.examples.groups("correct")["test"].argmax())]  # the first mistake
        self.state.forget()

    # what a reader asks of it
    @property
    def test_id(self):
        """The test point shown; set it to show another one."""
        return self.state.test_id

    @test_id.setter
    def test_id(self, test_id):
        self.select(test_id)

    @property
    def helpful(self) -> list[int]:
        """Ids of the most helpful training examples of the test point shown, most helpful first."""
        return list(self.state.helpful)

    @property
    def harmful(self) -> list[int]:
        """Ids of the most harmful training examples of the test point shown, most harmful first."""
        return list(self.state.harmful)

    @property
    def selected(self) -> list[int]:
        """Ids of the training examples chosen by lasso or click; set it to choose others."""
        return list(self.state.selected)

    @selected.setter
    def selected(self, ids):
        self.state.selected = [int(i) for i in ids]

    def select(self, test_id) -> None:
        """Show test point `test_id`, as a click on it does."""
        self.state.test_id = None if test_id is None else int(test_id)

    def figure(self):
        """The present state as a matplotlib Figure: map, scatter, and the gallery's two rows."""
        return picture.figure(self)

    def export_html(self, path) -> Path:
        """Write one page that answers clicks without a kernel and without a network; the path it was written to."""
        return export.write(self, path)

    def save(self, path) -> Path:
        """Write the state, without data, to `path` as JSON."""
        path = Path(path)
        path.write_text(self.state.to_json(), encoding="utf-8")
        return path

    def load(self, path) -> None:
        """Take over the state in `path`; ValueError where it is damaged or of another task, and nothing is changed."""
        self.state.from_json(Path(path).read_bytes())

    def cancel(self) -> None:
        """Give up the map that is being computed and go back to the one shown."""
        with self.lock:
            if self.map.busy:
                self.maps.give_up()

    def close(self) -> None:
        """Take the explorer off the page, end its thread and let go of its arrays; it is of no use afterwards."""
        if self.comm is None:
            return
        with self.lock:
            self.maps.close()
            self.state.unobserve_all()
            self.answers.cache.clear()
            close(self.map, self.scatter, self.gallery, self.toolbar, *self.links, *self.children)
        super().close()

    def _repr_mimebundle_(self, **kwargs):
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is not None:
            bundle["image/png"] = picture.png(self)
        return bundle

    # state -> views -> state
    def _bind(self):
        state, c = self.state, self.controls
        self.links = [w.jslink((self.map, "selected"), (view, "selected")) for view in (self.scatter, self.gallery)]
        self.links += [w.jsdlink((source, name), (view, target)) for source, name, view, target in (
            (self.map, "answer", self.scatter, "answer"), (self.map, "answer", self.gallery, "answer"),
            (self.map, "pinned", self.gallery, "pinned"), (self.map, "pinned_answer", self.gallery, "pinned_answer"),
            (c.method, "index", self.map, "method"), (c.k, "value", self.map, "k"),
            (c.ellipses, "value", self.map, "ellipses"), (c.lasso, "value", self.map, "lasso"),
            (c.lasso, "value", self.scatter, "lasso"))]
        link((state, "test_id"), (self.map, "test_id"))
        link((state, "pinned"), (self.map, "pinned"))
        for view in (self.map, self.scatter, self.gallery):
            view.on_msg(self._asked)
        on = lambda names, act: state.observe(self._locked(act), names)  # noqa: E731
        on(["test_id", "method", "k"], self._answer)
        on(["pinned", "method", "k"], self._answer_pinned)
        on(["test_id", "method", "metric"], self._points)
        on(["layer", "projection", "near"], self.maps.ask)
        on(["colour_by"], self._colour)
        on(["class_filter", "misclassified_only", "search"], self._filter)
        on(["ellipses"], lambda: setattr(self.map, "ellipses", state.ellipses))
        on(["selected"], self._correlate)
        on(["search"], self._found)
        on(["selected"], lambda: setattr(self.map, "selected", packed(state.selected, "i4")))
        on(["status"], lambda: setattr(self.map, "note", state.status))
        self.map.observe(self._locked(self._selected), "selected")

    def _locked(self, act):
        def handler(_):
            with self.lock:
                act()
        return handler

    def _answer(self):
        state = self.state
        try:
            answer = self.answers.top(state.method, state.test_id, state.k) if state.test_id is not None else {}
        except Exception as error:  # nothing of another test point may stay on the screen
            state.helpful, state.harmful, self.map.answer = [], [], {}
            state.status = f"{state.method} failed for test point {state.test_id}: {error}"
            self._no_points(state.status)
            raise
        state.helpful, state.harmful = answer.get("helpful", []), answer.get("harmful", [])
        with self.map.hold_sync():
            self.map.method, self.map.k = list(self.answers.methods).index(state.method), state.k
            self.map.answer = answer
        time.sleep(0.003)  # the thread that sends gets its turn before the scatter's arrays are computed

    def _answer_pinned(self):
        state = self.state
        self.map.pinned_answer = {} if state.pinned is None else self.answers.top(state.method, state.pinned, state.k)

    def distance(self, test_id, layer=None, metric=None) -> np.ndarray:
        """Distances float32 [n_train] to a test point, in the layer and metric shown, or those given."""
        layer, metric = self.maps.shown[0] if layer is None else layer, metric or self.state.metric
        return np.asarray(self.atlas.distance(layer, metric, test_id), dtype=np.float32)

    def _points(self):
        state, scatter = self.state, self.scatter
        if state.test_id is None:
            return self._no_points("choose a test point")
        owner = f"{state.test_id}/{self.map.method}"
        try:
            xy = np.stack([self.distance(state.test_id), self.answers.row(state.method, state.test_id)], 1)
        except Exception as error:
            self._no_points(f"{state.metric} distance failed: {error}", owner)
            raise
        with scatter.hold_sync():
            scatter.train_xy, scatter.owner, scatter.note = packed(xy, "f4"), owner, ""
            scatter.x_label = self.atlas.distance_label(state.metric)
            scatter.y_label = f"{state.method} ({self.answers.scores(state.method, state.test_id).unit})"
            scatter.title = f"{state.method} against distance"
            self._correlate()

    def _no_points(self, why, owner=""):
        with self.scatter.hold_sync():
            self.scatter.train_xy, self.scatter.owner, self.scatter.note = b"", owner, why
            self.scatter.title = "Score against distance"
            self._correlate()

    def _correlate(self):
        self.scatter.caption = caption(points(self.scatter.train_xy), self.state.selected)

    def _selected(self):
        self.state.selected = np.frombuffer(self.map.selected, "<i4").tolist()

    def _colour(self):
        by, groups = self.state.colour_by, self.examples.groups(self.state.colour_by)
        for view in (self.map, self.scatter):
            with view.hold_sync():
                view.palette = RIGHT_WRONG if by == "correct" else PALETTE
                view.class_names = ["correct", "mistaken"] if by == "correct" else self.examples.classes
                view.train_class = packed(groups["train"], "u2")
                view.test_class = packed(groups["test"], "u2") if view is self.map else b""
        self._outline()

    def centres(self) -> np.ndarray:
        """Centre and ellipse of the points of each colour on the map, [colours, 6] as from `ellipses`."""
        return ellipses(points(self.map.train_xy), np.frombuffer(self.map.train_class, "<u2"))

    def _outline(self):
        rows, hidden = self.centres(), np.frombuffer(self.map.train_hidden, "u1")
        if len(hidden):  # a colour with no point left has no ellipse either
            rows = rows[np.isin(rows[:, 0], np.frombuffer(self.map.train_class, "<u2")[hidden == 0])]
        self.map.centres = packed(rows, "f4")

    # filters: what does not match is faint, and cannot be picked
    def _filter(self):
        state, masks = self.state, self.examples.matches(self.state)
        n_train, n_test = int(masks["train"].sum()), int(masks["test"].sum())
        hidden = {layer: b"" if mask.all() else packed(~mask, "u1") for layer, mask in masks.items()}
        self.map.train_hidden, self.map.test_hidden = hidden["train"], hidden["test"]
        self.scatter.train_hidden = hidden["train"]
        self._outline()
        filtered = state.search or state.class_filter or state.misclassified_only
        self.matched = f"{n_test} test, {n_train} training points match" if filtered else ""
        state.status = self.matched

    def _found(self):
        """A search that leaves one test point shows it; one that is taken back or loaded does not."""
        matches = self.examples.matches(self.state)["test"]
        if self.state.search and not self.state.replaying and matches.sum() == 1:
            self.state.test_id = self.test_ids[int(matches.argmax())]

    def _arrived(self, train_xy, test_xy):
        with self.map.hold_sync():
            self.map.train_xy, self.map.test_xy, self.map.title = train_xy, test_xy, self.maps.title()
            self._outline()
        self._points()

    def _working(self, status):
        self.map.busy = bool(status)
        self.controls.cancel.layout.display = None if status else "none"
        self.state.status = status or self.matched

    def _asked(self, view, message, buffers):
        self.examples.send(view, message)
