"""TRAK: influence on a logistic regression that stands for the network, in a random sketch of its gradients.

The margin of the labelled class, f = log(p / (1 - p)), turns cross-entropy into log(1 + exp(-f)), a logistic loss of
one number. Linear in theta, with x_j = grad f_j, it has the gradient and the curvature

    g_j = -(1 - p_j) x_j,        C = (1/n) sum_j p_j (1 - p_j) x_j x_j^T + l2 I_r

and one Newton step without j raises test loss i, of gradient v_i, by -(1/n) v_i^T C^-1 x_j (1 - p_j). TRAK replaces
every gradient x by its sketch P^T x [dim], P random with E[P P^T] = I.

For two classes C is the GGN. For more it lacks the part (1 - p)(diag(q) - q q^T) of each output Hessian, q the
probabilities among the other classes: it is smaller, and scores are too large, the more so the less sure the model is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..curvature import GGN
from ..gradients import Gradients, function_gradient, rise_slopes
from ..parameters import penalty, theta
from ..removal import begin, certified, kept, probe_error, probed_residual, spread, ten_times
from ..scores import Scores
from ..solve import Eigen
from ..task import Split, Task, asked, cross_entropy, name_of


def margin(outputs: Tensor, y: Tensor) -> Tensor:
    """log(p / (1 - p)) of the labelled class: outputs [b, c] logits, y [b] -> [b]."""
    own = F.one_hot(y, outputs.shape[1]).bool()
    return outputs[own] - outputs.masked_fill(own, -torch.inf).logsumexp(1)


def margin_slopes(task: Task, outputs: Tensor, y: Tensor) -> Tensor:
    """d margin / d outputs: pulled back, the gradient of each example's margin."""
    return function_gradient(margin, outputs, y)[None]


class Projected:
    """One model's logistic regression: sketched margin gradients, what is left to learn, and the kernel.

    P has random signs / sqrt(dim), made again from its seed wherever it is used, `most` numbers at a time; from
    dim >= p on it is the identity. In a true sketch the regulariser, which acts on weights alone, is spread evenly.

    Args:
        weighted: False drops the weights p (1 - p) from the kernel, as the paper does.
    """

    def __init__(self, task: Task, dim: int, seed: int, weighted: bool = True, most: int = 2**24):
        self.task, self.dim, self.seed, self.most = task, dim, seed, most
        l2 = penalty(task)
        self.whole = dim >= len(l2)
        f = margin(task.outputs(task.train), task.train.y)
        self.doubt = torch.sigmoid(-f)                                                      # 1 - p, [n]
        self.features = self.project(Gradients(task, task.train, margin_slopes))            # [n, dim]
        w = torch.sigmoid(f) * self.doubt if weighted else torch.ones_like(f)
        kernel = self.features.T @ (w[:, None] * self.features) / len(f)
        ridge = l2 if self.whole else l2.mean().expand(dim)
        self.kernel = Eigen.of(kernel + torch.diag(ridge))

    def columns(self) -> Iterator[Tensor]:
        """P [p, dim] in blocks of columns."""
        random, p = torch.Generator().manual_seed(self.seed), len(theta(self.task))
        for start in range(0, self.dim, step := max(1, self.most // p)):
            signs = torch.randint(2, (min(step, self.dim - start), p), generator=random, dtype=torch.int8)
            yield (2 * signs - 1).T.to(theta(self.task)) / self.dim ** 0.5

    def project(self, gradients: Gradients) -> Tensor:
        """P^T g of the first gradient g of every example, [n, dim]."""
        if self.whole:
            return gradients.dense()[0]
        return torch.cat([(gradients @ P)[0] for P in self.columns()], dim=1)

    def solve(self, B: Tensor, damping: float = 0.0) -> Tensor:
        """P (kernel + damping I)^-1 P^T B for B [p, m]."""
        if self.whole:
            return self.kernel.solve(B, damping)
        Z = self.kernel.solve(torch.cat([P.T @ B for P in self.columns()]), damping)
        step = max(1, self.most // len(B))
        return sum(P @ part for P, part in zip(self.columns(), Z.split(step), strict=True))

    def facts(self, damping: float) -> dict:
        return self.kernel.facts(damping)


@dataclass
class TRAK:
    """Influence by TRAK, in the scale of removal effects.

    The paper drops the weights p (1 - p) from the curvature, and with them the scale: scores then come out too small,
    four times and more, as p (1 - p) is at most 1/4, and are ranked only (`weighted=False`). It scores the drop of the
    margin; here a score is the rise of the test loss, which is 1 - p_i times that in a row. Ask for a task with
    `measure=margin` to have the paper's.

    Cost: fit, a backward pass over the training set and a product with P [p, dim] for each model (and c backward
    passes for the certificate); scores, the same over the test points. Memory: n_train x dim numbers a model.

    Args:
        dim: of the sketch.
        models: further trained models of the same architecture; products and 1 - p are averaged over all, as in the
            paper, and scores are then of the *expected* effect over training noise. The scores' provenance has the
            fingerprint of each.
        damping: added to the curvature; None for a tenth of the GGN's mean eigenvalue.
        weighted: whether the curvature keeps its weights.
        seed: of P; each model has its own.

    The certificate's residual is that of the undistorted GGN of the task's own model, |(G + damping) x - v| / |v|,
    estimated for each test point to about 25 % of itself.

    Raises:
        ValueError: (fit) the loss is not cross-entropy over classes.

    Source: Park et al. (2023), section 3; the one-step estimate by Pregibon (1981).
    """

    dim: int = 512
    models: Sequence = field(default=(), repr=False)
    damping: float | None = None
    weighted: bool = True
    seed: int = 0

    def fit(self, task: Task) -> "TRAK":
        """Sketch the margin gradients of every model, and decompose the kernels."""
        if task.loss is not cross_entropy or task.outputs(task.train.take([0])).ndim != 2:
            raise ValueError(f"TRAK needs cross_entropy on outputs [b, c], for a margin to exist; got "
                             f"{name_of(task.loss)}: use EKFAC or CG")
        begin(self, task, GGN)
        tasks = [task, *(replace(task, model=model) for model in self.models)]
        self.models_ = [self.fingerprint_, *(each.fingerprint() for each in tasks[1:])]
        self.sketches_ = [Projected(each, self.dim, self.seed + k, self.weighted) for k, each in enumerate(tasks)]
        self.solver_ = self.sketches_[0]
        self.doubt_ = torch.stack([sketch.doubt for sketch in self.sketches_]).mean(0)
        self.error_ = probe_error(self, self.solver_)
        return self

    def scores(self, split: Split | None = None) -> Scores:
        """Scores [n_test, n_train] of the task's test points, or of `split`."""
        task, split = asked(self, split)
        sketched = [sketch.project(Gradients(sketch.task, split, rise_slopes)) for sketch in self.sketches_]
        values, few = self.effects(sketched, self.damping_), spread(len(split))
        damped = self.effects([test[few] for test in sketched], ten_times(self))
        test = Gradients(task, split, rise_slopes)
        scores = certified(self, split, values, probed_residual(self.error_, test), kept(values[few], damped))
        unit = scores.unit if self.weighted else "nats per unit of p (1 - p) (ranked only)"
        name = f"{self!r}"[:-1] + f", {len(self.sketches_)} models)"
        return replace(scores, method=name, unit=unit, provenance={**scores.provenance, "models": self.models_})

    def effects(self, sketched: list[Tensor], damping: float) -> Tensor:
        """[n_test, n_train] from the sketched test gradients of every model."""
        products = sum(sketch.kernel.solve(test.T, damping).T @ sketch.features.T
                       for test, sketch in zip(sketched, self.sketches_, strict=True)) / len(self.sketches_)
        return -products * self.doubt_ / len(self.doubt_)

    def self_influence(self) -> Tensor:
        """The rise of each training example's own loss on its removal, [n_train]."""
        lengths = sum((sketch.features.T * sketch.kernel.solve(sketch.features.T, self.damping_)).sum(0)
                      for sketch in self.sketches_) / len(self.sketches_)
        return self.doubt_.square() * lengths / len(self.doubt_)
