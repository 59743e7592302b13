"""Representer values: an output of the network as an exact sum over the training examples.

A last layer Theta [d, c] on features phi (a 1 appended where the layer has a bias) that is stationary for

    R(Theta) = (1/n) sum_j loss(Theta^T phi_j, target_j) + (l2/2) |Theta|^2

is Theta = sum_j phi_j alpha_j^T, with alpha_j = -(1/(n l2)) d loss_j / d outputs [c], so that for any two examples

    outputs_i = sum_j values[i, j],    values[i, j] = alpha_j k(phi_i, phi_j)  [c],    k(phi, psi) = phi^T psi.

For cross-entropy alpha_j is target less predicted chances, over n l2. Positive: example j excites the output;
negative: it inhibits it. That is a share of an output, no removal effect: without j, Theta would be another one.

The paper's regulariser is lambda |Theta|^2: l2 = 2 lambda. The bias is regularised with the rest, as the weight of a
feature that is always 1; a free bias would be no sum over the examples, and be left over.

The general form is any importance alpha_j times any kernel k. Sources: Yeh et al. (2018), theorem 3.1; Tsai, Yeh &
Ravikumar (2023) for the general form; Sui, Wu & Sanner (2021) for the local expansion.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..embedding import embed
from ..gradients import Gradients, function_gradient
from ..head import MOST, begin_head, featured, last_linear, refit
from ..parameters import penalty, theta
from ..removal import repr_of
from ..scores import Scores
from ..task import Split, Task, asked, cross_entropy, name_of, squared_error


# targets of the refit: (task, the model's own outputs [n, c] on the training examples) -> [n] or [n, c]
def labels(task: Task, outputs: Tensor) -> Tensor:
    """The labels [n]: alpha is then what the refit has left to learn of each."""
    return task.train.y


def own_outputs(task: Task, outputs: Tensor) -> Tensor:
    """What the network itself says, chances [n, c] or numbers [n]: alpha is then where the refit differs from it.

    The paper's released choice: the refit follows the network as closely as l2 lets it.

    Raises:
        ValueError: the loss is neither cross_entropy nor squared_error, and takes what nobody knows for a target.
    """
    if task.loss not in (cross_entropy, squared_error):
        raise ValueError(f"own_outputs expected cross_entropy or squared_error, got {name_of(task.loss)}: "
                         "target=labels, or a function of your own, (task, outputs [n, c]) -> targets")
    return outputs.softmax(1) if task.loss is cross_entropy else outputs.reshape(len(outputs))


# kernels: (test [m, d], train [n, d]) features, with the 1 -> [m, n]
def linear(test: Tensor, train: Tensor) -> Tensor:
    """The inner product, of which a linear layer is made."""
    return test @ train.T


# importances: (task, outputs [n, c], targets) -> [n, c]
def residuals(task: Task, outputs: Tensor, targets: Tensor) -> Tensor:
    """- d loss_j / d outputs, for cross-entropy target less predicted chances: what example j pulls its outputs to."""
    return -function_gradient(task.loss, outputs, targets)


# what a score is a share of: (the model's own outputs [m, c], y [m]) -> weights of the outputs [m, c]
def predicted(outputs: Tensor, y: Tensor) -> Tensor:
    """The output of the class that the model predicts; the only output, where there is one."""
    return F.one_hot(outputs.argmax(1), outputs.shape[1])


def labelled(outputs: Tensor, y: Tensor) -> Tensor:
    """The output of the class in the label: what speaks for it, and what against it."""
    if y.is_floating_point():
        raise TypeError(f"labelled expected class numbers, got y of {y.dtype}: output=predicted")
    return F.one_hot(y, outputs.shape[1])


@dataclass
class Representer:
    """Representer values, exact for a last layer that is fitted anew, with L2, on the network's features.

    Unit: logits (outputs, where the loss is not cross-entropy): see above. The scores of one test point add up to an
    output of the refit. The certificate has how nearly (relative, each test point), and how near the refit comes to
    the network: the share of test points that both put into one class, and Pearson's correlation of their outputs,
    each less its mean over the classes. The network itself is left as it is.

    Cost: fit, two forward passes over the training set, and the refit, see `head.refit`; with a kernel of your own, the
    decomposition of [n_train, n_train]. scores, one forward pass over the test points and n_test n_train d. Memory:
    n_train d numbers in float64, and for `values` n_test n_train c.

    Args:
        l2: of the refit; None for the task's. More of it spreads an output over more examples.
        target: `labels`, `own_outputs`, or a function of your own: what the refit is fitted to.
        kernel: of the features; `linear`, or a positive semidefinite one, (test [m, d], train [n, d]) -> [m, n]. With
            one of your own the refit is the kernel machine that it makes.
        importance: None for that of the refit, whose values alone add up to it; or (task, outputs [n, c] of the
            model, targets) -> [n, c], such as `residuals`: no refit, and ranked only.
        output: what a score is a share of, as weights of the outputs: `predicted`, `labelled`, or for example
            `lambda o, y: predicted(o, y) - labelled(o, y)`, the lead of the wrong class over the right one.
        layer: the Linear layer by its name, for a model that goes on to, say, LogSoftmax or squeeze; None to find the
            one whose outputs are the model's.

    Raises:
        ValueError: (fit) l2 is 0; there is no such layer; target, kernel or importance give what they should not; or
            the refit is not certified.

    Source: Yeh et al. (2018). A layer without bias, at a minimum of the task's risk, is its own refit with labels.
    """

    l2: float | None = None
    target: Callable = labels
    kernel: Callable = linear
    importance: Callable | None = None
    output: Callable = predicted
    layer: str | None = None

    def fit(self, task: Task) -> "Representer":
        """Fit the last layer anew, and read each example's importance off its loss."""
        self.task_, self.fingerprint_, self.layer_ = task, task.fingerprint(), chosen(task, self)
        layer = task.model.get_submodule(self.layer_)
        pieces = [layer.weight] if layer.bias is None else [layer.weight, layer.bias[:, None]]
        self.own_ = torch.cat(pieces, dim=1).detach().double().T                            # [d, c]
        self.phi_ = self.features(task.train)                                               # [n, d]
        outputs = self.phi_ @ self.own_
        targets = checked(self.target(task, outputs), "target", outputs.shape[:1], outputs.shape)
        if self.importance is None:
            l2 = task.l2 if self.l2 is None else self.l2
            if not 0 < l2 < float("inf"):
                raise ValueError(f"a representer theorem needs l2 above 0, got {l2}: Representer(l2=1e-3)?")
            found, self.theta_, outputs = machine(task, self.kernel, self.phi_, targets, outputs.shape[1], l2)
            self.alpha_ = residuals(task, outputs, targets) / (len(outputs) * l2)           # [n, c]
            self.facts_ = {"l2": l2, "gradient norm": found.gradient_norm, "passes": found.passes}
        else:
            found = checked(self.importance(task, outputs, targets), "importance", outputs.shape)
            self.alpha_, self.theta_, self.facts_ = found.double(), self.own_, {}
        return self

    def features(self, split: Split) -> Tensor:
        """The layer's inputs [n, d] in float64, with a 1 for its bias."""
        bias = self.task_.model.get_submodule(self.layer_).bias is not None
        return F.pad(featured(self.task_, self.layer_, split).x.flatten(1).double(), (0, int(bias)), value=1.0)

    def explained(self, split: Split | None) -> tuple[Split, Tensor, Tensor, Tensor]:
        """The examples asked for, their kernel [m, n], the outputs [m, c] that values add up to, the model's own."""
        task, split = asked(self, split)
        phi = self.features(split)
        K = checked(self.kernel(phi, self.phi_), "kernel", (len(phi), len(self.phi_)))
        dual = self.importance is None and self.kernel is not linear
        return split, K, (K if dual else phi) @ self.theta_, phi @ self.own_

    def values(self, split: Split | None = None) -> Tensor:
        """What each training example adds to each output, [n_test, n_train, c]: their sum over them is `outputs`."""
        return self.explained(split)[1][:, :, None] * self.alpha_

    def outputs(self, split: Split | None = None) -> Tensor:
        """The outputs [n_test, c] of the refit (of the network's own layer, with an importance of your own)."""
        return self.explained(split)[2]

    def global_importance(self) -> Tensor:
        """|alpha_j| of each training example, [n_train]: for all test points alike."""
        asked(self, None)
        return self.alpha_.norm(dim=1)

    def scores(self, split: Split | None = None) -> Scores:
        """The share [n_test, n_train] of each training example in one output of the test points, or of `split`."""
        split, K, whole, own = self.explained(split)
        weights = checked(self.output(own, split.y), "output", own.shape).to(own)
        name = "logits" if self.task_.loss is cross_entropy else "outputs"
        unit = f"{name} (positive excites, no removal effect)" if self.importance is None else "importance x kernel"
        values = K * (weights @ self.alpha_.T)
        return Scores(values, repr_of(self), self.fingerprint_, split.ids, self.task_.train.ids, unit,
                      {**self.facts_, **fidelity(K @ self.alpha_, whole, own)},
                      {"layer": self.layer_, "bias": "regularised, as the weight of a feature of ones"
                       if self.own_.shape[0] > self.task_.model.get_submodule(self.layer_).in_features else "none"})


def chosen(task: Task, method: Representer) -> str:
    """The name of the layer: the last Linear, or that named in the method, if it is Linear and decides the loss."""
    if method.layer is None:
        return last_linear(task, method)
    outputs, layer = embed(task.model, task.train.x, method.layer), task.model.get_submodule(method.layer)
    if type(layer) is not nn.Linear:
        raise ValueError(f"expected the name of a Linear layer, got {method.layer!r}, a {type(layer).__name__}: "
                         "layer=None finds the last one")
    wanted = task.losses(task.train)
    if layer.out_features == task.outputs(task.train.take([0])).numel():
        off = float((task.loss(outputs, task.train.y) - wanted).abs().max())
        if off <= torch.finfo(wanted.dtype).eps ** 0.5 * float(wanted.abs().max()):
            return method.layer
    raise ValueError(f"expected a layer whose outputs have the model's losses, got {method.layer!r} with others: name "
                     "the last Linear, after which only what the loss does itself, such as LogSoftmax, may come")


def checked(found: Tensor, name: str, *shapes: tuple) -> Tensor:
    """What a user's function gives, if it has one of the shapes and is finite."""
    if tuple(found.shape) not in shapes or not torch.isfinite(found).all():
        raise ValueError(f"{name} must give finite numbers of shape {' or '.join(str(tuple(s)) for s in shapes)}, got "
                         f"{tuple(found.shape)}{' with NaN or infinity' * (tuple(found.shape) in shapes)}")
    return found


def machine(task: Task, kernel: Callable, phi: Tensor, targets: Tensor, c: int, l2: float):
    """The refit, its weights (of the features [d, c]; of the training examples [n, c] for any other kernel), and its
    outputs [n, c] on the training examples.

    Any kernel is the inner product of the rows of a root Z of it, K = Z Z^T: a linear layer on these is fitted.
    """
    if kernel is linear:
        found = refit(task, phi, targets, c, l2)
        return found, found.theta, phi @ found.theta
    if len(phi) > MOST:
        raise ValueError(f"a kernel of your own is decomposed, for {MOST:,} training examples at most, got "
                         f"{len(phi):,}: kernel=linear, or fewer examples")
    K = checked(kernel(phi, phi), "kernel", (len(phi), len(phi)))
    s, U = torch.linalg.eigh(K)
    rounding = len(K) * torch.finfo(K.dtype).eps * float(s.abs().max())
    if not (K - K.T).abs().max() <= rounding or not s[0] >= -rounding:
        raise ValueError(f"expected a symmetric positive semidefinite kernel, got one with eigenvalues {s[0]:.3g} to "
                         f"{s[-1]:.3g} that is {float((K - K.T).abs().max()):.2g} from its transpose: importance="
                         "residuals takes any")
    s, U = s[s > rounding].sqrt(), U[:, s > rounding]
    found = refit(task, U * s, targets, c, l2)
    return found, U / s @ found.theta, U * s @ found.theta


def fidelity(sums: Tensor, whole: Tensor, own: Tensor) -> dict:
    """How near values [m, c], summed, come to the outputs that they should add up to; and to the model's own."""
    error = (sums - whole).norm(dim=1) / whole.norm(dim=1).clamp(min=torch.finfo(whole.dtype).tiny)
    facts, one = {"reconstruction error": error.tolist()}, own.shape[1] == 1
    if not one:
        facts["same prediction"] = float((sums.argmax(1) == own.argmax(1)).double().mean())
    level = torch.stack([(o if one else o - o.mean(1, keepdim=True)).flatten() for o in (sums, own)])
    if (level.std(1, correction=0) > 0).all():
        facts["Pearson with the model's outputs"] = float(torch.corrcoef(level)[0, 1])
    return facts


def every_output(task: Task, outputs: Tensor, y: Tensor) -> Tensor:
    """The unit vectors of the outputs, [c, b, c]: pulled back, the gradient of each output."""
    return torch.eye(outputs.shape[1]).to(outputs)[:, None].expand(-1, len(outputs), -1)


@dataclass
class RepresenterLJE:
    """Representer values by local Jacobian expansion: no refit, but the curvature of the last layer as it is.

    One Newton step of the last layer on the task's risk, from theta, is split evenly among the examples but for their
    gradients:

        values[i, j] = (1/n) J_i (theta - H^-1 (g_j + l2 theta_r)),    J_i = d outputs_i / d theta    [c, p]

    They add up to the outputs after the step, which are the model's own where it is at a minimum (reconstruction error
    in the certificate). Of the three terms only H^-1 g_j depends on j: the ranking is that of `LastLayer`, with an
    output for its measure, of whose removal effects the values are a constant more.

    Unit: logits, positive excites. The paper divides each share by the features, to multiply with them again: left out
    here, so that a feature may be 0 and a layer have a bias. So is its step of gradient ascent before the expansion.
    Adding a constant to all biases of a softmax is a null direction of H, in which no g_j has a part: pseudo-inverse.

    Cost: that of `LastLayer`; scores, c solves for each test point.

    Args:
        damping: added to H; None for a tenth of its mean eigenvalue.
        output: as for `Representer`.

    Source: Sui, Wu & Sanner (2021), theorem 3.1.
    """

    damping: float | None = 0.0
    output: Callable = predicted

    def fit(self, task: Task) -> "RepresenterLJE":
        """Decompose the curvature of the last layer."""
        begin_head(self, task)
        return self

    def explained(self, split: Split | None) -> tuple[Split, Tensor, Tensor]:
        """The examples asked for, their values [m, n, c], and the model's own outputs [m, c]."""
        task, split = asked(self, split)
        head, seen = self.head_.task_, featured(task, self.layer_, split)
        J = Gradients(head, seen, every_output).dense()                                     # [c, m, p]
        X = self.head_.solver_.inverse_times(J.flatten(0, 1).T, self.head_.damping_)        # [p, c m]
        level = J.flatten(0, 1) @ theta(head) - X.T @ (penalty(head) * theta(head))
        values = (level - (self.head_.train_ @ X)[0]) / len(task.train)                     # [n, c m]
        return split, values.view(len(task.train), *J.shape[:2]).permute(2, 0, 1), head.outputs(seen)

    def values(self, split: Split | None = None) -> Tensor:
        """Each training example's share of each output, [n_test, n_train, c]."""
        return self.explained(split)[1]

    def scores(self, split: Split | None = None) -> Scores:
        """The share [n_test, n_train] of each training example in one output of the test points, or of `split`."""
        split, values, own = self.explained(split)
        weights = checked(self.output(own, split.y), "output", own.shape).to(own)
        head, name = self.head_, "logits" if self.task_.loss is cross_entropy else "outputs"
        facts = {"gradient norm": head.gradient_norm_, "damping": head.damping_, **head.solver_.facts(head.damping_)}
        return Scores(torch.einsum("mnc,mc->mn", values, weights), repr_of(self), self.fingerprint_,
                      split.ids, self.task_.train.ids, f"{name} (positive excites, no removal effect)",
                      {**facts, **fidelity(values.sum(1), own, own)}, {"layer": self.layer_})
