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
from dataclasses import dataclass, replace
from numbers import Real

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..embedding import embed
from ..gradients import Gradients, function_gradient, risk_gradient
from ..head import LEAST, begin_head, checked, featured, inner_product, kernel_of, last_linear, learnable, machine
from ..parameters import outputs_at, penalty, theta
from ..removal import repr_of
from ..scores import Scores
from ..task import Split, Task, asked, cross_entropy, name_of, squared_error


# targets of the refit: (task, the model's own outputs [n, c] on the training examples) -> [n] or [n, c]
def given_labels(task: Task, outputs: Tensor) -> Tensor:
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
                         "target=given_labels, or a function of your own, (task, outputs [n, c]) -> targets")
    return outputs.softmax(1) if task.loss is cross_entropy else outputs.reshape(len(outputs))


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
        target: `given_labels`, `own_outputs`, or a function of your own: what the refit is fitted to.
        kernel: of the features; `inner_product`, or a positive semidefinite one, (test [m, d], train [n, d]) -> [m, n].
            With one of your own the refit is the kernel machine that it makes.
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
    target: Callable = given_labels
    kernel: Callable = inner_product
    importance: Callable | None = None
    output: Callable = predicted
    layer: str | None = None

    def fit(self, task: Task) -> "Representer":
        """Fit the last layer anew, and read each example's importance off its loss."""
        callables(self, "target", "kernel", "output", "importance")
        self.task_, self.fingerprint_, self.layer_ = task, task.fingerprint(), chosen(task, self)
        layer = task.model.get_submodule(self.layer_)
        pieces = [layer.weight] if layer.bias is None else [layer.weight, layer.bias[:, None]]
        self.own_ = torch.cat(pieces, dim=1).detach().double().T                            # [d, c]
        self.phi_ = self.features(task.train)                                               # [n, d]
        outputs = self.phi_ @ self.own_
        targets = learnable(task, outputs, self.target(task, outputs))
        if self.importance is None:
            l2 = task.l2 if self.l2 is None else self.l2
            if not isinstance(l2, Real):
                raise TypeError(f"l2 must be a number, or None for the task's, got {l2!r}: Representer(l2=1e-3)?")
            if not 0 < l2 < float("inf"):
                raise ValueError(f"a representer theorem needs l2 above 0, got {l2}: Representer(l2=1e-3)?")
            found, self.theta_, outputs = machine(task, self.kernel, self.phi_, targets, outputs.shape[1], l2)
            self.alpha_ = residuals(task, outputs, targets) / (len(outputs) * l2)           # [n, c]
            self.facts_ = {"l2": l2, "gradient norm": found.gradient_norm, "passes": found.passes}
        else:
            self.alpha_ = checked(self.importance(task, outputs, targets), "importance", outputs.shape).double()
            self.theta_, self.facts_ = self.own_, {}
        return self

    def features(self, split: Split) -> Tensor:
        """The layer's inputs [n, d] in float64, with a 1 for its bias."""
        bias = self.task_.model.get_submodule(self.layer_).bias is not None
        return F.pad(featured(self.task_, self.layer_, split).x.flatten(1).double(), (0, int(bias)), value=1.0)

    def explained(self, split: Split | None) -> tuple[Split, Tensor]:
        """The examples asked for, and their features [m, d]."""
        split = asked(self, split)[1]
        return split, self.features(split)

    def made(self, phi: Tensor) -> Tensor:
        """The outputs [m, c] that values add up to, from features."""
        dual = self.importance is None and self.kernel is not inner_product
        return (kernel_of(self.kernel, phi, self.phi_) if dual else phi) @ self.theta_

    def values(self, split: Split | None = None) -> Tensor:
        """What each training example adds to each output, [n_test, n_train, c]: their sum over them is `outputs`."""
        _, phi = self.explained(split)
        return kernel_of(self.kernel, phi, self.phi_)[:, :, None] * self.alpha_

    def outputs(self, split: Split | None = None) -> Tensor:
        """The outputs [n_test, c] of the refit (of the network's own layer, with an importance of your own)."""
        return self.made(self.explained(split)[1])

    def global_importance(self) -> Tensor:
        """|alpha_j| of each training example, [n_train]: for all test points alike."""
        asked(self, None)
        return self.alpha_.norm(dim=1)

    def scores(self, split: Split | None = None) -> Scores:
        """The share [n_test, n_train] of each training example in one output of the test points, or of `split`."""
        split, phi = self.explained(split)
        K, own = kernel_of(self.kernel, phi, self.phi_), phi @ self.own_
        weights = checked(self.output(own, split.y), "output", own.shape).to(own)
        name = "logits" if self.task_.loss is cross_entropy else "outputs"
        unit = f"{name} (positive excites, no removal effect)" if self.importance is None else "importance x kernel"
        facts = fidelity(K @ self.alpha_, self.made(phi), own, K.abs() @ self.alpha_.norm(dim=1))
        return Scores(K * (weights @ self.alpha_.T), repr_of(self), self.fingerprint_, split.ids,
                      self.task_.train.ids, unit, {**self.facts_, **facts},
                      {"layer": self.layer_, "bias": "regularised, as the weight of a feature of ones"
                       if self.own_.shape[0] > self.task_.model.get_submodule(self.layer_).in_features else "none"})


def chosen(task: Task, method: Representer) -> str:
    """The name of the layer: the last Linear, or that named in the method, if it is Linear and decides the loss."""
    if method.layer is None:
        return last_linear(task, "Representer")
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


def callables(method, *names: str) -> None:
    """Raise where what should be a function is not; None may stand for an importance."""
    for name in names:
        if not callable(function := getattr(method, name)) and (name, function) != ("importance", None):
            raise TypeError(f"{name} must be a function, got {function!r}: one of those in influence_nb, or your own")


def fidelity(sums: Tensor, whole: Tensor, own: Tensor, terms: Tensor) -> dict:
    """How near values [m, c], summed, come to the outputs that they should add up to; and to the model's own.

    Relative to the outputs; where these are all but 0, to a millionth of the terms [m] that cancel in them.
    """
    size = torch.maximum(whole.norm(dim=1), LEAST * terms).clamp(min=torch.finfo(whole.dtype).tiny)
    facts, one = {"reconstruction error": ((sums - whole).norm(dim=1) / size).tolist()}, own.shape[1] == 1
    if not one:
        facts["same prediction"] = float((sums.argmax(1) == own.argmax(1)).double().mean())
    level = torch.stack([(o if one else o - o.mean(1, keepdim=True)).flatten() for o in (sums, own)])
    if (level.std(1, correction=0) > 0).all():
        facts["Pearson with the model's outputs"] = float(torch.corrcoef(level)[0, 1])
    return facts


@dataclass
class RepresenterLJE:
    """Representer values by local Jacobian expansion: no refit, but the curvature of the last layer as it is.

    One Newton step of the last layer on the task's risk, from theta, is split evenly among the examples but for their
    gradients:

        values[i, j] = (1/n) J_i (theta - H^-1 (g_j + l2 theta_r)),    J_i = d outputs_i / d theta    [c, p]

    They add up to the outputs after the step, which are the model's own where it is at a minimum (reconstruction error
    in the certificate: how far the two are apart). Of the three terms only H^-1 g_j depends on j: the ranking is that
    of `LastLayer`, with an output for its measure, of whose removal effects the values are a constant more.

    Unit: logits, positive excites. The paper divides each share by the features, to multiply with them again: left out
    here, so that a feature may be 0 and a layer have a bias. So is its step of gradient ascent before the expansion.
    Adding a constant to all biases of a softmax is a null direction of H, in which no g_j has a part: pseudo-inverse.

    Cost: that of `LastLayer`, one solve for each test point; values, c solves.

    Args:
        damping: added to H; None for a tenth of its mean eigenvalue.
        output: as for `Representer`.

    Source: Sui, Wu & Sanner (2021), theorem 3.1.
    """

    damping: float | None = 0.0
    output: Callable = predicted

    def fit(self, task: Task) -> "RepresenterLJE":
        """Decompose the curvature of the last layer, and take the Newton step."""
        callables(self, "output")
        begin_head(self, task)
        head, slope = self.head_.task_, risk_gradient(self.head_.task_)
        self.after_ = theta(head) - self.head_.solver_.inverse_times(slope[:, None], self.head_.damping_)[:, 0]
        return self

    def explained(self, split: Split | None) -> tuple[Split, Split, Tensor]:
        """The examples asked for, the same with the layer's inputs for their x, and the model's own outputs [m, c]."""
        task, split = asked(self, split)
        seen = featured(task, self.layer_, split)
        return split, seen, self.head_.task_.outputs(seen)

    def shares(self, seen: Split, U: Tensor) -> Tensor:
        """The shares [n_train, k, m] in k sums of the outputs of each example, whose weights are U [k, m, c]."""
        head, rows = self.head_.task_, replace(seen, y=torch.arange(len(seen)), classes=())  # each finds its weights
        V = Gradients(head, rows, lambda task, outputs, row: U[:, row]).dense().flatten(0, 1).T     # [p, k m]
        X = self.head_.solver_.inverse_times(V, self.head_.damping_)                        # [p, k m]
        level = theta(head) @ V - (penalty(head) * theta(head)) @ X
        values = (level - (self.head_.train_ @ X)[0]) / len(head.train)                     # [n, k m]
        return values.view(len(head.train), *U.shape[:2])

    def values(self, split: Split | None = None) -> Tensor:
        """Each training example's share of each output, [n_test, n_train, c]."""
        _, seen, own = self.explained(split)
        every = torch.eye(own.shape[1]).to(own)[:, None].expand(-1, len(own), -1)           # [c, m, c]
        return self.shares(seen, every).permute(2, 0, 1)

    def scores(self, split: Split | None = None) -> Scores:
        """The share [n_test, n_train] of each training example in one output of the test points, or of `split`."""
        split, seen, own = self.explained(split)
        weights = checked(self.output(own, split.y), "output", own.shape).to(own)
        head, name = self.head_, "logits" if self.task_.loss is cross_entropy else "outputs"
        facts = {"gradient norm": head.gradient_norm_, "damping": head.damping_, **head.solver_.facts(head.damping_)}
        sums = outputs_at(head.task_, self.after_, seen.x)                                  # [m, c]
        return Scores(self.shares(seen, weights[None])[:, 0].T, repr_of(self), self.fingerprint_,
                      split.ids, self.task_.train.ids, f"{name} (positive excites, no removal effect)",
                      {**facts, **fidelity(sums, own, own, sums.norm(dim=1))}, {"layer": self.layer_})
