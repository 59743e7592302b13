"""What is known of the examples: labels, predictions, losses, thumbnails, texts, and which of them match a search."""

import numpy as np

from influence_nb.widgets.pictures import picture_shape, pixel_range, texts, thumbnails
from influence_nb.widgets.pointcloud import packed


class Examples:
    """All training examples of a task and the test points shown.

    Attributes:
        label, predicted: {"train": [n_train], "test": [len(test_ids)]} class numbers.
        loss: float [len(test_ids)].
        classes: class names.
    """

    def __init__(self, task, test_ids):
        self.task, self.test_ids = task, test_ids
        shown = task.test.take(test_ids)
        self.ids = {"train": np.arange(len(task.train)), "test": np.asarray(test_ids)}
        self.row = {i: row for row, i in enumerate(test_ids)}
        self.label = {"train": task.train.y.cpu().numpy(), "test": shown.y.cpu().numpy()}
        self.predicted = {"train": task.predict(task.train).cpu().numpy(), "test": task.predict(shown).cpu().numpy()}
        self.loss = task.losses(shown).detach().cpu().numpy()
        self.loss_unit = "nats" if getattr(task.loss, "__name__", "") == "cross_entropy" else ""
        count = 1 + max(int(values.max()) for group in (self.label, self.predicted) for values in group.values())
        named = task.train.classes
        self.classes = [named[c] if c < len(named) else str(c) for c in range(max(count, len(named)))]
        self.shape = picture_shape(task.train.x)
        self.limits = pixel_range(task.train.x)

    def words(self, layer, example, arrow=" predicted ") -> str:
        """ "6 predicted 2", or "6" where the model is right."""
        row = self.row[example] if layer == "test" else example
        label, predicted = self.label[layer][row], self.predicted[layer][row]
        return self.classes[label] + (f"{arrow}{self.classes[predicted]}" if label != predicted else "")

    def groups(self, colour_by) -> dict:
        """What gives each example its colour: its label, its prediction, or 0 for correct and 1 for mistaken."""
        if colour_by == "correct":
            return {layer: self.label[layer] != self.predicted[layer] for layer in self.ids}
        return self.label if colour_by == "label" else self.predicted

    def thumbnails(self, layer, ids) -> np.ndarray:
        """uint8 [len(ids), height, width, channels]."""
        return thumbnails(getattr(self.task, layer).x, ids, self.limits)

    def texts(self, layer, ids) -> list[str]:
        """What is shown besides an image; empty for images alone."""
        return texts(getattr(self.task, layer), ids)

    def pictures(self, layer, ids) -> dict:
        """The gallery's traits that hold thumbnails and texts of these examples."""
        pixels = self.thumbnails(layer, ids).tobytes() if self.shape and len(ids) else b""
        return {f"{layer}_picture_ids": packed(ids, "i4"), f"{layer}_pictures": pixels,
                f"{layer}_texts": self.texts(layer, ids)}

    def send(self, view, message) -> None:
        """Send the browser the thumbnails and texts that it wants, by id."""
        layer, ids = message.get("layer"), message.get("ids", [])
        if message.get("type") != "want" or layer not in ("train", "test"):
            return
        ids = [i for i in ids if isinstance(i, int) and 0 <= i < len(getattr(self.task, layer))][:500]
        if not ids:
            return
        found = self.pictures(layer, ids)
        view.send({"type": "pictures", "layer": layer, "ids": ids, "texts": found[f"{layer}_texts"]},
                  [found[f"{layer}_pictures"]])

    def nearest(self, ids, room) -> list[int]:
        """Training ids out of `ids` [n_methods, n_test, 2, depth], the strongest of all test points first, as many as
        have room with their thumbnails in `room` bytes."""
        ranked = ids.transpose(3, 0, 1, 2).ravel()
        unique, first = np.unique(ranked[ranked >= 0], return_index=True)
        size = int(np.prod(self.shape)) if self.shape else 400
        return unique[np.argsort(first)][:room // size].tolist()

    def matches(self, state) -> dict:
        """Masks {"train": [n_train], "test": [len(test_ids)]} of the examples within the state's class and search.

        The search is a list with commas: a number is an id or a class of that name, "#12" an id, a word is part of a
        text or of a class name. Mistakes filter the test points alone: the training points stay as context.
        """
        masks = {layer: np.ones(len(ids), bool) for layer, ids in self.ids.items()}
        terms = [term.strip().casefold() for term in state.search.split(",") if term.strip()]
        for layer, mask in masks.items():
            if state.class_filter:
                mask &= self.label[layer] == self.classes.index(state.class_filter)
            if terms:
                mask &= np.any([self.found(layer, term) for term in terms], axis=0)
        if state.misclassified_only:
            masks["test"] &= self.label["test"] != self.predicted["test"]
        return masks

    def found(self, layer, term) -> np.ndarray:
        ids, split, number = self.ids[layer], getattr(self.task, layer), term.removeprefix("#")
        mask = ids == int(number) if number.isdecimal() else np.zeros(len(ids), bool)
        names = [name.casefold() for name in self.classes]
        mask |= np.isin(self.label[layer], [c for c, name in enumerate(names) if term == name or
                                            (term in name and not term.isdecimal())])
        if split.text:
            mask |= np.array([term in split.text[i].casefold() for i in ids.tolist()])
        return mask
