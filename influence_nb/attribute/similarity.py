"""Similarity in an embedding, as a baseline: it knows neither labels nor the loss."""

from dataclasses import dataclass

from torch.nn import functional as F

from ..embedding import embed
from ..scores import Scores
from ..task import Split, Task, asked


@dataclass
class Cosine:
    """The cosine of the angle between two embeddings, in -1..1: ranked only, no removal effect.

    Args:
        layer: a name from `model.named_modules()`; "" for the outputs.

    Raises:
        ValueError: (fit) there is no such layer.
    """

    layer: str = ""

    def fit(self, task: Task) -> "Cosine":
        """Embed the training set."""
        self.task_, self.fingerprint_ = task, task.fingerprint()
        self.train_ = F.normalize(embed(task.model, task.train.x, self.layer), dim=1)
        return self

    def scores(self, split: Split | None = None) -> Scores:
        """Similarities [n_test, n_train] of the task's test points, or of `split`."""
        task, split = asked(self, split)
        test = F.normalize(embed(task.model, split.x, self.layer), dim=1)
        return Scores(test @ self.train_.T, f"Cosine(layer={self.layer!r})", self.fingerprint_, split.ids,
                      task.train.ids,
                      unit="cosine similarity (ranked only)")
