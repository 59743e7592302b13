from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from problems import digits_task
from torch import nn

from influence_nb import Split, Task, fit, gradients, newton


def test_full_batch_descent_is_gradient_descent_on_the_risk():
    task = digits_task(n=12, l2=0.3, trained=False)
    expected = gradients.theta(task)
    for _ in range(3):
        newton.move(task, expected)
        expected = expected - 0.1 * gradients.risk_gradient(task)
    again = digits_task(n=12, l2=0.3, trained=False)
    fit(again, epochs=3, batch_size=12, optimizer=partial(torch.optim.SGD, lr=0.1), progress=False)
    assert torch.allclose(gradients.theta(again), expected, atol=1e-12)


def test_weights_of_zero_leave_examples_out_and_n_stays_n():
    w = torch.ones(12, dtype=torch.float64)
    w[[2, 7]] = 0
    weighted, other = digits_task(n=12, trained=False), digits_task(n=12, trained=False)
    fit(weighted, epochs=5, batch_size=12, w=w, progress=False)
    changed = Split(other.train.x.clone().index_fill_(0, torch.tensor([2, 7]), 9.0), other.train.y, other.train.classes)
    fit(Task(other.model, changed, other.test, l2=other.l2), epochs=5, batch_size=12, w=w, progress=False)
    assert torch.equal(gradients.theta(weighted), gradients.theta(other))  # what they hold cannot matter


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.int64])
def test_weights_of_any_type_are_those_of_the_model(kind):
    w, ends = torch.ones(12).index_fill_(0, torch.tensor([2, 7]), 0), []
    for each in (w.double(), w.to(kind)):
        task = digits_task(n=12, trained=False)
        fit(task, epochs=2, batch_size=5, w=each, progress=False)
        ends.append(gradients.theta(task))
    assert torch.equal(*ends)


def test_threads_of_one_process_train_as_one_alone():
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 6), nn.Dropout(0.5), nn.Linear(6, 4))
    whole, random = digits_task(n=23, model=net, trained=False), torch.get_rng_state()

    def run(seed):
        task = whole.to(torch.float64)
        fit(task, epochs=9, batch_size=3, seed=seed, progress=False)
        return gradients.theta(task)

    def look(seed):
        return whole.losses()  # in eval mode it draws nothing, and must not put back what others have drawn

    with ThreadPoolExecutor(4) as pool:
        ends, _ = list(pool.map(run, range(8))), list(pool.map(look, range(40)))
    assert all(torch.equal(end, run(seed)) for seed, end in enumerate(ends))
    assert torch.equal(random, torch.get_rng_state())


def test_seed_decides_history_and_checkpoints_are_kept():
    runs = []
    for seed in (0, 0, 1):
        task, random = digits_task(n=13, trained=False), torch.get_rng_state()
        history = fit(task, epochs=4, batch_size=5, schedule=lambda epoch: 0.5**epoch,
                      keep=lambda epoch: epoch in (1, 3),
                      seed=seed, progress=False)
        assert torch.equal(random, torch.get_rng_state())
        runs.append((gradients.theta(task), history))
    assert torch.equal(runs[0][0], runs[1][0]) and not torch.equal(runs[0][0], runs[2][0])
    history = runs[0][1]
    assert len(history.risk) == 4 and history.risk[-1] < history.risk[0]
    assert [(c.epoch, c.lr) for c in history.checkpoints] == [(1, 1e-3), (3, 2.5e-4)]
    assert not torch.equal(history.checkpoints[0].state["linear1.weight"],
                           history.checkpoints[1].state["linear1.weight"])


def test_mode_flags_and_gradients_are_left_as_found():
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    net[1].weight.requires_grad_(False)
    task = digits_task(n=12, model=net, trained=False)
    net.train(), net[2].eval()
    modes, frozen = [m.training for m in net.modules()], net[1].weight.clone()
    fit(task, epochs=1, batch_size=6, progress=False)
    assert [m.training for m in net.modules()] == modes and torch.equal(net[1].weight, frozen)
    assert all(p.grad is None for p in net.parameters()) and not net[1].weight.requires_grad


@pytest.mark.parametrize("call, error, words", [
    (lambda t: fit(t, epochs=1, w=torch.ones(3), progress=False), ValueError, r"\[n\] = \(12,\) .* got \(3,\)"),
    (lambda t: fit(t, epochs=1, batch_size=0, progress=False), ValueError, "batch_size 1 or more"),
    (lambda t: fit(t, epochs=40, batch_size=12, optimizer=partial(torch.optim.SGD, lr=1e200), progress=False),
     ValueError,
     "a smaller learning rate"),
])
def test_bad_training_calls_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call(digits_task(n=12, trained=False))
