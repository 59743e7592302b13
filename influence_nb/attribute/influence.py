"""Influence functions: the first-order effect of removing a training example (Koh & Liang 2017).

At a stationary point of R(theta; w), removing example j (w_j = 1 -> 0, n fixed) moves theta by + (1/n) H^-1 g_j to
first order, g_j = grad loss_j. The test loss then changes by

    S[i, j] = (1/n) v_i^T H^-1 g_j,    v_i = grad loss(test_i)

which is minus 1/n times the paper's I_up,loss (its eq. 2, positive = harmful): here positive = helpful, in nats for
one removed example. With a measure m in place of the loss, S is the drop of m, -(1/n) grad m_i^T H^-1 g_j.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..curvature import GGN, Hessian
from ..gradients import TrainGradients, example_gradients, risk_gradient
from ..scores import EFFECT, Scores
from ..solve import Eigen, cg
from ..task import Split, Task, asked


@dataclass
class Influence:
    """Exact influence: the curvature as a dense matrix, decomposed once.

    Cost: fit, the dense curvature and an O(p^3) decomposition, with p^2 numbers of memory (2,616 parameters: 55 MB);
    scores, one backward pass over the test points and n_train x p multiplications each.

    Args:
        damping: added to the curvature of R; 0 is right where that is positive definite.
        curvature: Hessian, or GGN where the Hessian is indefinite or too dear.

    Raises:
        ValueError: (scores) the damped curvature is singular in directions that the gradients need.
    """

    damping: float = 0.0
    curvature: Callable = Hessian

    def fit(self, task: Task) -> "Influence":
        """Compute and decompose the curvature, and keep the training gradients."""
        check_settings(self)
        self.task_, self.fingerprint_ = task, task.fingerprint()
        self.dense_ = self.curvature(task).dense()
        self.eigen_ = Eigen.of(self.dense_)
        self.train_ = TrainGradients(task)
        self.gradient_norm_ = float(risk_gradient(task).norm())
        return self

    def scores(self, split: Split | None = None) -> Scores:
        """Scores [n_test, n_train] of the task's test points, or of `split`."""
        V = measure_gradients(self, split)
        X = self.eigen_.solve(V, self.damping)
        residual = (self.dense_ @ X + self.damping * X - V).norm(dim=0) / V.norm(dim=0).clamp(min=1e-30)
        null = self.eigen_.null(self.damping)
        smallest = float((self.eigen_.values + self.damping)[~null].min())
        return effects(self, split, X, residual, {"smallest eigenvalue": smallest, "indefinite": smallest < 0,
                                                  "null directions": int(null.sum())})


@dataclass
class CG:
    """Influence by conjugate gradients: no matrix is formed, every iteration is one product with the curvature.

    Cost: scores, `products` passes over the training set for all test points together (see the certificate).

    Args:
        damping, curvature: as for `Influence`; GGN products are never indefinite.
        tol: relative residual at which a test point's solve stops.
        max_iterations: after which it stops in any case; the certificate then shows the residual that was reached.

    Raises:
        ValueError: (scores) the damped curvature has a negative direction.

    Source: Koh & Liang (2017), section 3; Martens (2010).
    """

    damping: float = 0.0
    curvature: Callable = GGN
    tol: float = 1e-5
    max_iterations: int = 500

    def fit(self, task: Task) -> "CG":
        """Keep the training gradients where they fit into memory."""
        check_settings(self)
        self.task_, self.fingerprint_ = task, task.fingerprint()
        self.train_ = TrainGradients(task)
        self.gradient_norm_ = float(risk_gradient(task).norm())
        return self

    def scores(self, split: Split | None = None) -> Scores:
        """Scores [n_test, n_train] of the task's test points, or of `split`."""
        V = measure_gradients(self, split)
        C = self.curvature(self.task_)
        X, residual, products = cg(lambda P: C @ P + self.damping * P, V, self.tol, self.max_iterations)
        return effects(self, split, X, residual, {"curvature products": products})


def check_settings(method) -> None:
    """Raise where damping or curvature make no sense."""
    if not method.damping >= 0:
        raise ValueError(f"damping must be 0 or more, got {method.damping}")
    if not callable(method.curvature):
        raise TypeError(f"curvature must be Hessian or GGN (the class), got {method.curvature!r}")


def measure_gradients(method, split: Split | None) -> Tensor:
    """Gradients [p, n_test] of what the scores are the rise of: the loss, or minus the measure."""
    task, split = asked(method, split)
    if task.measure is None:
        return example_gradients(task, split).T
    return -example_gradients(task, split, task.measure).T


def effects(method, split: Split | None, X: Tensor, residual: Tensor, certificate: dict) -> Scores:
    """Scores from the solved test gradients X [p, n_test]: (1/n) X^T g_j."""
    task = method.task_
    split = task.test if split is None else split
    unit = EFFECT if task.measure is None else f"{task.measure.__name__} per removed example"
    certificate = {"gradient norm": method.gradient_norm_, "residual": residual.tolist(), "damping": method.damping,
                   **certificate}
    return Scores(method.train_.products(X) / len(task.train), repr_of(method), method.fingerprint_, split.ids,
                  task.train.ids, unit, certificate, {"curvature": method.curvature.__name__})


def repr_of(method) -> str:
    """The dataclass's repr with functions and classes by their names."""
    fields = {name: getattr(method, name) for name in method.__dataclass_fields__}
    shown = ", ".join(f"{name}={getattr(value, '__name__', value)}" for name, value in fields.items())
    return f"{type(method).__name__}({shown})"
