from dataclasses import replace

import pytest
import torch
from problems import digits_task

from influence_nb import Split, Task, converge, leave_one_out, models
from influence_nb.checks import snapshot, untouched


def test_leave_one_out_equals_retraining_from_scratch_without_the_example():
    from sklearn.linear_model import LogisticRegression

    task = digits_task(n=30)
    effects = leave_one_out(task, [4, 21], progress=False)
    x, y, z = task.train.x.flatten(1).numpy(), task.train.y.numpy(), task.test.x.flatten(1).numpy()

    def test_losses(keep):  # C = 1/(n l2) with n = 30 in both: n stays n
        oracle = LogisticRegression(C=1 / (30 * task.l2), tol=1e-13, max_iter=10000).fit(x[keep], y[keep])
        return -torch.tensor(oracle.predict_log_proba(z))[torch.arange(9), task.test.y]

    everything = list(range(30))
    for column, j in enumerate((4, 21)):
        without = [i for i in everything if i != j]
        assert torch.allclose(effects[:, column], test_losses(without) - test_losses(everything), atol=1e-6)


def test_the_task_is_left_as_found_and_bad_ids_are_refused():
    task = digits_task(n=20)
    before = snapshot(task.model)
    leave_one_out(task, [0], progress=False)
    assert untouched(task.model, before)
    with pytest.raises(ValueError, match=r"0\.\.19, got 3\.\.20"):
        leave_one_out(task, [3, 20])


def test_with_a_measure_the_truth_is_its_drop():
    def margin(outputs, y):
        return outputs[:, 0] - outputs[:, 1]

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
