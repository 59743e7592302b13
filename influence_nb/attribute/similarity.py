"""Similarity in an embedding: bare, and with the two factors that make influence of it.

A last Linear layer of features phi (a 1 appended for the bias) has, for the example j, the gradient r_j (x) phi_j, with
r_j = d loss_j / d outputs the residual: the predicted chances less the label, for cross-entropy. Influence through that
layer is therefore

    S[i, j] = r_i^T K_ij r_j,    K_ij = (1/n) (I (x) phi_i)^T (H + damping)^-1 (I (x) phi_j)    [c, c]
    H = (1/n) sum_j L_j (x) phi_j phi_j^T + l2 I_r

residual of the test point x similarity of the features in the metric of the inverse curvature x residual of the
training example. L_j is the loss's Hessian in the outputs. A cosine of features has neither residual, nor the metric.
"""

from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import functional as F

from ..embedding import embed
from ..head import begin_head, featured
from ..removal import removal_scores, self_influence
from ..scores import Scores
from ..task import Split, Task, asked


@dataclass
class Cosine:
    """The cosine of the angle between two embeddings, in -1..1: ranked only, no removal effect.

    The baseline: it knows neither labels nor the loss.

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


@dataclass
class LastLayer:
    """Influence through the last layer alone, the layers before it held fixed: exact for a model that is linear in it.

    What it misses is how the features would move. What a score is, its sign and its unit: see `removal`. All facts in
    the certificate are the last layer's.

    Cost: fit, two forward passes over the training set, and of the layer, with p = c x (d + 1) parameters, the
    curvature (n_train c^2 d^2) and its decomposition (p^3); scores, one forward pass over the test points and the
    product of [n_test, p] with [p, n_train], whose second factor is never formed. No backward pass through the model.

    Args:
        damping: added to the curvature; None for a tenth of the last layer's mean eigenvalue.

    Raises:
        ValueError: (fit) the model's outputs are not those of a trained Linear layer with a weight of its own, or it
            has over 6,000 parameters
            (its Kronecker form is EKFAC's, with the other layers frozen).

    Source: Koh & Liang (2017), eq. 2; the factors of logistic regression, their section 2.3.
    """

    damping: float | None = 0.0

    def fit(self, task: Task) -> "LastLayer":
        """Make the last layer a task of its own, on its features, and decompose its curvature."""
        begin_head(self, task)
        return self

    def scores(self, split: Split | None = None) -> Scores:
        """Scores [n_test, n_train] of the task's test points, or of `split`."""
        task, split = asked(self, split)
        found = removal_scores(self.head_, featured(task, self.layer_, split))
        return replace(found, task=self.fingerprint_, provenance={**found.provenance, "layer": self.layer_})

    def self_influence(self) -> Tensor:
        """The rise [n_train] of each training example's own loss on its removal."""
        asked(self, None)
        return self_influence(self.head_)
