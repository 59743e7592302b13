"""Which training examples answer for a test point: the strongest neighbours, from Scores or from a method."""

from collections import OrderedDict

import numpy as np
import torch

from influence_nb.scores import Scores
from influence_nb.task import Task
from influence_nb.widgets.state import DEPTH


class Answers:
    """Scores by method name, from Scores where they are given, else asked of the method, one test point at a time.

    Args:
        task: the Task.
        methods: {name: Scores of this task, or a fitted method with .scores(split)}.

    Raises:
        TypeError, ValueError: targets are no classes, methods is no such dictionary, or scores belong to another task
            or cover other examples.
    """

    def __init__(self, task, methods):
        if not isinstance(task, Task):
            raise TypeError(f"task must be a Task, got {type(task).__name__}: Task(model, train, test)")
        if task.train.y.is_floating_point():
            raise TypeError(f"the map needs class numbers to colour by, got targets of {task.train.y.dtype}")
        if not isinstance(methods, dict) or not methods:
            raise TypeError('methods must be a dictionary {name: Scores or fitted method}, got '
                            f'{type(methods).__name__}: {{"influence": scores}}?')
        self.task, self.methods, self.fingerprint = task, methods, task.fingerprint()
        self.cache = OrderedDict()
        for name, method in methods.items():
            if isinstance(method, Scores):
                self.check(name, method)
            elif not callable(getattr(method, "scores", None)):
                raise TypeError(f"method {name!r} must be Scores or have .scores(split), got {type(method).__name__}")

    def check(self, name, scores):
        if scores.task != self.fingerprint:
            raise ValueError(f"scores {name!r} must belong to task {self.fingerprint}, got {scores.task}: the model, "
                             "its training data or the loss differ; compute the scores again")
        n = len(self.task.train)
        if scores.train_ids.tolist() != list(range(n)):
            raise ValueError(f"scores {name!r} must cover the {n} training examples in order, got "
                             f"{len(scores.train_ids)} ids")
        if not torch.isfinite(scores.values).all():
            raise ValueError(f"scores {name!r} must be finite, got NaN or infinity: more damping?")
        if int(scores.test_ids.max()) >= len(self.task.test):
            raise ValueError(f"scores {name!r} must be of test points 0..{len(self.task.test) - 1}, got "
                             f"{int(scores.test_ids.max())}")

    def given(self, name) -> bool:
        """Whether the scores of this method are there already."""
        return isinstance(self.methods[name], Scores)

    def common(self) -> list[int]:
        """Ids of the test points that all given Scores hold; where none are given, the model's mistakes."""
        held = [set(scores.test_ids.tolist()) for scores in self.methods.values() if isinstance(scores, Scores)]
        if not held:
            return self.task.mistakes().tolist()
        if not (ids := set.intersection(*held)):
            raise ValueError("the scores given have no test point in common: compute them for the same test points")
        return sorted(ids)

    def shown(self, test_ids=None) -> list[int]:
        """The ids of the test points to show, checked; None for those that `common` finds."""
        ids, n_test = self.common() if test_ids is None else [int(i) for i in test_ids], len(self.task.test)
        if not ids:
            raise ValueError("test_ids must name at least one test point, got none; if the model makes no mistake: "
                             "test_ids=[0, 1]")
        if not set(ids) <= set(range(n_test)) or len(set(ids)) < len(ids):
            raise ValueError(f"test_ids must be different numbers in 0..{n_test - 1}, got {ids[:8]}")
        self.check_ids(ids)
        return ids

    def check_ids(self, test_ids) -> None:
        for name, scores in self.methods.items():
            if isinstance(scores, Scores) and (missing := sorted(set(test_ids) - set(scores.test_ids.tolist()))):
                raise ValueError(f"test_ids must be held by scores {name!r}, which lack {len(missing)} of "
                                 f"{len(test_ids)}, first {missing[0]}: leave it out or score it")

    def scores(self, name, test_id) -> Scores:
        """Scores that hold this test point."""
        if self.given(name):
            return self.methods[name]
        key = (name, test_id)
        if key not in self.cache:
            scores = self.methods[name].scores(self.task.test.take([test_id]))
            self.check(name, scores)
            self.cache[key] = scores
            if len(self.cache) > 64:
                self.cache.popitem(last=False)
        return self.cache[key]

    def complete(self, name, test_ids) -> Scores:
        """Scores that hold all of these test points."""
        if self.given(name):
            return self.methods[name]
        scores = self.methods[name].scores(self.task.test.take(test_ids))
        self.check(name, scores)
        return scores

    def row(self, name, test_id) -> np.ndarray:
        """Scores float32 [n_train] of one test point."""
        return self.scores(name, test_id).row(test_id).detach().cpu().float().numpy()

    def top(self, name, test_id, k) -> dict:
        """The k most helpful and most harmful examples, with scores in float32, as the browser holds them."""
        scores = self.scores(name, test_id)
        answer = {"test_id": test_id, "method": list(self.methods).index(name), "k": k}
        for side, sign in SIDES.items():
            ids, values = strongest(scores, test_id, sign, k)
            answer |= {side: ids.tolist(), f"{side}_scores": values.tolist()}
        return answer

    def preload(self, test_ids, held=None) -> tuple[np.ndarray, np.ndarray]:
        """The DEPTH strongest of each side, from all Scores given or `held`: ids int32 and scores float32, both
        [n_methods, len(test_ids), 2, DEPTH], strongest first; id -1 where a side is shorter or there are no scores."""
        ids = np.full((len(self.methods), len(test_ids), 2, DEPTH), -1, np.int32)
        values = np.zeros(ids.shape, np.float32)
        for m, name in enumerate(self.methods):
            scores = (held or self.methods)[name]
            if not isinstance(scores, Scores):
                continue
            for row, test_id in enumerate(test_ids):
                for side, sign in enumerate(SIDES.values()):
                    found, strength = strongest(scores, test_id, sign, DEPTH)
                    ids[m, row, side, :len(found)], values[m, row, side, :len(found)] = found, strength
        return ids, values

    def sides(self, unit) -> tuple[list[str], list[str]]:
        """What the two ends of a ranking are called, and their headings: only removal effects help and harm."""
        if unit is not None and not unit.endswith("per removed example"):
            return ["highest", "lowest"], [f"Highest: {unit}", f"Lowest: {unit}"]
        what = "loss" if self.task.measure is None else "measure"
        ways = ("higher", "lower") if self.task.measure is None else ("lower", "higher")
        return ["helpful", "harmful"], [f"{side}: without one of these, the {what} would be {way}"
                                        for side, way in zip(("Helpful", "Harmful"), ways, strict=True)]


SIDES = {"helpful": 1, "harmful": -1}


def strongest(scores: Scores, test_id: int, sign: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and float32 scores of the k strongest examples of one side, in the order of `Scores.top`; cost O(n_train)."""
    row = sign * scores.row(test_id).detach().cpu()
    least = torch.topk(row, min(k, len(row)), sorted=False).values.min()
    ids = (row >= least).nonzero()[:, 0]
    ids = ids[torch.argsort(-row[ids], stable=True)][:k]
    ids = ids[row[ids] > 0] if scores.is_effect else ids
    return ids, (sign * row[ids]).float()
