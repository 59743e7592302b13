"""Which labels are wrong? Suspicion scores of training examples, and how soon each of them finds planted flips.

A suspicion is a function, task -> Tensor [n_train]. Whoever checks labels by hand begins with the largest, puts right
what is wrong, and trains again. Here the model that is suspicious, and is trained again, is a last layer, `last_layer`,
whose minimum is found to rounding: two curves then differ by their scores alone.

With two classes, p the chance of the label as given and every weight regularised, x the features (with a 1 for the
bias), S = mean_j p_j (1 - p_j) x_j x_j^T and sigma = 1 - p, cross-entropy has

    loss = - log p,    |alpha| = sqrt(2) sigma / (n l2),    self-influence = (2 / n) sigma^2 x^T (2 S + l2)^-1 x:

loss, margin and |alpha| rank alike, and self-influence also asks where the example lies. (The figure by which |alpha|
became known for this leaves the loss out, and its influence has sigma for sigma^2, an error of the code then in use.)

Sources: Koh & Liang (2017), section 5.4; Yeh et al. (2018); Northcutt, Jiang & Chuang (2021).
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from .attribute.influence import Influence
from .attribute.kfac import EKFAC
from .attribute.refine import Refined
from .attribute.representer import Representer
from .data import Planted
from .task import Split, Task


def everything(name: str) -> bool:
    """The choice of all parameters as regularised, biases too."""
    return True


def last_layer(task: Task, l2: float | None = None) -> Task:
    """The last layer of a task as a task of its own, on the features [n, d], in float64, and at its exact minimum.

    The bias is regularised with the rest, as for `Representer`, whose refit this is: the original stays as it is.

    Args:
        l2: of the last layer; None for the task's.

    Raises: as for `Representer`.
    """
    fitted = Representer(l2).fit(task)
    d = task.model.get_submodule(fitted.layer_).in_features
    linear = nn.Linear(*fitted.theta_[:d].shape, bias=len(fitted.theta_) > d, dtype=torch.float64)
    with torch.no_grad():
        for parameter, rows in zip(linear.parameters(), (fitted.theta_[:d].T, *fitted.theta_[d:])):
            parameter.copy_(rows)
    train, test = (replace(split, x=fitted.features(split)[:, :d]) for split in (task.train, task.test))
    return Task(linear, train, test, task.loss, fitted.facts_["l2"], task.measure, everything)


# suspicions: task -> [n_train]; the class that a score is of is that of the label as given
def at_random(task: Task, seed: int = 0) -> Tensor:
    """Numbers drawn at random: what any score has to beat."""
    return torch.rand(len(task.train), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss(task: Task) -> Tensor:
    """The loss of each training example, in its own unit: the plainest score, and the one to beat."""
    return task.losses(task.train)


def margin(task: Task) -> Tensor:
    """By how much the best other class leads the label, in logits."""
    return lead(task.outputs(task.train), task.train.y)


def importance(task: Task) -> Tensor:
    """|alpha| of representer values, in logits per squared feature."""
    return Representer().fit(task).global_importance()


def self_influence(task: Task) -> Tensor:
    """The rise of each example's own loss on its removal, to first order, in nats."""
    return Influence().fit(task).self_influence()


def refined(task: Task) -> Tensor:
    """The same as retraining has it, in nats."""
    return Refined(progress=False).fit(task).self_influence()


def kronecker(task: Task) -> Tensor:
    """The same by EK-FAC, damped by a tenth of the GGN's mean eigenvalue, in nats."""
    return EKFAC().fit(task).self_influence()


def confident(task: Task, folds: int = 5, seed: int = 0) -> Tensor:
    """By how much the best other class leads the label in chances that know neither the example nor, each less its
    class's mean over the examples that are labelled so, that a model is surer of some classes than of others.

    Cost: `folds` refits of the last layer. The features stay those of all examples.

    Source: the thresholds of Northcutt, Jiang & Chuang (2021), eq. 2, in the ranking of their library, cleanlab
    (normalized margins with adjusted chances).
    """
    chances = held_out(task, folds, seed).softmax(1)
    return lead(chances - thresholds(chances, task.train.y), task.train.y)


SUSPICIONS = {"random": at_random, "loss": loss, "margin": margin, "|alpha|": importance,
              "self-influence": self_influence, "refined self-influence": refined,
              "EK-FAC self-influence": kronecker, "confident learning": confident}


def lead(values: Tensor, y: Tensor) -> Tensor:
    """By how much the largest of the other values [n, c] of a row exceeds that of class y, [n]."""
    own = values.gather(1, y[:, None])[:, 0]
    return values.scatter(1, y[:, None], -torch.inf).amax(1) - own


def held_out(task: Task, folds: int = 5, seed: int = 0) -> Tensor:
    """The outputs [n_train, c] for each training example of a last layer fitted without its fold."""
    n, outputs = len(task.train), None
    if not 2 <= folds <= n:
        raise ValueError(f"folds must lie in 2..{n}, got {folds}")
    fold = torch.randperm(n, generator=torch.Generator().manual_seed(seed)) % folds
    for k in range(folds):
        part = replace(task, train=task.train.take(fold != k), test=task.train.take(fold == k))
        found = last_layer(part).outputs()
        outputs = found.new_empty(n, found.shape[1]) if outputs is None else outputs
        outputs[fold == k] = found
    return outputs


def thresholds(chances: Tensor, y: Tensor) -> Tensor:
    """The mean chance [c] of each class over the examples labelled so: from there on, one is confident of it."""
    return torch.stack([chances[y == k, k].mean() if (y == k).any() else chances.new_tensor(torch.inf)
                        for k in range(chances.shape[1])])


def confident_joint(task: Task, folds: int = 5, seed: int = 0) -> Tensor:
    """Counts [c, c] of the examples labelled j (row) that one is confident are of class k (column): off the diagonal
    are, as far as these chances know, the wrong labels.

    Source: Northcutt, Jiang & Chuang (2021), eq. 1.
    """
    chances, y = held_out(task, folds, seed).softmax(1), task.train.y
    sure = chances >= thresholds(chances, y)
    likely, some = (chances * sure).argmax(1), sure.any(1)
    c = chances.shape[1]
    return (y[some] * c + likely[some]).bincount(minlength=c * c).view(c, c)


# how well a suspicion does where the flips are known
def ranked(suspicion: Tensor) -> Tensor:
    """Ids in the order of checking: the largest first, ties by id."""
    return torch.argsort(-suspicion, stable=True)


def found(suspicion: Tensor, planted: Planted) -> Tensor:
    """The share [n + 1] of the planted flips among the first k checked, k = 0..n."""
    hits = torch.zeros(len(suspicion) + 1, dtype=torch.float64)
    hits[1 + torch.argsort(ranked(suspicion))[planted.rows]] = 1
    return hits.cumsum(0) / len(planted.rows)


def repaired(split: Split, planted: Planted, ids) -> Split:
    """The split after the labels of examples `ids` were checked: of these, the planted ones have their old label."""
    y, mine = split.y.clone(), torch.isin(planted.rows, torch.as_tensor(ids))
    y[planted.rows[mine]] = planted.old[mine]
    return replace(split, y=y)


def accuracies(task: Task, planted: Planted, suspicion: Tensor, checked) -> Tensor:
    """The test accuracy [k] of the last layer, fitted again, after the `checked` [k] most suspicious were checked."""
    order = ranked(suspicion)
    again = [last_layer(replace(task, train=repaired(task.train, planted, order[:count]))) for count in checked]
    return torch.stack([(one.predict() == one.test.y).double().mean() for one in again])


def asked_again(task: Task, planted: Planted, suspicion: Callable, checked) -> Tensor:
    """A suspicion [n_train] in the order in which labels are checked when the last layer is fitted again after each of
    the `checked` counts, growing, and is then asked for the most suspicious of the rest. Last, in the first order, are
    those beyond the last count."""
    checked = [int(count) for count in checked]
    if sorted({0, *checked}) != [0, *checked] or checked[-1:] > [len(task.train)]:
        raise ValueError(f"expected counts that grow, in 1..{len(task.train)}, got {checked}")
    first = ranked(suspicion(task))
    order = first[:0]
    for count in checked:
        again = suspicion(last_layer(replace(task, train=repaired(task.train, planted, order)))).clone()
        again[order] = -torch.inf
        order = torch.cat([order, ranked(again)[:count - len(order)]])
    order = torch.cat([order, first[~torch.isin(first, order)]])
    return -torch.argsort(order).double()
