"""Click a test point; see which training examples helped and harmed its prediction."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ipywidgets as w
import numpy as np
from traitlets import link

from influence_nb.widgets import export, picture
from influence_nb.widgets.answers import Answers
from influence_nb.widgets.controls import toolbar
from influence_nb.widgets.examples import Examples
from influence_nb.widgets.fixedmap import FixedMap, placed
from influence_nb.widgets.pointcloud import PALETTE, packed
from influence_nb.widgets.state import ExplorerState
from influence_nb.widgets.views import views

RIGHT_WRONG = ["#8FA3B5", "#D55E00"]


class Explorer(w.VBox):
    """A map of the training set with test points over it. Choosing a test point highlights its most helpful and most
    harmful training examples, on the map, in a scatter of score against distance and in a gallery.

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
        self.state = ExplorerState(self.test_ids, len(task.train), self.examples.classes, methods, atlas.layers,
                                   atlas.projections, atlas.distances, self.answers.fingerprint)
        self.lock, self.worker, self.job = threading.RLock(), ThreadPoolExecutor(1, "map"), 0
        self.shown = (self.state.layer, self.state.projection)  # what is on the map, while another one is computed
        self.matched = ""  # how many points the filters leave, in words
        places = self._placed(*self.shown)
        self.map, self.scatter, self.gallery = views(self.answers, self.examples, self.test_ids, *places, preload)
        self.toolbar, self.controls = toolbar(self.state, self.cancel)
        plots = w.HBox([self.map, self.scatter])
        plots.add_class("inb-plots")
        super().__init__([self.toolbar, plots, self.gallery])
        self.add_class("inb-explorer")
        self._bind()
        self._colour()
        self.map.title = self._map_title()
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
            if not self.map.busy:
                return
            self.job += 1
            self._working("")
            self.state.withdraw(layer=self.shown[0], projection=self.shown[1])

    def _repr_mimebundle_(self, **kwargs):
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is not None:
            bundle["image/png"] = picture.png(self)
        return bundle

    def _placed(self, layer, projection):
        return placed(self.atlas, layer, projection, len(self.task.train), self.test_ids)

    # state -> views -> state
    def _bind(self):
        state, c = self.state, self.controls
        for other in (self.scatter, self.gallery):
            w.jslink((self.map, "selected"), (other, "selected"))
            w.jsdlink((self.map, "answer"), (other, "answer"))
        w.jsdlink((self.map, "pinned"), (self.gallery, "pinned"))
        w.jsdlink((self.map, "pinned_answer"), (self.gallery, "pinned_answer"))
        w.jsdlink((c.method, "index"), (self.map, "method"))
        w.jsdlink((c.k, "value"), (self.map, "k"))
        w.jsdlink((c.lasso, "value"), (self.map, "lasso"))
        w.jsdlink((c.lasso, "value"), (self.scatter, "lasso"))
        link((state, "test_id"), (self.map, "test_id"))
        link((state, "pinned"), (self.map, "pinned"))
        for view in (self.map, self.scatter, self.gallery):
            view.on_msg(self._asked)
        on = lambda names, act: state.observe(self._locked(act), names)  # noqa: E731
        on(["test_id", "method", "k"], self._answer)
        on(["pinned", "method", "k"], self._answer_pinned)
        on(["test_id", "method", "metric"], self._points)
        on(["layer", "projection"], self._move)
        on(["colour_by"], self._colour)
        on(["class_filter", "misclassified_only", "search"], self._filter)
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
            self.scatter.train_xy, self.scatter.owner = b"", ""
            self.scatter.note = state.status = f"{state.method} failed for test point {state.test_id}: {error}"
            raise
        state.helpful, state.harmful = answer.get("helpful", []), answer.get("harmful", [])
        with self.map.hold_sync():
            self.map.method, self.map.k = list(self.answers.methods).index(state.method), state.k
            self.map.answer = answer
        time.sleep(0.003)  # the thread that sends gets its turn before the scatter's arrays are computed

    def _answer_pinned(self):
        state = self.state
        self.map.pinned_answer = {} if state.pinned is None else self.answers.top(state.method, state.pinned, state.k)

    def distance(self, test_id) -> np.ndarray:
        """Distances float32 [n_train] of the training examples to a test point, in the layer and metric shown."""
        return np.asarray(self.atlas.distance(self.shown[0], self.state.metric, test_id), dtype=np.float32)

    def _points(self):
        state, scatter = self.state, self.scatter
        with scatter.hold_sync():
            scatter.note = "" if state.test_id is not None else "choose a test point"
            if state.test_id is None:
                scatter.train_xy, scatter.owner, scatter.title = b"", "", "Score against distance"
                return
            xy = np.stack([self.distance(state.test_id), self.answers.row(state.method, state.test_id)], 1)
            scatter.train_xy = packed(xy, "f4")
            scatter.owner = f"{state.test_id}/{self.map.method}"
            scatter.x_label = self.atlas.distance_label(state.metric)
            scatter.y_label = f"{state.method} ({self.answers.scores(state.method, state.test_id).unit})"
            scatter.title = f"{state.method} against distance"

    def _selected(self):
        self.state.selected = np.frombuffer(self.map.selected, "<i4").tolist()

    def _map_title(self):
        if isinstance(self.atlas, FixedMap):
            return "Map"
        layer, projection = self.shown
        return f"Map: {projection} of {layer}"

    def _colour(self):
        by, groups = self.state.colour_by, self.examples.groups(self.state.colour_by)
        for view in (self.map, self.scatter):
            with view.hold_sync():
                view.palette = RIGHT_WRONG if by == "correct" else PALETTE
                view.class_names = ["correct", "mistaken"] if by == "correct" else self.examples.classes
                view.train_class = packed(groups["train"], "u2")
                view.test_class = packed(groups["test"], "u2") if view is self.map else b""

    # filters: what does not match is faint, and cannot be picked
    def _filter(self):
        state, masks = self.state, self.examples.matches(self.state)
        n_train, n_test = int(masks["train"].sum()), int(masks["test"].sum())
        hidden = {layer: b"" if mask.all() else packed(~mask, "u1") for layer, mask in masks.items()}
        self.map.train_hidden, self.map.test_hidden = hidden["train"], hidden["test"]
        self.scatter.train_hidden = hidden["train"]
        filtered = state.search or state.class_filter or state.misclassified_only
        self.matched = f"{n_test} test, {n_train} training points match" if filtered else ""
        state.status = self.matched

    def _found(self):
        """A search that leaves one test point shows it; one that is taken back or loaded does not."""
        matches = self.examples.matches(self.state)["test"]
        if self.state.search and not self.state.replaying and matches.sum() == 1:
            self.state.test_id = self.test_ids[int(matches.argmax())]

    # maps are computed in one worker thread; the latest wish counts
    def _move(self):
        self.job += 1
        wish = (self.state.layer, self.state.projection)
        if wish == self.shown:
            return self._working("")
        self._working(f"computing {wish[1]} of {wish[0]}")
        self.worker.submit(self._compute, self.job, wish)

    def _compute(self, job, wish):
        if job != self.job:
            return
        try:
            train_xy, test_xy = self._placed(*wish)
            if self.state.test_id is not None:
                self.atlas.distance(wish[0], self.state.metric, self.state.test_id)  # embeds, so that a click need not
        except Exception as error:  # shown where the reader looks: this thread has nobody to raise to
            with self.lock:
                if job == self.job:
                    self.cancel()
                    self.state.status = f"{wish[1]} of {wish[0]} failed: {error}"
            return
        with self.lock:
            if job != self.job:
                return
            self.shown = wish
            with self.map.hold_sync():
                self.map.train_xy, self.map.test_xy = train_xy, test_xy
                self.map.title = self._map_title()
            self._working("")
            self._points()

    def _working(self, status):
        self.map.busy = bool(status)
        self.controls.cancel.layout.display = None if status else "none"
        self.state.status = status or self.matched

    def _asked(self, view, message, buffers):
        self.examples.send(view, message)
