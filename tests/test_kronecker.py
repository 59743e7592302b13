"""The factored GGN against curvlinops, against dense Kronecker products, and against the GGN itself."""

from dataclasses import replace

import curvlinops
import pytest
import torch
from problems import digits_task, normed
from torch import nn

from influence_nb import GGN, gradients, models
from influence_nb.gradients import Gradients, unit_vectors
from influence_nb.kronecker import Kronecker


def conv(bias=True, seed=0):
    """Two convolutions with stride and padding, and a linear layer; every other one has a bias."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 3, 2, stride=2, padding=1, bias=bias), nn.Tanh(),
                             nn.Conv2d(3, 2, (1, 2), padding=(0, 1), bias=not bias), nn.Tanh(), nn.Flatten(),
                             nn.Linear(12, 4, bias=bias))


NETS = {"logistic": lambda: models.logistic(9, 4), "mlp": lambda: models.mlp([9, 5, 4]),
        "mlp without bias": lambda: models.mlp([9, 5, 4], bias=False), "conv": conv, "conv bias": lambda: conv(False)}
every_net = pytest.mark.parametrize("net", NETS)
both = pytest.mark.parametrize("corrected", [False, True], ids=["kfac", "ekfac"])


def products(K, test, train, damping, tol):
    return K.products(K.queries(test, damping, tol), train)


def task_of(net, l2=0.0, n=23):
    return digits_task(n=n, l2=l2, model=NETS[net](), trained=False)


def identity(task):
    return torch.eye(len(gradients.theta(task)), dtype=torch.float64)


def dense(K):
    return K @ identity(K.task)


def places(task, names):
    """The rows of theta that belong to the named parameters."""
    named, start = {}, 0
    for name, p in gradients.parameters(task).items():
        named[name] = torch.arange(start, start := start + p.numel())
    return torch.cat([named[name] for name in names])


def basis(layer):
    """Q_o (x) Q_i over (weight row by row, then bias), [o i, o i]: its columns are the eigenvectors."""
    o, i = len(layer.left), len(layer.right)
    Q = torch.kron(layer.left, layer.right)                                     # of [W, b], row by row
    rows = torch.arange(o * i).view(o, i)
    return Q if layer.bias is None else Q[torch.cat([rows[:, :-1].flatten(), rows[:, -1]])]


def layer_rows(task, layer):
    return places(task, [layer.weight] + ([] if layer.bias is None else [layer.bias]))


@every_net
@both
def test_products_and_solves_equal_curvlinops(net, corrected):
    task = task_of(net)
    batches = list(zip(task.train.x.split(4), task.train.y.split(4)))           # 23 examples: a ragged last batch
    operator = curvlinops.EKFACLinearOperator if corrected else curvlinops.KFACLinearOperator
    theirs = operator(task.model.eval(), nn.CrossEntropyLoss(), list(gradients.parameters(task).values()), batches,
                      fisher_type="type-2", kfac_approx="expand", separate_weight_and_bias=False)
    ours = Kronecker(GGN(task, batch_size=4), corrected)
    expected = theirs @ identity(task)
    assert (dense(ours) - expected).norm() <= 1e-12 * expected.norm()
    for damping in (1e-4, 1e-2):
        inverse = curvlinops.KFACInverseLinearOperator(theirs, damping, use_exact_damping=True) @ identity(task)
        assert (ours.solve(identity(task), damping) - inverse).norm() <= 1e-10 * inverse.norm()


def moments(task, w):
    """E[a a^T] with a 1 appended, and E[g g^T] of the GGN, of both layers of an MLP; straight from autograd."""
    model, n = task.model.eval(), len(task.train)
    x = task.train.x.flatten(1)
    hidden = model.linear1(x).detach().requires_grad_()
    inputs = [x, torch.tanh(hidden).detach()]
    outputs = model.linear2(torch.tanh(hidden))
    chances = outputs.softmax(1).detach()
    found = []
    for a, at in zip(inputs, (hidden, outputs)):
        J = torch.stack([torch.autograd.grad(outputs[:, k].sum(), at, retain_graph=True)[0] for k in range(4)], 1)
        L = torch.diag_embed(chances) - chances[:, :, None] * chances[:, None]
        a = torch.cat([a, torch.ones(n, 1, dtype=torch.float64)], 1)
        found.append(((a.T * w) @ a / w.sum(), torch.einsum("n,nco,ncd,ndp->op", w, J, L, J) / n))
    return found


def test_a_block_is_the_kronecker_product_of_its_moments_laid_out_as_weight_then_bias():
    task = task_of("mlp")
    w = torch.rand(23, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    K, blocks = Kronecker(GGN(task, w), corrected=False), []
    for A, S in moments(task, w):
        o, i = len(S), len(A) - 1
        block = torch.zeros(o, i + 1, o, i + 1, dtype=torch.float64)
        block += S[:, None, :, None] * A[None, :, None, :]
        order = torch.cat([torch.arange(o * (i + 1)).view(o, i + 1)[:, :-1].flatten(),
                           torch.arange(o * (i + 1)).view(o, i + 1)[:, -1]])
        blocks.append(block.view(o * (i + 1), -1)[order][:, order])
    expected = torch.block_diag(*blocks)
    assert (dense(K) - expected).norm() <= 1e-13 * expected.norm()


def test_for_one_example_kfac_and_ekfac_are_the_blocks_of_the_ggn():
    """a is one and the same for all vectors g, so that nothing is lost but the products of different layers."""
    task = digits_task(n=1, l2=0.0, model=models.mlp([9, 5, 4]), trained=False)
    G = GGN(task).dense()
    for corrected in (False, True):
        K = Kronecker(GGN(task), corrected)
        for layer in K.layers:
            rows = layer_rows(task, layer)
            block = G[rows][:, rows]
            assert (dense(K)[rows][:, rows] - block).norm() <= 1e-13 * block.norm()


@every_net
@both
@pytest.mark.parametrize("regularised", [None, lambda name: True], ids=["weights", "all"])
def test_a_solve_inverts_the_damped_matrix(net, corrected, regularised):
    task = task_of(net, l2=0.03)
    task = task if regularised is None else replace(task, regularised=regularised)
    K = Kronecker(GGN(task), corrected)
    B = torch.randn(len(identity(task)), 3, dtype=torch.float64)
    for damping in (1e-4, 0.1, 10.0):
        X = K.solve(B, damping)
        assert (dense(K) @ X + damping * X - B).norm() <= 1e-10 * B.norm()
    plain = dense(Kronecker(GGN(replace(task, l2=0.0)), corrected))
    if regularised is not None:  # exact where it acts on all alike
        assert torch.allclose(dense(K), plain + 0.03 * identity(task), atol=1e-13)
    for layer in K.layers:       # its diagonal in the basis elsewhere
        rows, Q = layer_rows(task, layer), basis(layer)
        added = Q.T @ torch.diag(gradients.penalty(task)[rows]) @ Q
        assert torch.allclose(Q.T @ (dense(K) - plain)[rows][:, rows] @ Q, torch.diag(added.diagonal()), atol=1e-13)


@both
@pytest.mark.parametrize("net", ["logistic", "mlp"])
def test_directions_without_curvature_are_left_out_of_an_undamped_solve(net, corrected):
    """With 6 examples of 9 pixels most eigenvalues are 0, and come out of the arithmetic as 1e-17."""
    for seed in range(10):
        task = digits_task(n=6, l2=0.0, seed=seed, model=NETS[net](), trained=False)
        K = Kronecker(GGN(task), corrected)
        v = dense(K) @ torch.randn(len(identity(task)), 2, dtype=torch.float64)
        expected = torch.linalg.pinv(dense(K), hermitian=True, rtol=1e-12) @ v
        assert (K.solve(v) - expected).norm() <= 1e-6 * expected.norm()


@every_net
def test_ekfac_has_the_diagonal_of_the_ggn_in_its_basis_and_is_nearer_to_it_than_kfac(net):
    task = task_of(net)
    G = GGN(task).dense()
    kfac, ekfac = (Kronecker(GGN(task), corrected) for corrected in (False, True))
    for layer in ekfac.layers:
        rows, Q = layer_rows(task, layer), basis(layer)
        block = G[rows][:, rows]
        assert torch.allclose(layer.spectrum.flatten(), (Q.T @ block @ Q).diagonal(), atol=1e-13)
        near, far = ((dense(K)[rows][:, rows] - block).norm() for K in (ekfac, kfac))
        assert near < 0.999 * far
        assert float(layer.spectrum.sum()) == pytest.approx(float(block.trace()), rel=1e-12)


def test_the_places_of_a_layer_count_as_examples_in_its_factors():
    """The expand setting: E over examples and places of a a^T, times the sum over places of g g^T."""
    task = task_of("conv")
    layer = Kronecker(GGN(task), corrected=False).layers[0]
    a = nn.functional.unfold(task.train.x, 2, stride=2, padding=1)              # [n, 4, places]
    a = torch.cat([a, torch.ones_like(a[:, :1])], 1).transpose(1, 2).flatten(0, 1)
    A, values = a.T @ a / len(a), layer.spectrum.sum(0)
    assert torch.allclose(layer.right @ torch.diag(values / values.sum()) @ layer.right.T, A / A.trace(), atol=1e-13)


@every_net
@both
def test_pairwise_products_equal_solved_gradients(net, corrected):
    task = task_of(net, l2=0.01)
    K = Kronecker(GGN(task), corrected)
    test, train = Gradients(task, task.test, batch_size=4), Gradients(task, task.train, batch_size=5)
    V, T = test.dense()[0], train.dense()[0]
    for damping in (1e-3, 0.1):
        expected = V @ K.solve(T.T, damping)
        for tol in (1e-3, 1e-9):
            bound = tol * K.solve(identity(task), damping).norm() * V.norm(dim=1)[:, None] * T.norm(dim=1)
            error = (products(K, test, train, damping, tol) - expected).abs()
            assert (error <= bound + 1e-12 * expected.abs().max()).all()
        selves = (T.T * K.solve(T.T, damping)).sum(0)
        assert torch.allclose(K.self_products(train, damping), selves, rtol=1e-11)
    plain = V @ T.T
    assert torch.corrcoef(torch.stack([plain.flatten(), expected.flatten()]))[0, 1] < 0.999


def wide_task():
    """A layer so wide that its inverse spectrum is taken apart into few terms."""
    return digits_task(n=60, l2=1e-3, model=models.mlp([9, 64, 4]), trained=False)


@both
def test_a_wide_layer_is_taken_apart_into_few_terms(corrected):
    task = wide_task()
    K, tol = Kronecker(GGN(task), corrected), 1e-3
    terms = K.layers[0].separated(0.1, tol)
    assert terms is not None and len(terms[0]) < 5
    error = torch.einsum("ro,ri->oi", *terms) - K.layers[0].inverse(0.1)
    assert 0 < error.norm() <= tol * K.layers[0].inverse(0.1).norm()
    test, train = Gradients(task, task.test), Gradients(task, task.train)
    expected = test.dense()[0] @ K.solve(train.dense()[0].T, 0.1)
    assert (products(K, test, train, 0.1, tol) - expected).norm() <= 3 * tol * expected.norm()
    assert (products(K, test, train, 0.1, 1e-12) - expected).norm() <= 1e-12 * expected.norm()


class Odd(nn.Module):
    """A bias that is used outside its layer, a layer used twice, and one whose weight is frozen."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.outside, self.twice, self.frozen = nn.Linear(9, 5), nn.Linear(5, 5), nn.Linear(5, 4)
        self.frozen.weight.requires_grad_(False)

    def forward(self, x):
        h = torch.tanh(self.outside(x.flatten(1))) * self.outside.bias
        return self.frozen(torch.tanh(self.twice(torch.tanh(self.twice(h)))))


@both
@pytest.mark.parametrize("net, diagonal", [
    (normed, {"1.weight", "1.bias", "4.weight", "4.bias"}),
    (Odd, {"outside.bias", "frozen.bias"}),
])
def test_parameters_without_factors_have_their_diagonal(net, diagonal, corrected):
    task = digits_task(n=11, l2=0.02, model=net(), trained=False)
    w = torch.rand(11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    K, G = Kronecker(GGN(task, w), corrected), GGN(task, w).dense()
    assert set(K.diagonal) == diagonal
    rows = places(task, sorted(diagonal))
    assert torch.allclose(dense(K)[rows][:, rows], torch.diag(G.diagonal()[rows]), atol=1e-14)
    test, train = Gradients(task, task.test), Gradients(task, task.train)
    T = train.dense()[0].T
    assert torch.allclose(products(K, test, train, 0.1, 1e-12), test.dense()[0] @ K.solve(T, 0.1), atol=1e-12)
    assert torch.allclose(K.self_products(train, 0.1), (T * K.solve(T, 0.1)).sum(0), atol=1e-12)


@both
def test_training_weights_remove_examples(corrected):
    task = task_of("conv")
    w, kept = torch.ones(23, dtype=torch.float64), [i for i in range(23) if i not in (3, 8)]
    w[[3, 8]] = 0
    fewer = replace(task, train=task.train.take(kept))
    expected = dense(Kronecker(GGN(fewer), corrected)) * 21 / 23                # n stays n
    assert torch.allclose(dense(Kronecker(GGN(task, w), corrected)), expected, atol=1e-14)


@both
def test_other_second_moments_are_factored_too(corrected):
    """Any vectors that are pulled back: here the Jacobian itself, whose squares add up to its squared length."""
    task = task_of("mlp")
    K = Kronecker(GGN(task, vectors=unit_vectors), corrected)
    J = Gradients(task, task.train, unit_vectors).dense()
    if corrected:
        assert float(dense(K).trace()) == pytest.approx(float(J.square().sum()) / 23, rel=1e-12)
    G = torch.einsum("mnp,mnq->pq", J, J) / 23
    assert (dense(K) - G).norm() < G.norm()


def test_answers_at_two_dampings_may_take_different_forms():
    task = wide_task()
    K, test, train = Kronecker(GGN(task), corrected=False), Gradients(task, task.test), Gradients(task, task.train)
    assert K.layers[0].separated(0.01, 1e-4) is None and K.layers[0].separated(0.1, 1e-4) is not None
    both = K.products(K.queries(test, 0.01) + K.queries(test, 0.1), train)
    for S, damping in zip(both.split(9), (0.01, 0.1)):
        expected = test.dense()[0] @ K.solve(train.dense()[0].T, damping)
        assert (S - expected).norm() <= 3e-4 * expected.norm()
