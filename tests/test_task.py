import copy
import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from problems import digits_task
from torch import nn

from influence_nb import (
    EKFAC,
    Cosine,
    GradDot,
    Influence,
    Scores,
    Split,
    Task,
    cross_entropy,
    fit,
    leave_one_out,
    models,
    squared_error,
)
from influence_nb.task import as_found

X, Y = torch.rand(5, 3), torch.tensor([0, 1, 1, 0, 1])


class Gives(nn.Module):
    """A linear model whose outputs go through a function."""

    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(3, 2), function

    def forward(self, x):
        return self.function(self.linear(x))


@pytest.mark.parametrize("make, error, words", [
    (lambda: Split([[1.0]], Y), TypeError, "x must be a torch.Tensor, got list"),
    (lambda: Split(X, [0, 1]), TypeError, "y must be a torch.Tensor"),
    (lambda: Split(X[:0], Y[:0]), ValueError, "at least one example"),
    (lambda: Split(X, Y[:4]), ValueError, r"y must be \[n\] = \(5,\)"),
    (lambda: Split(X, Y[:, None]), ValueError, r"got \(5, 1\)"),
    (lambda: Split(X.clone().index_fill_(0, torch.tensor([3]), float("nan")), Y), ValueError,
     "1 of 5 examples, first in row 3"),
    (lambda: Split(X, Y / 0), ValueError, "y must be finite"),
    (lambda: Split(X, Y.float(), ("a", "b")), TypeError, "whole numbers, got torch.float32"),
    (lambda: Split(X, Y, ("only",)), ValueError, r"0\.\.0 for 1 classes, got 1 in row 1"),
    (lambda: Split(X, Y - 1), ValueError, "0 or more, got -1"),
    (lambda: Split(X, Y, text=("a", "b")), ValueError, "expected 5, got 2"),
    (lambda: Split(X, Y, ids=torch.tensor([0, 0, 1, 2, 3])), ValueError, "5 different numbers"),
])
def test_a_bad_split_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_take_keeps_ids_and_text_and_a_task_numbers_rows_anew():
    split = Split(X, Y, ("a", "b"), text=tuple("vwxyz"))
    part = split.take([4, 1]).take([0])
    assert part.ids.tolist() == [4] and part.text == ("z",) and torch.equal(part.x[0], X[4])
    assert split.take(Y == 1).ids.tolist() == [1, 2, 4]
    task = Task(models.logistic(3, 2), split.take([4, 1]), split)
    assert task.train.ids.tolist() == [0, 1] and torch.equal(task.train.x[0], X[4])


@pytest.mark.parametrize("change, error, words", [
    (dict(model="net"), TypeError, "torch.nn.Module, got str"),
    (dict(l2=-1.0), ValueError, "l2 must be 0 or more, got -1"),
    (dict(model=models.logistic(3, 2).requires_grad_(False)), ValueError, "nothing was trained"),
    (dict(train=(X, Y)), TypeError, "train must be a Split, got tuple"),
    (dict(test=Split(torch.rand(2, 4), Y[:2])), ValueError, r"one shape, got \(3,\) and \(4,\)"),
    (dict(train=Split(X, Y + 1)), ValueError, r"0\.\.1, the model has 2 outputs; got 2 in row 1"),
    (dict(train=Split(X, Y.float())), TypeError, r"class numbers \(torch.int64\), got y of torch.float32"),
    (dict(train=Split(X.double(), Y)), TypeError, "one floating type, got torch.float64 and torch.float32"),
    (dict(loss=nn.functional.cross_entropy), ValueError, r"one value an example, expected shape \(2,\), got \(\)"),
    (dict(model=models.logistic(4, 2)), ValueError, r"does not take examples of shape \(3,\)"),
    (dict(measure=lambda out, y: out), ValueError, "measure must give one value an example"),
    (dict(model=models.logistic(3, 1)), ValueError, "at least 2 outputs, got 1: squared_error, or a loss on one logit"),
    (dict(model=nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))), ValueError, "at least 2 outputs, got 1"),
    (dict(model=Gives(lambda o: (o, o))), TypeError, "expected a Tensor of outputs, got tuple: wrap the model"),
    (dict(model=Gives(lambda o: {"logits": o})), TypeError, "expected a Tensor of outputs, got dict: wrap the model"),
    (dict(model=Gives(lambda o: o[:, :1].squeeze()), loss=squared_error), ValueError,
     r"row of outputs, expected shape \(1, ...\) for 1, got \(\): squeeze\(-1\)"),
    (dict(model=Gives(lambda o: nn.functional.dropout(o, training=True))), ValueError,
     "for itself, but its outputs change .* dropout"),
    (dict(model=Gives(lambda o: o / o.norm(dim=0))), ValueError, "outputs change with the others .* over the batch"),
    (dict(model=Gives(lambda o: o.sum(0, keepdim=True))), ValueError, r"expected shape \(2, ...\) for 2, got \(1, 2\)"),
])
def test_a_bad_task_is_refused(change, error, words):
    parts = dict(model=models.logistic(3, 2), train=Split(X, Y), test=Split(X[:2], Y[:2])) | change
    with pytest.raises(error, match=words):
        Task(**parts)


def test_losses_are_the_textbook_ones():
    outputs = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 3.0]])
    by_hand = outputs.exp().sum(1).log() - outputs[[0, 1], [2, 0]]
    assert torch.allclose(cross_entropy(outputs, torch.tensor([2, 0])), by_hand)
    assert torch.allclose(squared_error(torch.tensor([[3.0], [1.0]]), torch.tensor([1.0, 1.5])),
                          torch.tensor([2.0, 0.125]))


def test_predictions_losses_and_mistakes_do_not_depend_on_the_batch():
    task = digits_task()
    with torch.no_grad():
        outputs = task.model(task.test.x)
    assert torch.allclose(task.outputs(batch_size=4), outputs)
    assert torch.equal(task.mistakes(), (outputs.argmax(1) != task.test.y).nonzero()[:, 0])
    assert torch.allclose(task.losses(), nn.functional.cross_entropy(outputs, task.test.y, reduction="none"))


def test_fingerprint_sees_weights_labels_loss_and_l2():
    task = digits_task()
    same, other = task.to(torch.float64), task.to(torch.float64)
    assert same.fingerprint() == task.fingerprint()
    with torch.no_grad():
        other.model.linear1.bias[0] += 1e-9
    flipped = Split(task.train.x, (task.train.y + 1) % 4, task.train.classes)
    prints = {task.fingerprint(), other.fingerprint(), Task(task.model, flipped, task.test, l2=task.l2).fingerprint(),
              Task(task.model, task.train, task.test, l2=0.1).fingerprint()}
    assert len(prints) == 4
    task.model.linear1.bias.requires_grad_(False)
    assert task.fingerprint() not in prints
    task.model.linear1.bias.requires_grad_(True)
    assert task.fingerprint() in prints


def test_a_fingerprint_sees_what_the_model_computes():
    def print_of(model, **parts):
        return replace(digits_task(trained=False), model=model.double(), **parts).fingerprint()

    def net(activation=nn.Tanh, p=0.1):
        return nn.Sequential(models.mlp([9, 5, 4], activation), nn.Dropout(p))

    loss = partial(nn.CrossEntropyLoss, reduction="none")
    prints = [print_of(net()), print_of(net(nn.ReLU)), print_of(net(p=0.2)), print_of(net(), loss=loss()),
              print_of(net(), loss=loss(label_smoothing=0.3)), print_of(net(), measure=lambda o, y: o[:, 0]),
              print_of(net(), measure=lambda o, y: o[:, 1]), print_of(net(), regularised=lambda name: True)]
    assert len(set(prints)) == len(prints)
    assert prints[0] == print_of(net().train()) == print_of(net().eval())
    hooked = net()
    hooked.register_forward_hook(lambda *given: None)
    assert prints[0] == print_of(hooked)


def further_step(task):
    fit(task, 1, batch_size=7, progress=False)


def other_weights(task):
    task.model.load_state_dict(models.logistic(9, 4, seed=1).double().state_dict())


def other_storage(task):
    task.model.linear1.bias.data = task.model.linear1.bias.data + 1


def frozen(task):
    task.model.linear1.bias.requires_grad_(False)


def flipped(task):
    task.train.y[0] = (task.train.y[0] + 1) % 4


@pytest.mark.parametrize("change", [further_step, other_weights, other_storage, frozen, flipped])
@pytest.mark.parametrize("method", [Influence(), GradDot(), EKFAC(), Cosine("linear1")], ids=lambda m: type(m).__name__)
def test_scores_after_a_change_of_the_model_are_refused_until_the_next_fit(method, change):
    task = digits_task()
    before = method.fit(task).scores().values
    change(task)
    with pytest.raises(ValueError, match=rf"changed since {type(method).__name__} was fitted.*call \.fit\(task\)"):
        method.scores()
    after = method.fit(task).scores()
    assert after.task == task.fingerprint()
    if change in (further_step, other_weights):
        assert (after.values - before).norm() > 1e-6 * before.norm()


def test_scores_stand_while_the_model_is_as_it_was():
    task = digits_task()
    method = Influence().fit(task)
    scores, state = method.scores().values, copy.deepcopy(task.model.state_dict())
    leave_one_out(task, [3], progress=False)       # on a copy
    task.model.train(), task.losses(), task.to(torch.float32)
    other = copy.deepcopy(method)                  # with a model of its own
    fit(task, 1, progress=False)
    assert torch.equal(other.scores().values, scores)
    task.model.load_state_dict(state)              # back again
    assert torch.equal(method.scores().values, scores)
    with torch.no_grad():
        other.task_.model.linear1.bias += 1
    with pytest.raises(ValueError, match="changed since"):
        other.self_influence()
    assert torch.equal(method.scores().values, scores)


def scores_of(values, **more):
    n_test, n_train = values.shape
    return Scores(values, "Toy()", "0123", torch.arange(n_test) + 7, torch.arange(n_train), **more)


def test_top_gives_the_strongest_of_each_sign_in_order():
    top = scores_of(torch.tensor([[0.1, -3.0, 2.0, 0.0, 5.0, -1.0]])).top(7, k=3)
    assert top.helpful == [4, 2, 0] and top.harmful == [1, 5] and top.harmful_scores == [-3.0, -1.0]
    ranked = scores_of(torch.tensor([[0.1, 3.0, 2.0]]), unit="cosine similarity (ranked only)").top(7, k=2)
    assert ranked.helpful == [1, 2] and ranked.harmful == [0, 2]
    with pytest.raises(KeyError, match="no test point 3 in these scores, which hold 1: 7"):
        scores_of(torch.rand(1, 4)).top(3)


def test_a_transposed_matrix_is_refused_with_the_cure():
    with pytest.raises(ValueError, match=r"\(2, 3\), got \(3, 2\): transpose\?"):
        Scores(torch.rand(3, 2), "Toy()", "0123", torch.arange(2), torch.arange(3))


def test_scores_survive_a_file_and_refuse_another_task(tmp_path):
    task = digits_task()
    scores = Influence().fit(task).scores(task.test.take([3, 8]))
    path = scores.save(tmp_path / "scores")
    loaded = Scores.load(path, task)
    assert torch.equal(loaded.values, scores.values) and loaded.test_ids.tolist() == [3, 8]
    assert (loaded.method, loaded.unit, loaded.certificate) == (scores.method, scores.unit, scores.certificate)
    assert loaded.provenance["versions"]["torch"] == torch.__version__
    with pytest.raises(ValueError, match=r"expected scores of task \w+, got .* compute the scores again"):
        Scores.load(path, digits_task(seed=1))


@pytest.mark.parametrize("damage", ["cut", "flip", "text", "other npz", "pickle"])
def test_a_damaged_or_foreign_scores_file_is_refused(tmp_path, damage):
    path = scores_of(torch.rand(20, 30)).save(tmp_path / "scores.npz")
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[200] ^= 255
        path.write_bytes(data)
    elif damage == "text":
        path.write_text("not an archive")
    elif damage == "other npz":
        np.savez(path, a=np.arange(3))
    else:
        np.savez(path, values=np.array([{}], dtype=object), records=np.array("{}"))
    with pytest.raises(ValueError, match="expected a scores file written by Scores.save, got scores.npz"):
        Scores.load(path)


def test_what_a_notebook_shows_is_escaped_and_says_unit_and_sign():
    page = scores_of(torch.rand(2, 3), certificate={"<b>note": "<script>"})._repr_html_()
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "nats per removed example" in page and "positive = helpful" in page
    task = digits_task()
    assert "ranked only" in GradDot().fit(task).scores()._repr_html_()
    assert np.asarray(scores_of(torch.rand(2, 3))).shape == (2, 3)


def test_one_thread_at_a_time_has_a_model_and_finds_it_as_it_was():
    model, inside, seen = nn.Linear(3, 2).train(), threading.Event(), []

    def other():
        inside.wait(10)
        with as_found(model):
            seen.append("other")

    thread = threading.Thread(target=other)
    thread.start()
    with as_found(model):
        with as_found(model):  # the same thread may nest
            inside.set()
            thread.join(0.2)
        seen.append("first")
        assert not model.training
    thread.join(10)
    assert seen == ["first", "other"] and model.training


def test_a_dot_in_the_name_of_a_scores_file_is_part_of_the_name(tmp_path):
    scores = Influence().fit(task := digits_task()).scores()
    paths = {scores.save(tmp_path / f"damping_0.0{k}") for k in (1, 5)}
    assert {path.name for path in paths} == {"damping_0.01.npz", "damping_0.05.npz"}
    assert all(torch.equal(Scores.load(path, task).values, scores.values) for path in paths)


def test_a_regression_has_no_mistakes():
    x, y = torch.rand(5, 3), torch.rand(5)
    with pytest.raises(TypeError, match="mistakes are for classes, got targets of torch.float32"):
        Task(models.logistic(3, 1), Split(x, y), Split(x, y), loss=squared_error).mistakes()
