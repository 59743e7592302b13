import copy
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import digits_task, mlp_task
from torch import nn

from influence_nb import (
    Split,
    Task,
    audit,
    converge,
    data,
    expected_effects,
    fit,
    fit_many,
    leave_group_out,
    leave_one_out,
    models,
    pearson,
    removal_effects,
    slope,
    subsets,
)
from influence_nb.checks import snapshot, untouched

HERE = Path(__file__).parent
RUN = {"epochs": 3, "batch_size": 7, "optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9), "progress": False}


def margin(outputs, y):
    return outputs[:, 0] - outputs[:, 1]


def small(n=23, **changes):
    """An untrained network on n examples."""
    return replace(digits_task(n=n, model=models.mlp([9, 5, 4]), trained=False), **changes)


def lost(task, w):
    """A retrainer whose second model has infinite weights."""
    ensemble = fit_many(task, w, 1, progress=False)
    ensemble.thetas[1] = float("inf")
    return ensemble


def test_leave_one_out_and_groups_equal_retraining_from_scratch_without_the_examples():
    from sklearn.linear_model import LogisticRegression

    task, groups = digits_task(n=30), [[4], [21], [3, 8, 21, 22], range(10)]
    effects = leave_group_out(task, groups, progress=False)
    assert torch.equal(leave_one_out(task, [4, 21], progress=False), effects[:, :2])
    x, y, z = task.train.x.flatten(1).numpy(), task.train.y.numpy(), task.test.x.flatten(1).numpy()

    def test_losses(keep):  # C = 1/(n l2) with n = 30 in all: n stays n
        oracle = LogisticRegression(C=1 / (30 * task.l2), tol=1e-13, max_iter=10000).fit(x[keep], y[keep])
        return -torch.tensor(oracle.predict_log_proba(z))[torch.arange(9), task.test.y]

    everything = list(range(30))
    for column, group in enumerate(groups):
        rest = [i for i in everything if i not in group]
        assert torch.allclose(effects[:, column], test_losses(rest) - test_losses(everything), atol=1e-6)


def test_the_task_is_left_as_found_and_bad_ids_are_refused():
    task = digits_task(n=20)
    before = snapshot(task.model)
    leave_one_out(task, [0], progress=False)
    removal_effects(task, subsets(20, 2), partial(fit, **RUN), progress=False)
    assert untouched(task.model, before)
    for ids, words in [([3, 20], "20"), (torch.arange(20) < 3, "a mask of 20: mask.nonzero"), ({1, 2}, "set"),
                       ([2.5], r"numbers of torch.float32: ids.long\(\)"), ([7, 7], "7 more than once"), ([], "none")]:
        with pytest.raises(ValueError, match=rf"training ids in 0\.\.19, got {words}"):
            leave_one_out(task, ids)
        with pytest.raises(ValueError, match=rf"training ids in 0\.\.19, got {words}"):
            leave_group_out(task, [[1], ids])
    with pytest.raises(ValueError, match=r"\[m, n\] = \(m, 20\), got \(20, 3\)"):
        removal_effects(task, subsets(20, 3).T)
    for together, retrain in [(5, None), (2.5, partial(fit_many, **RUN)), (0, partial(fit_many, **RUN))]:
        with pytest.raises(ValueError, match="together= needs a retrain"):
            leave_one_out(task, [3], together=together, retrain=retrain)
    with pytest.raises(ValueError, match=r"retraining without \['none', \[7\]\] failed: expected finite test losses"):
        leave_one_out(task, [7], retrain=lost, together=9, progress=False)
    with pytest.raises(ValueError, match=r"retraining without \[7\] failed: expected \|gradient\| <= 1e-10 after 1 st"):
        leave_one_out(task, [7], retrain=partial(converge, max_steps=1), progress=False)


def test_with_a_measure_the_truth_is_its_drop():
    task = replace(digits_task(n=20), measure=margin)
    again = task.to(torch.float64)
    w = torch.ones(20, dtype=torch.float64)
    w[3] = 0
    converge(again, w)
    drop = margin(task.outputs(), None) - margin(again.outputs(), None)
    assert torch.allclose(leave_one_out(task, [3], progress=False)[:, 0], drop, atol=1e-8)


def test_removing_a_copy_of_a_test_point_hurts_it():
    task = digits_task(n=30)
    x, y = task.train.x.clone(), task.train.y.clone()
    x[5], y[5] = task.test.x[2], task.test.y[2]
    planted = Task(models.logistic(9, 4).double(), Split(x, y), task.test, l2=task.l2)
    assert leave_one_out(planted, [5], progress=False)[2, 0] > 0


def test_a_run_repeated_without_examples_is_fit_with_weights_of_zero():
    task, w = small(measure=margin), subsets(23, 4, removed=0.3)
    effects = removal_effects(task, w, partial(fit, **RUN), progress=False)

    def value(row):
        again = replace(task, model=copy.deepcopy(task.model))
        fit(again, w=row, **RUN)
        return margin(again.outputs(), None)

    for k in range(4):
        assert torch.allclose(effects[:, k], value(torch.ones(23)) - value(w[k]), rtol=0, atol=1e-12)
    assert float(effects.abs().max()) > 1e-2
    everything = removal_effects(task, torch.ones(1, 23), partial(fit, **RUN), progress=False)
    assert torch.equal(everything, torch.zeros(9, 1).double())
    for together in (2, 3, 100):  # of 5 runs, with the one with all examples
        many = removal_effects(task, w, partial(fit_many, **RUN), together, progress=False)
        assert torch.allclose(many, effects, rtol=0, atol=1e-12)
    for wrong, got in [(lambda task, w: fit(task, w=w[0], **RUN), "History"),
                       (lambda task, w: fit_many(task, w[:1], **RUN), "Ensemble")]:
        with pytest.raises(TypeError, match=f"return an Ensemble of 2 models, as fit_many does, got {got}"):
            removal_effects(task, torch.ones(1, 23), wrong, 5, progress=False)


def test_a_retrainer_must_train_the_model_that_it_is_given():
    def elsewhere(task, w):
        return fit(replace(task, model=copy.deepcopy(task.model)), w=w, **RUN)

    for wrong in (elsewhere, lambda task, w: None):
        with pytest.raises(ValueError, match="leaves it as it was: does it train a copy"):
            removal_effects(small(), subsets(23, 2), wrong, progress=False)
    task = digits_task(n=20)  # where all weights are 1, or nothing is to be done, a model may stay as it is
    again = partial(removal_effects, task, torch.ones(1, 20), progress=False)
    assert torch.equal(again(lambda task, w: None), torch.zeros(9, 1).double())
    assert torch.equal(again(converge), torch.zeros(9, 1).double())


def test_models_with_statistics_of_their_own_are_retrained_one_by_one():
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
    task, w = small(model=net.double()), subsets(23, 2)
    effects, ends = removal_effects(task, w, partial(fit, **RUN), progress=False), []
    for row in (torch.ones(23), w[1]):
        again = replace(task, model=copy.deepcopy(net))
        fit(again, w=row, **RUN)
        ends.append(again.losses())
    assert torch.allclose(effects[:, 1], ends[1] - ends[0], rtol=0, atol=1e-12)


def test_subsets_leave_out_the_same_number_at_random():
    w = subsets(40, 300, removed=0.25, seed=1)
    assert w.shape == (300, 40) and ((w == 0) | (w == 1)).all() and (w.sum(1) == 30).all()
    assert torch.equal(w, subsets(40, 300, 0.25, seed=1)) and not torch.equal(w, subsets(40, 300, 0.25, seed=2))
    assert (w.mean(0) - 0.75).abs().max() < 5 * (0.25 * 0.75 / 300) ** 0.5
    for removed in (0.01, 0.99, 1.5):
        with pytest.raises(ValueError, match="leaves out 1 to 39 of 40"):
            subsets(40, 2, removed)


def test_expected_truth_is_the_mean_over_runs_with_fresh_weights_and_order(tmp_path):
    task, w = small(), subsets(23, 3)
    fresh = partial(models.mlp, [9, 5, 4])
    found = expected_effects(task, w, partial(fit_many, **RUN), seeds=[3, 5, 8], model=fresh, together=9,
                             progress=False, store=tmp_path)
    for k, seed in enumerate((3, 5, 8)):
        run = replace(task, model=fresh(seed=seed).double())
        ensemble = fit_many(run, torch.cat([torch.ones(1, 23), w]), seed=seed, **RUN)
        expected = (ensemble.losses()[1:] - ensemble.losses()[0]).T
        assert torch.allclose(found.replicates[k], expected, rtol=0, atol=1e-12)
    assert torch.allclose(found.mean, found.replicates.mean(0))
    by_hand = found.replicates.numpy().std(0, ddof=1) / 3**0.5
    assert np.allclose(found.standard_error, by_hand) and found.standard_error.min() > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seed-3", "seed-5", "seed-8"]
    order_only = expected_effects(task, w, partial(fit_many, **RUN), range(2), together=9, progress=False)
    same = fit_many(task, torch.cat([torch.ones(1, 23), w]), seed=1, **RUN).losses()
    assert torch.allclose(order_only.replicates[1], (same[1:] - same[0]).T, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"two different numbers, got \[4, 4\]"):
        expected_effects(task, w, partial(fit_many, **RUN), [4, 4])


def test_every_executor_gives_the_same_numbers(tmp_path):
    task, ids, w = mlp_task(), [1, 5, 33, 8], subsets(23, 5)
    here, run = leave_one_out(task, ids, progress=False), partial(fit_many, **RUN)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=torch.set_num_threads,
                             initargs=(1,)) as pool:
        before = snapshot(task.model)
        assert torch.equal(leave_one_out(task, ids, store=tmp_path, executor=pool, progress=False), here)
        assert untouched(task.model, before) and not task.train.x.is_shared()
        assert len(audit(tmp_path)[1].w) == 5
        many = removal_effects(small(), w, run, 2, executor=pool, progress=False)
        assert torch.equal(many, removal_effects(small(), w, run, 2, progress=False))
        with pytest.raises(ValueError, match=r"retraining without \[5\] failed: expected \|gradient\|"):
            leave_one_out(task, [5], retrain=partial(converge, max_steps=1), executor=pool, progress=False)


def test_threads_take_turns_with_the_random_state():
    """Dropout draws from a state that all threads of a process share."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 6), nn.Dropout(0.5), nn.ReLU(), nn.Linear(6, 4))
    task, w, random = small(model=net.double()), subsets(23, 12), torch.get_rng_state()
    run = partial(removal_effects, task, w, partial(fit, **RUN), progress=False)
    here = run()
    with ThreadPoolExecutor(4) as pool:
        there = run(executor=pool)
    assert torch.equal(here, there) and torch.equal(random, torch.get_rng_state())


def test_dask_gives_the_same_numbers():
    from distributed import Client

    task, ids = digits_task(n=20), [1, 5, 8]
    with Client(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as client:
        there = leave_one_out(task, ids, executor=client.get_executor(), progress=False)
    assert torch.equal(there, leave_one_out(task, ids, progress=False))


def test_the_stored_removals_of_the_all_cnn_agree_with_the_derivative_and_with_another_way_of_retraining():
    kept = {name: array.double() for name, array in data.stored("leave_one_out_all_cnn").items()}
    place = {j: k for k, j in enumerate(kept["ids"].tolist())}
    nudges, checks = ([place[j] for j in kept[name].tolist()] for name in ("nudges", "checks"))
    assert kept["effect"].shape == (100, len(place)) == (100, 1144) and kept["test_ids"][0] == 6558
    claimed, tilt = kept["first"][:, nudges], 50 * (kept["nudged"] - kept["raised"])  # 1 % less, and 1 % more
    assert pearson(claimed, tilt).min() > 0.99999 and (slope(claimed, tilt) - 1).abs().max() < 5e-4
    whole = kept["effect"][:, nudges]
    assert pearson(claimed, whole).median() < 0.9, "a whole image is no small step"
    checked, effect = kept["checked"], kept["effect"][:, checks]
    assert ((checked - effect).norm(dim=0) < 2e-3 * checked.norm(dim=0)).all()
    stayed = kept["back_moved"] > 1e-3
    assert kept["checks"][stayed].tolist() == [1059] and (kept["back_risk"][~stayed].abs() < 1e-15).all()
    for name in ("top_six", "top_right", "random"):
        own = [place[j] for j in kept[name].tolist()]
        assert len(own) == 500 and pearson(kept["refined"][:, own], kept["effect"][:, own]).median() > 0.999
        assert pearson(kept["first"][:, own], kept["effect"][:, own]).median() < 0.75
