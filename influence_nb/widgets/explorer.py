"""Click a test point; see which training examples helped and harmed its prediction."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import ipywidgets as w
import numpy as np
from traitlets import link

from influence_nb.task import Task
from influence_nb.widgets import export, picture
from influence_nb.widgets.answers import Answers
from influence_nb.widgets.controls import toolbar
from influence_nb.widgets.gallery import Gallery
from influence_nb.widgets.pictures import picture_shape, pixel_range, texts, thumbnails
from influence_nb.widgets.pointcloud import PALETTE, PointCloud, packed
from influence_nb.widgets.state import DEPTH, ExplorerState

PRELOADED = 3_000_000  # bytes of training thumbnails that travel at once; the others are asked for by id
RIGHT_WRONG = ["#8FA3B5", "#D55E00"]


class FixedMap:
    """A map given as two arrays, where an Atlas would compute one. The distance is the one on the map."""

    layers, projections, distances = ["given map"], ["given"], ["on the map"]

    def __init__(self, train_xy, test_xy, n_train, n_test, test_ids):
        self.train_xy, test_xy = (np.asarray(a, dtype=np.float32) for a in (train_xy, test_xy))
        if self.train_xy.shape != (n_train, 2):
            raise ValueError(f"embedding[0] must be [n_train, 2] = ({n_train}, 2), got {self.train_xy.shape}")
        if test_xy.shape not in ((n_test, 2), (len(test_ids), 2)):
            raise ValueError(f"embedding[1] must be [n_test, 2] = ({n_test}, 2), or ({len(test_ids)}, 2) for the test points "
                             f"shown, got {test_xy.shape}")
        self.test_xy = test_xy[test_ids] if len(test_xy) == n_test else test_xy
        self.row = {i: row for row, i in enumerate(test_ids)}

    def place(self, layer, projection, test_ids):
        return self.train_xy, self.test_xy[[self.row[i] for i in test_ids]]

    def distance(self, layer, metric, test_id):
        return np.linalg.norm(self.train_xy - self.test_xy[self.row[test_id]], axis=1)

    def distance_label(self, metric):
        return "distance on the map"


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
        TypeError, ValueError: targets are no classes, scores of another task, test points without scores, an embedding of
            another length.
    """

    def __init__(self, task, methods, embedding, test_ids=None, k=10, preload=True):
        if not isinstance(task, Task):
            raise TypeError(f"task must be a Task, got {type(task).__name__}: Task(model, train, test)")
        if task.train.y.is_floating_point():
            raise TypeError(f"the explorer colours by class and needs class numbers, got targets of {task.train.y.dtype}")
        self.task, self.answers, self.preload = task, Answers(task, methods), preload
        self.test_ids = self.answers.common() if test_ids is None else [int(i) for i in test_ids]
        if not self.test_ids:
            raise ValueError("test_ids must name at least one test point, got none (the model makes no mistake?): test_ids=[0, 1]")
        if min(self.test_ids) < 0 or max(self.test_ids) >= len(task.test) or len(set(self.test_ids)) < len(self.test_ids):
            raise ValueError(f"test_ids must be different numbers in 0..{len(task.test) - 1}, got {self.test_ids[:8]}")
        self.answers.check_ids(self.test_ids)
        n_train = len(task.train)
        self.atlas = embedding if hasattr(embedding, "place") else FixedMap(*embedding, n_train, len(task.test), self.test_ids)
        shown = task.test.take(self.test_ids)
        self.test_row = {i: row for row, i in enumerate(self.test_ids)}
        self.label = {"train": task.train.y.cpu().numpy(), "test": shown.y.cpu().numpy()}
        self.predicted = {"train": task.predict(task.train).cpu().numpy(), "test": task.predict(shown).cpu().numpy()}
        self.loss = task.losses(shown).detach().cpu().numpy()
        count = 1 + max(int(values.max()) for group in (self.label, self.predicted) for values in group.values())
        self.classes = list(task.train.classes) or [str(c) for c in range(count)]
        self.state = ExplorerState(self.test_ids, n_train, self.classes, methods, self.atlas.layers, self.atlas.projections,
                                   self.atlas.distances, self.answers.fingerprint)
        self.lock, self.worker, self.job = threading.RLock(), ThreadPoolExecutor(1, "map"), 0
        self.shown = (self.state.layer, self.state.projection)  # what is on the map, while another one is computed
        self.limits = pixel_range(task.train.x)
        self._views()
        self.toolbar, self.controls = toolbar(self.state, self.cancel)
        plots = w.HBox([self.map, self.scatter])
        plots.add_class("inb-plots")
        super().__init__([self.toolbar, plots, self.gallery])
        self.add_class("inb-explorer")
        self._bind()
        wrong = self.predicted["test"] != self.label["test"]
        self.state.k = k
        self.state.test_id = self.test_ids[int(wrong.argmax())]
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
        self.state.from_json(Path(path).read_text(encoding="utf-8"))

    def cancel(self) -> None:
        """Give up the map that is being computed and go back to the one shown."""
        with self.lock:
            self.job += 1
            self._working("")
            self.state.layer, self.state.projection = self.shown

    def _repr_mimebundle_(self, **kwargs):
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is not None:
            bundle["image/png"] = picture.png(self)
        return bundle

    # views: arrays go to the browser once
    def _views(self):
        uid, names = uuid4().hex, list(self.answers.methods)
        given = [self.preload and self.answers.given(name) for name in names]
        ids, values = self.answers.preload(self.test_ids) if any(given) else (np.empty(0), np.empty(0))
        test_ids = packed(self.test_ids, "i4")
        sides = [side_names(self._unit(name)) for name in names]
        train_xy, test_xy = self.atlas.place(*self.shown, self.test_ids)
        self.map = PointCloud(name="map", source=uid, legend=True, test_ids=test_ids, preloaded=given, depth=DEPTH, side_names=sides,
                              topk_ids=packed(ids, "i4"), topk_scores=packed(values, "f4"), train_xy=packed(train_xy, "f4"),
                              test_xy=packed(test_xy, "f4"), title=self._map_title())
        self.scatter = PointCloud(name="scatter", source=uid, x_label=self.atlas.distance_label(self.state.metric),
                                  y_label="score", side_names=sides)
        preloaded = self._preloaded(ids)
        self.gallery = Gallery(
            source=uid, classes=self.classes, test_ids=test_ids, side_names=sides, test_loss=packed(self.loss, "f4"),
            side_titles=[side_titles(self._unit(name), self.task.measure) for name in names],
            loss_unit="nats" if self.task.loss.__name__ == "cross_entropy" else "",
            picture_shape=picture_shape(self.task.train.x),
            **{f"{layer}_label": packed(self.label[layer], "u2") for layer in ("train", "test")},
            **{f"{layer}_predicted": packed(self.predicted[layer], "u2") for layer in ("train", "test")},
            **self._pictures("train", preloaded), **self._pictures("test", self.test_ids))
        self._colour()

    def _unit(self, name):
        return self.answers.methods[name].unit if self.answers.given(name) else None

    def _preloaded(self, ids):
        """Training ids whose thumbnails travel at once, the strongest neighbours of all test points first."""
        ranked = ids.transpose(3, 0, 1, 2).ravel() if ids.size else np.empty(0, int)
        unique, first = np.unique(ranked[ranked >= 0], return_index=True)
        shape = picture_shape(self.task.train.x)
        room = PRELOADED // int(np.prod(shape)) if shape else 5000
        return unique[np.argsort(first)][:room].tolist()

    def _pictures(self, layer, ids):
        split = getattr(self.task, layer)
        shape = picture_shape(split.x)
        pixels = thumbnails(split.x, ids, self.limits).tobytes() if shape and ids else b""
        return {f"{layer}_picture_ids": packed(ids, "i4"), f"{layer}_pictures": pixels, f"{layer}_texts": texts(split, ids)}

    # state -> views -> state
    def _bind(self):
        state, c, views = self.state, self.controls, (self.map, self.scatter, self.gallery)
        for other in views[1:]:
            w.jslink((self.map, "hover"), (other, "hover"))
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
        for view in views:
            view.on_msg(self._asked)
        on = lambda names, act: state.observe(self._locked(act), names)  # noqa: E731
        on(["test_id", "method", "k"], self._answer)
        on(["pinned", "method", "k"], self._answer_pinned)
        on(["metric"], self._points)
        on(["layer", "projection"], self._move)
        on(["colour_by"], self._colour)
        on(["class_filter", "misclassified_only", "search"], self._filter)
        on(["selected"], self._select)
        on(["status"], lambda: setattr(self.map, "note", state.status))
        self.map.observe(self._locked(lambda: setattr(state, "selected", np.frombuffer(self.map.selected, "<i4").tolist())),
                         "selected")

    def _locked(self, act):
        def handler(_):
            with self.lock:
                act()
        return handler

    def _answer(self):
        state = self.state
        answer = self.answers.top(state.method, state.test_id, state.k) if state.test_id is not None else {}
        state.helpful, state.harmful = answer.get("helpful", []), answer.get("harmful", [])
        with self.map.hold_sync():
            self.map.method, self.map.k = list(self.answers.methods).index(state.method), state.k
            self.map.answer = answer
        self._points()

    def _answer_pinned(self):
        state = self.state
        self.map.pinned_answer = {} if state.pinned is None else self.answers.top(state.method, state.pinned, state.k)

    def points(self, test_id, method, metric):
        """What the scatter shows: distance and score float32 [n_train, 2] of every training example."""
        distance = self.atlas.distance(self.shown[0], metric, test_id)
        return np.stack([np.asarray(distance, dtype=np.float32), self.answers.row(method, test_id)], 1)

    def _points(self):
        state = self.state
        with self.scatter.hold_sync():
            if state.test_id is None:
                self.scatter.train_xy, self.scatter.owner, self.scatter.title = b"", "", ""
                return
            self.scatter.train_xy = packed(self.points(state.test_id, state.method, state.metric), "f4")
            self.scatter.owner = f"{state.test_id}/{list(self.answers.methods).index(state.method)}"
            self.scatter.x_label = self.atlas.distance_label(state.metric)
            self.scatter.y_label = f"{state.method} ({self.answers.scores(state.method, state.test_id).unit})"
            self.scatter.title = f"{state.method} against distance, test point {state.test_id}"

    def _select(self):
        self.map.selected = packed(self.state.selected, "i4")

    def _map_title(self):
        layer, projection = self.shown
        return f"Map: {projection} of {layer}"

    def _colour(self):
        by = self.state.colour_by
        groups = {layer: self.label[layer] if by == "label" else self.predicted[layer] for layer in ("train", "test")}
        if by == "correct":
            groups = {layer: (self.label[layer] != self.predicted[layer]) for layer in groups}
        for view in (self.map, self.scatter):
            with view.hold_sync():
                view.palette = RIGHT_WRONG if by == "correct" else PALETTE
                view.class_names = ["correct", "mistaken"] if by == "correct" else self.classes
                view.train_class = packed(groups["train"], "u2")
                view.test_class = packed(groups["test"], "u2") if view is self.map else b""

    # filters: what does not match is faint, and cannot be picked
    def _filter(self):
        state = self.state
        masks = {layer: self._matches(layer, ids) for layer, ids in (("train", range(len(self.task.train))), ("test", self.test_ids))}
        if state.misclassified_only:
            masks["test"] &= self.label["test"] != self.predicted["test"]
        for view in (self.map, self.scatter):
            view.train_hidden = b"" if masks["train"].all() else packed(~masks["train"], "u1")
        self.map.test_hidden = b"" if masks["test"].all() else packed(~masks["test"], "u1")
        n_train, n_test = int(masks["train"].sum()), int(masks["test"].sum())
        filtered = state.search or state.class_filter or state.misclassified_only
        state.status = f"{n_test} test and {n_train} training points match" if filtered else ""
        if state.search and n_test == 1 and n_train <= 1:
            state.test_id = self.test_ids[int(masks["test"].argmax())]

    def _matches(self, layer, ids):
        """Mask [len(ids)] of the examples within the class and the search."""
        state, labels = self.state, self.label[layer]
        mask = np.ones(len(labels), bool)
        if state.class_filter:
            mask &= labels == self.classes.index(state.class_filter)
        if terms := [term.strip().casefold() for term in state.search.split(",") if term.strip()]:
            split, ids, found = getattr(self.task, layer), np.asarray(ids), np.zeros(len(labels), bool)
            for term in terms:
                if term.removeprefix("#").isdigit():
                    found |= ids == int(term.removeprefix("#"))
                named = [c for c, name in enumerate(self.classes)
                         if (term == name.casefold() if term.isdigit() else term in name.casefold())]
                found |= np.isin(labels, named)
                if split.text:
                    found |= np.array([term in split.text[i].casefold() for i in ids.tolist()])
            mask &= found
        return mask

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
            train_xy, test_xy = self.atlas.place(*wish, self.test_ids)
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
                self.map.train_xy, self.map.test_xy = packed(train_xy, "f4"), packed(test_xy, "f4")
                self.map.title = self._map_title()
            self._working("")
            self._points()

    def _working(self, status):
        self.map.busy = bool(status)
        self.controls.cancel.layout.display = None if status else "none"
        self.state.status = status

    def _asked(self, view, message, buffers):
        """The browser wants thumbnails and texts by id."""
        layer, ids = message.get("layer"), message.get("ids", [])
        if message.get("type") != "want" or layer not in ("train", "test"):
            return
        ids = [i for i in ids if isinstance(i, int) and 0 <= i < len(getattr(self.task, layer))][:500]
        if not ids:
            return
        found = self._pictures(layer, ids)
        view.send({"type": "pictures", "layer": layer, "ids": ids, "texts": found[f"{layer}_texts"]},
                  [found[f"{layer}_pictures"]])


def side_names(unit):
    """What the two ends of a ranking are called: removal effects help and harm, other scores are high and low."""
    effect = unit is None or unit.endswith("per removed example")
    return ["helpful", "harmful"] if effect else ["highest", "lowest"]


def side_titles(unit, measure):
    """The headings of the gallery's two rows."""
    if side_names(unit)[0] == "highest":
        return [f"Highest: {unit}", f"Lowest: {unit}"]
    if measure is not None:
        return ["Helpful: without one of these, the measure would be lower", "Harmful: without one of these, it would be higher"]
    return ["Helpful: without one of these, the loss would be higher", "Harmful: without one of these, the loss would be lower"]
