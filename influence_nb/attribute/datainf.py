"""DataInf: the empirical Fisher inverted by exchanging the mean with the inverse."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..curvature import GGN
from ..gradients import Gradients
from ..parameters import parameters, penalty, pieces
from ..removal import begin, removal_scores, self_influence
from ..scores import Scores
from ..task import Split, Task


@dataclass(eq=False)
class MeanOfInverses:
    """(1/n) sum_k (g_k g_k^T + l I)^-1 for each parameter tensor, l = l2 (where it is regularised) + damping.

    Each inverse is Sherman and Morrison's, so that one pass over the training gradients solves:

        X = (B - (1/n) sum_k g_k (g_k^T B) / (l + |g_k|^2)) / l

    It is the inverse of the mean for n = 1, and near it where l is large against every |g_k|^2.
    """

    train: Gradients

    def solve(self, B: Tensor, damping: float = 0.0) -> Tensor:
        """X [p, m] for B [p, m]."""
        task, n = self.train.task, len(self.train.split)
        l2 = {name: float(piece[0]) for name, piece in pieces(task, penalty(task)).items()}
        if not min(l2.values()) + damping > 0:
            raise ValueError(f"DataInf divides by l2 + damping, which is 0 for "
                             f"{next(name for name in l2 if l2[name] + damping == 0)}: set damping > 0")
        named = pieces(task, B)
        removed = dict.fromkeys(named, 0)
        for _, blocks in self.train:
            for name, block in blocks.items():
                shares = block.times(block.arrange(named[name]))                            # g_k^T B, [1, b, m]
                shares = shares / (l2[name] + damping + block.squares())[..., None]
                removed[name] = removed[name] + block.restore(block.combine(shares)) / n
        return torch.cat([(named[name] - removed[name]) / (l2[name] + damping) for name in parameters(task)])

    def facts(self, damping: float) -> dict:
        return {"indefinite": False}


@dataclass
class DataInf:
    """Influence with the mean of inverses (g_k g_k^T + damping)^-1 in place of the inverse of their mean.

    Ranked only: the exchange is far off unless damping is of the size of |g_k|^2, and there little is left but
    `GradDot` / damping. At the rule of thumb it follows retraining no better than `GradDot`: see the certificate's
    residual, which is that of the undistorted curvature.

    Cost: fit, one backward pass over the training set (and c more for the certificate); scores, two products with the
    training gradients. No matrix is formed.

    Args:
        damping: added to the curvature; None for a tenth of the GGN's mean eigenvalue. The paper has a tenth of each
            layer's mean squared gradient an entry instead: the same rule, layer by layer, of the empirical Fisher.
        curvature: what the certificate measures against.

    Raises:
        ValueError: (scores) damping is 0 where there is no regulariser.

    Source: Kwon et al. (2024), with a parameter tensor for each of its layers.
    """

    damping: float | None = None
    curvature: Callable = GGN

    def fit(self, task: Task) -> "DataInf":
        """Keep the training gradients."""
        begin(self, task)
        self.solver_ = MeanOfInverses(self.train_)
        return self

    def scores(self, split: Split | None = None) -> Scores:
        """Scores [n_test, n_train] of the task's test points, or of `split`."""
        scores = removal_scores(self, split)
        return replace(scores, unit=scores.unit.replace("per removed example", "to an unknown factor (ranked only)"))

    def self_influence(self) -> Tensor:
        """The product of each training gradient with itself, as in `scores`, [n_train]."""
        return self_influence(self)
