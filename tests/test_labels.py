"""Suspicion scores against closed forms, retraining, scikit-learn and cleanlab; checking and repairing, by counts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from cleanlab.count import compute_confident_joint
from cleanlab.rank import get_label_quality_scores
from problems import digits_task
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression

from influence_nb import Influence, Split, Task, data, labels, leave_one_out, models
from influence_nb.checks import snapshot, untouched


def two_classes(n=53, n_test=11, d=5, l2=3e-2, seed=0):
    """Softmax regression at its minimum, biases regularised, on two clouds of unequal spread: p = 12."""
    random = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (n + n_test,), generator=random)
    x = torch.randn(n + n_test, d, generator=random, dtype=torch.float64) * (1 + 2 * y[:, None]) + y[:, None]
    train, test = Split(x[:n], y[:n], ("near", "far")), Split(x[n:], y[n:], ("near", "far"))
    return labels.last_layer(Task(models.logistic(d, 2).double(), train, test, l2=l2))


@pytest.fixture(scope="module")
def pair():
    return two_classes()


@pytest.fixture(scope="module")
def four():
    """Four classes, a quarter of the labels flipped: (task, planted), p = 40."""
    task = digits_task(n=60, n_test=90)
    flipped, planted = data.flip_labels(task.train, 0.25, seed=1)
    return labels.last_layer(replace(task, train=flipped)), planted


def order(suspicion):
    return labels.ranked(suspicion).tolist()


def share(task):
    """1 less the chance of the label as given, [n]."""
    return 1 - task.outputs(task.train).softmax(1).gather(1, task.train.y[:, None])[:, 0]


# the last layer
def test_the_last_layer_is_scikit_learns_softmax_regression_and_leaves_the_network_alone():
    net = digits_task(40, 7, 2e-2, model=models.mlp([9, 5, 4]), trained=False)
    before = snapshot(net.model)
    task = labels.last_layer(net, l2=0.05)
    assert untouched(net.model, before) and task.l2 == 0.05 and task.train.classes == net.train.classes
    features = torch.nn.functional.pad(task.train.x, (0, 1), value=1.0)
    theirs = LogisticRegression(C=1 / (40 * 0.05), fit_intercept=False, tol=1e-10, max_iter=5000)
    theirs.fit(features.numpy(), net.train.y.numpy())
    own = torch.cat([task.model.weight, task.model.bias[:, None]], 1).detach().numpy()
    assert np.abs(own - theirs.coef_).max() < 1e-6 * np.abs(own).max()
    again = labels.last_layer(task)
    assert torch.allclose(again.model.weight, task.model.weight, rtol=1e-9) and torch.equal(again.test.x, task.test.x)
    hidden = torch.tanh(net.model.linear1(net.test.x.flatten(1)))
    assert torch.equal(task.test.x, hidden.detach())


def test_a_last_layer_without_bias_stays_without():
    task = two_classes()
    bare = labels.last_layer(replace(task, model=torch.nn.Linear(5, 2, bias=False).double()))
    assert bare.model.bias is None and bare.model.weight.shape == (2, 5)


# closed forms of two classes
def test_loss_margin_and_importance_rank_alike(pair):
    sigma, n = share(pair), len(pair.train)
    assert torch.allclose(labels.loss(pair), -torch.log1p(-sigma), rtol=1e-9)
    assert torch.allclose(labels.margin(pair), torch.logit(sigma), rtol=1e-7, atol=1e-9)
    assert torch.allclose(labels.importance(pair), 2**0.5 * sigma / (n * pair.l2), rtol=1e-7)
    ranking = order(labels.loss(pair))
    assert ranking == order(labels.margin(pair)) == order(labels.importance(pair)) == order(sigma)
    assert ranking != order(labels.self_influence(pair))


def test_self_influence_is_sigma_squared_q(pair):
    x, n, sigma = torch.nn.functional.pad(pair.train.x, (0, 1), value=1.0), len(pair.train), share(pair)
    S = x.T @ (x * (sigma * (1 - sigma))[:, None]) / n
    q = (x @ torch.linalg.inv(2 * S + pair.l2 * torch.eye(6).double()) * x).sum(1)
    exact = 2 / n * sigma**2 * q
    assert torch.allclose(labels.self_influence(pair), exact, rtol=1e-6)
    gradient = 2 / n * sigma**2 * x.square().sum(1)             # without the curvature it is another ranking,
    for other in (gradient, 2 / n * sigma * q):                 # and so it is with the published sigma for sigma^2
        assert order(other) != order(exact) and spearmanr(other, exact).statistic < 0.99


# more classes
def test_with_more_classes_importance_is_not_the_loss(four):
    task, _ = four
    residual = torch.nn.functional.one_hot(task.train.y, 4) - task.outputs(task.train).softmax(1)
    exact = residual.norm(dim=1) / (len(task.train) * task.l2)
    assert torch.allclose(labels.importance(task), exact, rtol=1e-7)
    assert order(labels.loss(task)) != order(exact)


def test_self_influence_is_the_diagonal_of_influence(four):
    task, _ = four
    whole = Influence().fit(task).scores(task.train).values
    assert torch.allclose(labels.self_influence(task), whole.diagonal(), rtol=1e-9)


def test_refined_self_influence_is_what_retraining_finds(four):
    task, _ = four
    ids = [3, 17, 40, 59]
    on_itself = replace(task, test=task.train.take(ids))
    truth = leave_one_out(on_itself, ids, progress=False).diagonal()
    refined, first = labels.refined(task)[ids], labels.self_influence(task)[ids]
    assert (refined / truth - 1).abs().max() < 2e-3             # paths end at a hundredth of the first step
    assert (first / truth - 1).abs().max() > 0.05               # first order is not that near
    without = (labels.loss(task)[ids] + refined).tolist()       # the loss of a model that never saw the example
    for loss, j in zip(without, ids):
        rest = labels.last_layer(replace(task, train=task.train.take([i for i in range(60) if i != j]),
                                         l2=task.l2 * 60 / 59))                  # n stays n
        assert loss == pytest.approx(float(rest.losses(task.train.take([j]))[0]), rel=2e-3)


def test_kronecker_is_near_the_exact_order(four):
    task, _ = four
    assert spearmanr(labels.kronecker(task), labels.self_influence(task)).statistic > 0.9


def test_scores_are_of_the_label_as_given(four):
    task, planted = four
    j = int(planted.rows[0])
    mended = labels.last_layer(replace(task, train=labels.repaired(task.train, planted, [j])))
    for name, suspicion in labels.SUSPICIONS.items():
        if name != "random":
            assert suspicion(task)[j] > suspicion(mended)[j], name


# confident learning
def test_confident_learning_is_cleanlabs(four):
    task, _ = four
    y, chances = task.train.y.numpy(), labels.held_out(task).softmax(1).numpy()
    quality = get_label_quality_scores(y, chances, method="normalized_margin", adjust_pred_probs=True)
    assert order(labels.confident(task)) == np.argsort(quality, kind="stable").tolist()
    plain = get_label_quality_scores(y, chances, method="normalized_margin")
    assert np.argsort(plain, kind="stable").tolist() != np.argsort(quality, kind="stable").tolist()
    theirs = compute_confident_joint(y, chances, calibrate=False)
    assert labels.confident_joint(task).tolist() == theirs.tolist()
    assert 0 < np.trace(theirs) < theirs.sum() < 60             # some are on the diagonal, some off, some nowhere


def test_a_class_without_examples_is_never_likely(four):
    task, _ = four
    three = task.train.take(task.train.y != 2)
    part = labels.last_layer(replace(task, train=three))
    assert torch.isfinite(labels.confident(part)).all() and labels.confident_joint(part)[:, 2].sum() == 0


def test_held_out_outputs_know_neither_the_label_nor_the_example(four):
    task, _ = four
    own = labels.held_out(task)
    y = task.train.y.clone()
    y[7] = (y[7] + 1) % 4
    other = labels.held_out(replace(task, train=replace(task.train, y=y)))
    assert torch.equal(own[7], other[7]) and (own - other).abs().amax(1).gt(1e-6).sum() > 40
    alone = labels.held_out(task, folds=60)                     # every example is its own fold: leave-one-out
    rest = labels.last_layer(replace(task, train=task.train.take([i for i in range(60) if i != 5])))
    assert torch.allclose(alone[5], rest.outputs(task.train.take([5]))[0], rtol=1e-7)
    for folds in (1, 61):
        with pytest.raises(ValueError, match=f"folds must lie in 2..60, got {folds}"):
            labels.held_out(task, folds)


# checking
def test_found_counts_the_flips_among_the_first(four):
    _, planted = four
    perfect = torch.zeros(60).double()
    perfect[planted.rows] = 1
    assert len(planted.rows) == 15
    counts = labels.found(perfect, planted)
    assert counts.shape == (61,) and torch.allclose(counts, (torch.arange(61) / 15).clamp(max=1).double())
    worst = labels.found(-perfect, planted)
    assert worst[45] == 0 and worst[60] == 1
    small = data.Planted(*torch.tensor([[1, 2], [1, 2], [0, 0], [1, 1]]))
    assert labels.found(torch.tensor([0.5, 0.1, 0.5]), small).tolist() == [0, 0, 0.5, 1]    # of equals, the lower id


def test_checked_labels_are_repaired_and_the_layer_fitted_again(four):
    task, planted = four
    given, clean = task.train.y, labels.repaired(task.train, planted, range(60)).y
    assert (given != clean).nonzero()[:, 0].tolist() == planted.rows.tolist()
    some = labels.repaired(task.train, planted, [int(planted.rows[2]), 0]).y
    assert (some != given).nonzero()[:, 0].tolist() == [int(planted.rows[2])] and torch.equal(task.train.y, given)
    suspicion = labels.loss(task)
    reached = labels.accuracies(task, planted, suspicion, [0, 20, 60])
    half = replace(task, train=labels.repaired(task.train, planted, order(suspicion)[:20]))
    for accuracy, train in zip(reached, (task.train, half.train, replace(task.train, y=clean)), strict=True):
        model = labels.last_layer(replace(task, train=train))
        assert accuracy == (model.predict() == model.test.y).double().mean()
    assert reached[2] > reached[0]


def test_asking_again_is_to_rank_what_is_left_by_the_repaired_model(four):
    task, planted = four
    once = labels.loss(task)
    assert order(labels.asked_again(task, planted, labels.loss, [60])) == order(once)
    assert order(labels.asked_again(task, planted, labels.loss, [])) == order(once)
    again = order(labels.asked_again(task, planted, labels.loss, [10, 25]))
    assert sorted(again) == list(range(60)) and again[:10] == order(once)[:10]
    middle = labels.last_layer(replace(task, train=labels.repaired(task.train, planted, again[:10])))
    left = [i for i in order(labels.loss(middle)) if i not in again[:10]]
    assert again[10:25] == left[:15]
    assert again[25:] == [i for i in order(once) if i not in again[:25]] and again != order(once)
    with pytest.raises(ValueError, match="counts that grow"):
        labels.asked_again(task, planted, labels.loss, [25, 10])
    with pytest.raises(ValueError, match="counts that grow"):
        labels.asked_again(task, planted, labels.loss, [len(task.train) + 1])
