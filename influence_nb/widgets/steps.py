"""Undo and redo: what was asked of a widget's state is remembered step by step. It knows no widget."""

from contextlib import contextmanager

from traitlets import Bool, HasTraits


class Steps(HasTraits):
    """A state whose changes of some traits can be undone; `remember` says of which."""

    undoable = Bool(False)
    redoable = Bool(False)

    def remember(self, names) -> None:
        """From now on every change of these traits is a step."""
        self.past, self.future, self._open, self._replaying = [], [], None, False
        self.settled = 0  # how many steps lay behind when `settle` was called
        for name in names:
            getattr(self, name)  # a list that was never read has no old value to undo to
        self.observe(self._record, names)

    # undo is a stack of {trait: value before}
    def _record(self, change):
        if self._replaying:
            return
        if self._open is not None:
            self._open.setdefault(change.name, change.old)
            return
        dragged = change.name == "k" and self.past and set(self.past[-1]) == {"k"}  # one drag of a slider is one step
        self._push(self.past.pop() if dragged else {change.name: change.old})

    def _push(self, step):
        self.settled = min(self.settled, len(self.past))
        self.past.append(step)
        self.future.clear()
        self._count()

    @contextmanager
    def one_step(self):
        """Group the changes in the body into one step of undo."""
        if self._open is not None:
            yield
            return
        self._open = {}
        try:
            yield
        finally:
            step, self._open = self._open, None
            if step:
                self._push(step)

    def undo(self) -> bool:
        """Take back the last step; False where there is none."""
        return self._replay(self.past, self.future)

    def redo(self) -> bool:
        """Do again what was taken back; False where there is nothing."""
        return self._replay(self.future, self.past)

    @property
    def replaying(self) -> bool:
        """Whether the present changes are an undo, a redo or part of a larger step, and not a wish of their own."""
        return self._replaying or self._open is not None

    def forget(self) -> None:
        """Drop all steps: what is now is the beginning."""
        self.past.clear()
        self.future.clear()
        self.settle()
        self._count()

    def settle(self) -> None:
        """What is now is what a later `withdraw` goes back to."""
        self.settled = len(self.past)

    def withdraw(self, **values) -> None:
        """Put back the values of when `settle` was called, as if they had never been changed since.

        Other steps made since then stay. An undo since then is done again, as far as it changed these values.
        """
        undone = self.settled - len(self.past)
        for step in self.future[-undone:] if undone > 0 else self.past[self.settled:]:
            for name in values:
                step.pop(name, None)
        if undone > 0:
            self.past.append({name: getattr(self, name) for name in values if getattr(self, name) != values[name]})
        self.past[:], self.future[:] = filter(None, self.past), filter(None, self.future)
        self.settle()
        self._put(values)

    def _replay(self, source, target):
        if not source:
            return False
        step = source.pop()
        target.append({name: getattr(self, name) for name in step})
        self._put(step)
        return True

    def _put(self, values):
        self._replaying = True
        try:
            with self.hold_trait_notifications():
                for name, value in values.items():
                    setattr(self, name, value)
        finally:
            self._replaying = False
        self._count()

    def _count(self):
        self.undoable, self.redoable = bool(self.past), bool(self.future)
