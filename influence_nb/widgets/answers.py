"""Which training examples answer for a test point: strongest neighbours from Scores or from a method, and the preload."""

from collections import OrderedDict

import numpy as np
import torch

from influence_nb.task import Scores
from influence_nb.widgets.state import DEPTH


class Answers:
    """Scores by method name, from Scores where they are given, else asked of the method, one test point at a time.

    Args:
        task: the Task.
        methods: {name: Scores of this task, or a fitted method with .scores(split)}.

    Raises:
        TypeError, ValueError: methods is no such dictionary, or scores belong to another task or cover other examples.
    """

    def __init__(self, task, methods):
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
            raise ValueError(f"scores {name!r} must belong to task {self.fingerprint}, got scores of task {scores.task}: the "
                             "model, its training data or the loss differ; compute the scores again")
        n = len(self.task.train)
        if scores.train_ids.tolist() != list(range(n)):
            raise ValueError(f"scores {name!r} must cover the {n} training examples in order, got {len(scores.train_ids)} ids")
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

    def check_ids(self, test_ids) -> None:
        for name, scores in self.methods.items():
            if isinstance(scores, Scores) and (missing := sorted(set(test_ids) - set(scores.test_ids.tolist()))):
                raise ValueError(f"test_ids must be held by scores {name!r}, which lack {len(missing)} of {len(test_ids)}, "
                                 f"first {missing[0]}: leave it out or score it")

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

    def row(self, name, test_id) -> np.ndarray:
        """Scores float32 [n_train] of one test point."""
        return self.scores(name, test_id).row(test_id).detach().cpu().numpy().astype(np.float32)

    def top(self, name, test_id, k) -> dict:
        """The k most helpful and most harmful examples, with scores in float32, as the browser holds them."""
        top = self.scores(name, test_id).top(test_id, k)
        return {"test_id": test_id, "method": list(self.methods).index(name), "k": k,
                "helpful": top.helpful, "helpful_scores": np.float32(top.helpful_scores).tolist(),
                "harmful": top.harmful, "harmful_scores": np.float32(top.harmful_scores).tolist()}

    def preload(self, test_ids) -> tuple[np.ndarray, np.ndarray]:
        """The DEPTH strongest of each side for all given Scores: ids int32 and scores float32, both
        [n_methods, len(test_ids), 2, DEPTH], strongest first; id -1 where a side is shorter or scores are not given."""
        ids = np.full((len(self.methods), len(test_ids), 2, DEPTH), -1, np.int32)
        values = np.zeros(ids.shape, np.float32)
        for m, (name, scores) in enumerate(self.methods.items()):
            if not self.given(name):
                continue
            at = {int(i): row for row, i in enumerate(scores.test_ids.tolist())}
            for row, test_id in enumerate(test_ids):
                for side, sign in enumerate((1, -1)):
                    signed = sign * scores.values[at[test_id]].detach().cpu()
                    order = strongest(signed, DEPTH, positive=scores.is_effect)
                    ids[m, row, side, :len(order)] = order.numpy()
                    values[m, row, side, :len(order)] = sign * signed[order].numpy()
        return ids, values


def strongest(row: torch.Tensor, k: int, positive: bool) -> torch.Tensor:
    """Ids of the k greatest values of row [n], greatest first, equal ones in the order of their ids; cost O(n)."""
    k = min(k, len(row))
    least = torch.topk(row, k, sorted=False).values.min()
    found = (row >= least).nonzero()[:, 0]
    found = found[torch.argsort(-row[found], stable=True)][:k]
    return found[row[found] > 0] if positive else found
