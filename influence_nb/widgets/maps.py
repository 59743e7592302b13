"""The map shown and the map asked for: computed in one thread of its own, where the latest wish counts."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from influence_nb.widgets.fixedmap import FixedMap, placed

MAPPED = ("layer", "projection", "near")  # what of the state makes another map


class Maps:
    """The maps of an atlas, as a state asks for them.

    Attributes:
        shown: (layer, projection, number of neighbours or None) of the map on the page.

    Args:
        atlas, state, lock, n_train, test_ids: the explorer's; the lock is held while a map is handed over.
        arrived: called with the places (train_xy, test_xy) of a new map, as bytes.
        working: called with what is being computed, in words, or "" when nothing is.
    """

    def __init__(self, atlas, state, lock, n_train, test_ids, arrived, working):
        self.atlas, self.state, self.lock, self.arrived, self.working = atlas, state, lock, arrived, working
        self.size = n_train, test_ids
        self.worker, self.number = ThreadPoolExecutor(1, "map"), 0
        self._settle(self.wish())

    def wish(self) -> tuple:
        """What the state asks for, to be compared with `shown`."""
        return self.state.layer, self.state.projection, self.state.neighbours()

    def places(self, wish) -> list[bytes]:
        """The places of training and test points on a map."""
        layer, projection, near = wish
        return placed(self.atlas, layer, projection, *self.size, near)

    def words(self, wish) -> str:
        """ "t-SNE of fc1, perplexity 30"."""
        layer, projection, near = wish
        number = "" if near is None else f", {self.state.ranges[projection][0]} {near}"
        return f"{projection} of {layer}{number}"

    def title(self) -> str:
        """What is written over the map shown."""
        return "Map" if isinstance(self.atlas, FixedMap) else f"Map: {self.words(self.shown)}"

    def ask(self) -> None:
        """Have the map made that the state asks for, in place of any that is being made."""
        self.number, wish = self.number + 1, self.wish()
        if wish == self.shown:
            self._settle(wish)
            return self.working("")
        self.working(f"computing {self.words(wish)}")
        self.worker.submit(self._make, self.number, wish)

    def give_up(self) -> None:
        """Forget the map that is being made; the state is again what it was for the map shown."""
        self.number += 1
        self.working("")
        self.state.withdraw(**self.kept)

    def close(self) -> None:
        """End the thread, after what it does now."""
        self.number += 1
        self.worker.shutdown(wait=False, cancel_futures=True)

    def _settle(self, wish):
        self.shown, self.kept = wish, {name: getattr(self.state, name) for name in MAPPED}
        self.state.settle()

    def _make(self, number, wish):
        if number != self.number:
            return
        places = failure = None
        with self.lock:
            metric, test_id = self.state.metric, self.state.test_id
        try:
            places = self.places(wish)
        except Exception as error:  # shown where the reader looks: this thread has nobody to raise to
            failure = error
        if test_id is not None:
            with suppress(Exception):  # embeds, so that a click need not; what fails is said by the scatter
                self.atlas.distance(wish[0], metric, test_id)
        with self.lock:
            if number != self.number or wish != self.wish():  # several traits are being set: the last will ask again
                return
            if failure:
                self.give_up()
                self.state.status = f"{self.words(wish)} failed: {failure}"
                return
            self._settle(wish)
            try:
                self.arrived(*places)
            finally:
                self.working("")
