from dataclasses import replace
from itertools import islice

import pytest
import torch
from problems import digits_task, mlp_task

from influence_nb import GradDot, Influence, Refined, Split, Task, converge, curvature, gradients, leave_one_out, models
from influence_nb.attribute import refine
from influence_nb.attribute.refine import without
from influence_nb.checks import snapshot, untouched
from influence_nb.solve import Eigen


def pearson(S, truth):
    """The least correlation over the test points."""
    return min(float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(S, truth, strict=True))


@pytest.fixture(scope="module")
def problem():
    task = mlp_task()
    return task, leave_one_out(task, range(40), progress=False)


def test_two_passes_do_what_first_order_cannot(problem):
    task, truth = problem
    first, refined = Influence().fit(task).scores().values, Refined(passes=2, progress=False).fit(task)
    assert pearson(first, truth) < 0.9 and pearson(GradDot().fit(task).scores().values, truth) < 0.9
    assert pearson(refined.scores().values, truth) > 0.999
    assert refined.passes_.max() <= 2 and not refined.turned_.any()


def test_run_to_the_end_it_is_leave_one_out(problem):
    task, truth = problem
    before = snapshot(task.model)
    refined = Refined(passes=60, tol=1e-9, progress=False).fit(task)
    assert torch.allclose(refined.scores().values, truth, atol=1e-8) and untouched(task.model, before)
    for point in refined.path(3):
        if point.slope.norm() < 1e-10:
            break
    w = torch.ones(40, dtype=torch.float64)
    w[3] = 0
    again = task.to(torch.float64)
    converge(again, w)
    curvature_there = torch.linalg.eigvalsh(curvature.Hessian(again, w).dense())
    null = torch.zeros(74, dtype=torch.float64)
    null[-4:] = 0.5                                                                # a constant on the output biases
    way = point.theta - gradients.theta(again)
    assert (way - null * (null @ way)).norm() < 1e-8 and curvature_there[1] > 0


def test_the_first_step_is_newton_s_own_damped_by_the_slope_where_the_ggn_is_the_hessian():
    task = digits_task(n=30)                                                       # softmax regression
    refined, j, w = Refined(progress=False).fit(task), 4, torch.ones(30, dtype=torch.float64)
    w[j] = 0
    point = next(refined.path(j))
    H = curvature.Hessian(task, w).dense()
    g = gradients.example_gradients(task, task.train.take([j]))[0]
    assert point.passes == 0 and torch.allclose(point.slope, -g / 30, atol=1e-12)
    newton = torch.linalg.solve(H + 0.03 * g.norm() / 30 * torch.eye(len(g)), g / 30)
    undamped = torch.linalg.pinv(H, hermitian=True, rtol=1e-12) @ g / 30
    assert torch.allclose(point.step, newton, atol=1e-9) and not torch.allclose(newton, undamped, atol=1e-4)


def test_rough_passes_end_where_exact_ones_do(problem):
    task, truth = problem
    refined = Refined(passes=60, tol=1e-7, ids=[3, 9], progress=False, rough=1e-3).fit(task)
    assert torch.allclose(refined.scores().values[:, [3, 9]], truth[:, [3, 9]], atol=1e-7)
    seen, pass_over_training = [], refine.risk_and_slope

    def watched(task, flat, w):
        seen.append(gradients.theta(task).dtype)
        return pass_over_training(task, flat, w)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refine, "risk_and_slope", watched)
        *_, point = islice(refined.path(3), 12)
    assert seen[0] == torch.float32 and seen[-1] == torch.float64 and point.passes == len(seen)


def test_exact_passes_go_on_with_what_rough_ones_learned(problem, monkeypatch):
    task, begun, descend = problem[0], [], refine.descend

    def watched(evaluate, start, inverse, known, noise=1e-15, pairs=None):
        begun.append((known is None, len(pairs)))
        for point in descend(evaluate, start, inverse, known, noise, pairs):
            yield point._replace(turned=len(begun) == 1)                           # as if the rough part had turned

    monkeypatch.setattr(refine, "descend", watched)
    points = list(islice(Refined(progress=False, rough=1e-3).fit(task).path(3), 6))
    (_, none), (anew, pairs) = begun
    assert none == 0 < pairs and anew and all(point.turned for point in points)
    assert [point.passes for point in points] == sorted({point.passes for point in points})


def test_error_bars_hold_the_truth_of_most_pairs(problem):
    task, truth = problem
    refined = Refined(passes=1, progress=False).fit(task)
    miss = (refined.scores().values - truth).abs()
    assert (miss <= refined.errors_).double().mean() > 0.9                         # the step before changed more
    finer = Refined(passes=4, progress=False).fit(task)
    finer.scores()
    assert finer.errors_.median() < 0.1 * refined.errors_.median()


def test_only_the_examples_asked_for_are_followed(problem):
    task, truth = problem
    some = Refined(ids=[5, 7], progress=False).fit(task)
    values, free = some.scores().values, Refined(passes=0, progress=False).fit(task).scores().values
    others = [j for j in range(40) if j not in (5, 7)]
    assert torch.equal(values[:, others], free[:, others]) and some.passes_.nonzero()[:, 0].tolist() == [5, 7]
    assert torch.allclose(values[:, [5, 7]], truth[:, [5, 7]], rtol=0.05, atol=1e-4)
    assert some.scores().certificate["passes per followed example"] == some.passes_[[5, 7]].double().mean()


def test_where_the_weights_are_no_minimum_it_follows_the_risk_seen_from_them():
    task = digits_task(n=30)
    for p in task.model.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype)
    start, slope, damping = gradients.theta(task), gradients.risk_gradient(task), 0.1
    refined, w = Refined(damping=damping, progress=False).fit(task), torch.ones(30, dtype=torch.float64)
    w[4] = 0
    *_, point = (point for point, _ in zip(refined.path(4), range(12)))
    again = task.to(torch.float64)
    for p, piece in zip(again.model.parameters(), [point.theta[:36].view(4, 9), point.theta[36:]], strict=True):
        p.data.copy_(piece)
    still = gradients.risk_gradient(again, w) - slope + damping * (point.theta - start)
    assert still.norm() < 1e-9 < (point.theta - start).norm()


def test_with_a_measure_it_follows_the_drop(problem):
    def margin(outputs, y):
        return outputs[:, 0] - outputs[:, 1]

    task = replace(problem[0], measure=margin)
    refined = Refined(passes=40, tol=1e-9, ids=[3, 9], progress=False).fit(task)
    assert torch.allclose(refined.scores().values[:, [3, 9]], leave_one_out(task, [3, 9], progress=False), atol=1e-8)


def test_leverage_is_taken_out_exactly_until_nothing_would_be_left():
    random = torch.Generator().manual_seed(0)
    A, F = (torch.randn(m, 6, generator=random, dtype=torch.float64) for m in (9, 2))
    H, R = A.T @ A, torch.randn(6, 3, generator=random, dtype=torch.float64)
    F = 0.3 * F
    expected = torch.linalg.solve(H + 0.1 * torch.eye(6) - F.T @ F, R)
    assert torch.allclose(without(F, Eigen.of(H), 0.1)(R), expected, atol=1e-10)
    assert torch.allclose(without(100 * F, Eigen.of(H), 0.1)(R), torch.linalg.solve(H + 0.1 * torch.eye(6), R))


def few(seed):
    """A minimum with 69 parameters for 10 examples: removals lead far."""
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = torch.randint(3, (12,), generator=torch.Generator().manual_seed(4))
    task = Task(models.mlp([6, 6, 3], seed=2).double(), Split(x[:10], y[:10]), Split(x[10:], y[10:]), l2=1e-3)
    converge(task, max_steps=3000)
    return task


def test_a_leap_is_not_read_before_it_is_taken():
    task = few(seed=5)
    refined, there = Refined(passes=1, tol=1e-9, progress=False).fit(task), task.to(torch.float64)
    (first, free), *later = islice(refined.orders(2), 3)
    for point, effect in later:
        assert point.step.norm() > 3 * first.step.norm() and not point.turned
        torch.nn.utils.vector_to_parameters(point.theta, there.model.parameters())
        assert torch.allclose(effect, there.losses() - task.losses(), atol=1e-12)
    again = refined.scores()
    assert torch.allclose(again.values[:, 2], free, atol=1e-12), "the first step, read once more where it led"
    assert refined.errors_[:, 2].min() > 1e-4, "and no surer for it"


def test_a_path_that_turns_is_flagged():
    task = few(seed=3)
    refined = Refined(passes=6, progress=False).fit(task)
    scores = refined.scores()
    assert refined.turned_.any() and (refined.errors_[:, refined.turned_] > 0).all()
    j, before = int(refined.turned_.nonzero()[0]), task.losses()
    at, there = None, task.to(torch.float64)
    for point, effect in islice(refined.orders(j), 4):  # a turned path is read where it stands
        at = point.theta + (torch.zeros_like(point.step) if point.turned else point.step)
        torch.nn.utils.vector_to_parameters(at, there.model.parameters())
        assert torch.allclose(effect, there.losses() - before, atol=1e-12)
    assert point.turned and point.step.norm() > 0 and torch.isfinite(scores.values).all()


def test_a_loss_that_is_not_convex_in_the_outputs_is_followed_without_rescaling():
    def robust(outputs, y):
        return torch.log1p((outputs.reshape(len(y)) - y) ** 2)

    random = torch.Generator().manual_seed(0)
    x = torch.randn(33, 3, generator=random, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64) + 0.3 * torch.randn(33, generator=random).double()
    y[4] += 6
    task = Task(models.mlp([3, 1]).double(), Split(x[:28], y[:28]), Split(x[28:], y[28:]), loss=robust, l2=1e-2)
    converge(task)
    refined = Refined(passes=60, tol=1e-9, progress=False).fit(task)
    assert torch.allclose(refined.scores().values, leave_one_out(task, range(28), progress=False), atol=1e-8)


def test_a_refused_fit_leaves_a_method_that_has_seen_nothing(problem):
    refined = Refined(progress=False).fit(problem[0])
    saddle = digits_task(n=12, l2=1e-3, model=models.mlp([9, 5, 4]), trained=False)
    with pytest.raises(ValueError, match="eigenvalue"):
        refined.fit(saddle)
    with pytest.raises(ValueError, match="has seen no task yet"):
        refined.scores()
    with pytest.raises(TypeError, match="Refined needs float64"):
        refined.fit(problem[0].to(torch.float32))


@pytest.mark.parametrize("make, words", [
    (lambda: Refined(ids=[50], progress=False), r"0\.\.39, got 50"),
    (lambda: Refined(passes=-1), "passes must be 0 or more"),
    (lambda: Refined(tol=0.0), "tol must be above 0"),
    (lambda: Refined(rough=-0.1), "rough must be 0 or more"),
])
def test_bad_calls_are_refused(problem, make, words):
    with pytest.raises(ValueError, match=words):
        make().fit(problem[0]).scores()


def test_a_saddle_is_refused():
    task = digits_task(n=12, l2=1e-3, model=models.mlp([9, 5, 4]), trained=False)
    with pytest.raises(ValueError, match=r"at a minimum, got a Hessian with eigenvalue -"):
        Refined().fit(task)
