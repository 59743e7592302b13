from dataclasses import replace
from functools import cache
from unittest.mock import patch

import pytest
import torch
from problems import digits_task, mlp_task
from test_sketch import like

from influence_nb import (
    CG,
    GGN,
    Arnoldi,
    GradDot,
    Hessian,
    Influence,
    LiSSA,
    Nystroem,
    Split,
    gradients,
    models,
    sketch,
)

DAMPING = 3e-3  # a twentieth of the mean eigenvalue of the GGN of `trained`; its largest is 0.7, its smallest 0
FULL = [Arnoldi(DAMPING, rank=74, iterations=74), Nystroem(DAMPING, rank=74), Arnoldi(DAMPING, Hessian)]


@cache
def trained():
    """40 examples, 74 parameters, at a minimum."""
    return mlp_task()


def far_from_a_minimum():
    """A network whose Hessian has negative eigenvalues."""
    return digits_task(n=20, l2=1e-3, model=models.mlp([9, 5, 4]), trained=False)


def exact(task, curvature=GGN, damping=DAMPING):
    return Influence(damping, curvature).fit(task).scores().values


def away(values, truth):
    """The distance from the truth, as a share of it."""
    return float((values - truth).norm() / truth.norm())


def plain(task, truth):
    """The distance of gradient products at the scale that suits them best."""
    products = GradDot().fit(task).scores().values
    return away(products * (products * truth).sum() / products.square().sum(), truth)


def residuals(task, fitted):
    """|(C + damping) x - v| / |v| of every test point, from the dense matrix."""
    V = gradients.example_gradients(task, task.test).T
    A = fitted.curvature(task).dense() + fitted.damping_ * torch.eye(len(V)).to(V)
    return (A @ fitted.solver_.solve(V, fitted.damping_) - V).norm(dim=0) / V.norm(dim=0)


@pytest.mark.parametrize("method", FULL, ids=str)
def test_at_full_rank_arnoldi_and_nystroem_are_exact(method):
    task = trained()
    truth = exact(task, method.curvature)
    assert away(method.fit(task).scores().values, truth) < 1e-10 < 0.5 < plain(task, truth)


def test_nystroem_is_exact_at_the_rank_of_what_the_data_make():
    task = digits_task(n=15, model=models.mlp([9, 5, 4]), trained=False)  # 15 x (4 - 1) = 45 of 74 parameters
    truth = exact(task)
    errors = [away(Nystroem(DAMPING, rank=rank).fit(task).scores().values, truth) for rank in (20, 44, 45, 60)]
    assert max(errors[2:]) < 1e-9 < 1e-4 < errors[1] < errors[0] < 0.5 < plain(task, truth)


@pytest.mark.parametrize("method", [Arnoldi, Nystroem])
def test_more_rank_is_nearer(method):
    task = trained()
    truth = exact(task)
    errors = [away(method(DAMPING, rank=rank).fit(task).scores().values, truth) for rank in (5, 15, 35, 70)]
    assert errors == sorted(errors, reverse=True) and errors[2] < 0.3 < 0.6 < errors[0]


@pytest.mark.parametrize("batch_size", [40, 12, 7])
@pytest.mark.parametrize("tol", [1e-2, 1e-5])
def test_lissa_is_exact_to_its_residual(batch_size, tol):
    task = trained()
    scores = LiSSA(DAMPING, batch_size=batch_size, tol=tol, passes=10_000).fit(task).scores()
    residual = torch.tensor(scores.certificate["residual"])
    assert residual.max() <= 1.01 * tol
    V, G = (gradients.example_gradients(task, split) for split in (task.test, task.train))
    bound = residual * V.norm(dim=1) / DAMPING * G.norm(dim=1).max() / 40                   # |A^-1 r| |g| / n
    assert ((scores.values - exact(task)).abs().amax(1) <= bound).all()
    assert away(scores.values, exact(task)) < 3 * tol < 0.5 < plain(task, exact(task))


@pytest.mark.parametrize("curvature", [GGN, Hessian])
def test_lissa_finds_its_scale(curvature):
    task = trained()
    largest = float(torch.linalg.eigvalsh(curvature(task).dense())[-1])
    assert LiSSA(curvature=curvature).fit(task).solver_.scale == pytest.approx(1.1 * largest, rel=1e-3)
    parts = LiSSA(curvature=curvature, batch_size=9).fit(task).solver_
    assert [len(part.task.train) for part in parts.parts] == [9, 9, 9, 9, 4]
    mean = sum(size * part.dense() for size, part in zip(parts.sizes, parts.parts)) / 40
    assert torch.allclose(mean, curvature(task).dense(), atol=1e-14)  # so a random part is right on the mean
    assert parts.scale == pytest.approx(1.1 * max(float(torch.linalg.eigvalsh(part.dense())[-1])
                                                  for part in parts.parts), rel=1e-3)


def test_lissa_names_what_makes_it_diverge():
    with pytest.raises(ValueError, match=r"residual grew .* with scale 0\.1: scale=None"):
        LiSSA(scale=0.1).fit(trained()).scores()
    with pytest.raises(ValueError, match="an eigenvalue is negative, got -.*: more damping, or curvature=GGN"):
        LiSSA(curvature=Hessian).fit(far_from_a_minimum()).scores()


def test_an_indefinite_hessian_shows_in_the_ritz_values():
    task = far_from_a_minimum()
    scores = Arnoldi(curvature=Hessian, rank=10, iterations=20).fit(task).scores()
    assert scores.certificate["smallest Ritz value"] >= torch.linalg.eigvalsh(Hessian(task).dense())[0]
    assert scores.certificate["smallest Ritz value"] < 0 and "INDEFINITE" in repr(scores)
    with pytest.raises(ValueError, match=r"positive semidefinite without its regulariser.*use curvature=GGN"):
        Nystroem(0.1, Hessian, rank=60).fit(task)


def certain(l2):
    """A model that is sure of every label, to the last bit: no gradient, no curvature."""
    task = digits_task(l2=l2, trained=False)
    with torch.no_grad():
        task.model.linear1.weight.zero_()
        task.model.linear1.bias.copy_(torch.tensor([1e5, 0, 0, 0]))
    return replace(task, train=Split(task.train.x, torch.zeros_like(task.train.y)))


@pytest.mark.parametrize("method", [LiSSA, Arnoldi, Nystroem])
def test_no_curvature_at_all_needs_damping(method):
    for damping in (0.0, None):  # the rule of thumb is a tenth of nothing
        with pytest.raises(ValueError, match="curvature is 0 along every direction.*set damping > 0, or train with l2"):
            method(damping).fit(certain(0.0)).scores()
    assert not method(0.1).fit(certain(0.0)).scores().values.any()
    everywhere = replace(certain(0.1), regularised=lambda name: True)
    assert not method().fit(everywhere).scores().values.any()


def test_lissas_parts_keep_no_more_than_the_whole():
    task, begin = trained(), gradients.Gradients.__init__
    for keep, kept in ((2**30, True), (200 * 40, False)):  # an example takes some 400 bytes, a part of 7 fits

        def small(self, *args, keep=keep, **settings):
            begin(self, *args, keep=keep, **settings)

        with patch.object(gradients.Gradients, "__init__", small):
            solver = LiSSA(DAMPING, batch_size=7).fit(task).solver_
            assert [part.rows.keeps for part in solver.parts] == [kept] * 6 and solver.matrix.rows.keeps == kept
            assert all((part.rows.kept is not None) == kept for part in solver.parts)
            alone = GGN(replace(task, train=task.train.take(range(7))))
        assert alone.rows.keeps


def test_a_short_sketch_needs_damping_where_biases_are_free():
    with pytest.raises(ValueError, match="rank 20 of 74 needs damping > 0"):
        Nystroem(rank=20).fit(trained()).scores()
    everywhere = replace(trained(), regularised=lambda name: True)
    assert torch.isfinite(Nystroem(rank=20).fit(everywhere).scores().values).all()


@pytest.mark.parametrize("method", [LiSSA(DAMPING, tol=1e-2), LiSSA(DAMPING, batch_size=7, passes=3),
                                    Arnoldi(DAMPING, rank=20), Nystroem(DAMPING, rank=20)], ids=lambda m: str(m)[:40])
def test_the_certificate_tells_the_true_residual(method):
    task = trained()
    fitted = method.fit(task)
    scores = fitted.scores()
    true = residuals(task, fitted)
    assert torch.allclose(torch.tensor(scores.certificate["residual"], dtype=torch.float64), true, rtol=1e-6)
    assert true.max() > 1e-3                                                                # it is no small thing
    G = gradients.example_gradients(task, task.train)
    selves = (G.T * fitted.solver_.solve(G.T, DAMPING)).sum(0) / 40
    assert torch.allclose(fitted.self_influence(), selves, rtol=0.1 if type(method) is LiSSA else 1e-10)


@pytest.mark.parametrize("damping", [DAMPING, 0.1 * DAMPING])
def test_a_nystroem_preconditioner_saves_products_and_not_accuracy(damping):
    task = trained()
    one = task.test.take([3])
    found = [CG(damping, tol=1e-8, precondition=inner).fit(task).scores(one)
             for inner in (None, Nystroem(rank=20), Nystroem(rank=40))]
    products = [scores.certificate["curvature products"] for scores in found]
    assert products[1] < 0.7 * products[0] and products[2] < 0.4 * products[0]
    truth = Influence(damping, GGN).fit(task).scores(one).values
    assert all(away(scores.values, truth) < 1e-6 for scores in found)


@pytest.mark.parametrize("method", [LiSSA(0.03, tol=1e-8, passes=10_000), Arnoldi(DAMPING, rank=20, iterations=30),
                                                      Nystroem(DAMPING, rank=20)], ids=lambda m: str(m)[:40])
def test_batches_and_the_order_of_the_data_do_not_matter(method):
    task = trained()
    whole = method.fit(task).scores().values
    ragged = replace(method, curvature=lambda task: GGN(task, batch_size=7))
    assert away(ragged.fit(task).scores().values, whole) < 1e-7
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    shuffled = replace(task, train=Split(task.train.x[order], task.train.y[order], task.train.classes))
    assert away(method.fit(shuffled).scores().values, whole[:, order]) < 1e-7


@pytest.mark.parametrize("method", [LiSSA(DAMPING, tol=1e-5, passes=10_000), Arnoldi(DAMPING, rank=20, iterations=74),
                                    Nystroem(DAMPING, rank=20), Nystroem(DAMPING, rank=60)], ids=str)
def test_float32_is_within_its_rounding_of_float64(method):
    task = trained()
    double = method.fit(task).scores().values
    single = method.fit(task.to(torch.float32)).scores().values
    assert single.dtype == torch.float32
    assert away(single.double(), double) < 1e-3  # rounding 1e-7 x condition 1 / DAMPING, and some


def test_a_zero_curvature_is_no_trouble_for_a_krylov_space():
    pairs = sketch.ritz(lambda V: 0 * V, like(5), 3)
    assert (pairs.values == 0).all() and torch.allclose(pairs.vectors.T @ pairs.vectors, torch.eye(3).double())
