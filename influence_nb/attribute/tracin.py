"""Products of gradients, without curvature."""

from dataclasses import dataclass

from ..gradients import Gradients, rise_slopes
from ..scores import Scores
from ..task import Split, Task, asked


@dataclass
class GradDot:
    """The product of test and training gradient, v_i^T g_j: influence with the identity in place of the curvature.

    Positive = helpful, but no removal effect: ranked only. It is the baseline that curvature has to beat.
    Cost: one backward pass over both sets, and n_train x p multiplications a test point.

    Source: Charpiat et al. (2019), eq. 4, before normalisation.
    """

    def fit(self, task: Task) -> "GradDot":
        """Keep the training gradients."""
        self.task_, self.fingerprint_ = task, task.fingerprint()
        self.train_ = Gradients(task, task.train)
        return self

    def scores(self, split: Split | None = None) -> Scores:
        """Scores [n_test, n_train] of the task's test points, or of `split`."""
        task, split = asked(self, split)
        test = Gradients(task, split, rise_slopes)
        return Scores(test.dot(self.train_), "GradDot()", self.fingerprint_, split.ids, task.train.ids,
                      unit="squared nats per unit of theta squared (ranked only)")
