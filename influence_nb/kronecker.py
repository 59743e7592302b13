"""K-FAC and EK-FAC: the GGN layer by layer, each layer's block in a Kronecker-factored eigenbasis.

For a layer with inputs a [i] (a 1 appended where it has a bias) and pulled-back output vectors g [o]:

    E[(g a^T)(g a^T)^T]  ~  E[g g^T] (x) E[a a^T] = (Q_o (x) Q_i) diag(s_o s_i) (Q_o (x) Q_i)^T              K-FAC

EK-FAC keeps the eigenbasis and puts the true second moments on its diagonal, E[(Q_o^T (g a^T) Q_i)^2], the best
diagonal there is in the Frobenius norm. Expectations are over examples and their m vectors; the places of a
convolution or a sequence count as examples in the factors (the "expand" setting). What is lost: K-FAC takes a and g
for independent, and both take layers for independent.

The regulariser enters by its own diagonal in this basis (exact where it acts on weight and bias alike), and damping
adds to it. A parameter without factors (norm layers, embeddings, those that go through vmap) has its diagonal.

Source: Martens & Grosse (2015); Grosse & Martens (2016) for convolutions; George et al. (2018), eq. 8; Eschenhagen et
al. (2023) for weight sharing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import Outer
from .curvature import GGN, weights
from .gradients import Gradients, arranged, together
from .parameters import parameters, penalty, pieces
from .task import Task


@dataclass(eq=False)
class Layer:
    """One layer's block: the eigenvectors of both factors, and the spectrum in their basis."""

    weight: str
    bias: str | None
    left: Tensor      # Q_o [o, o]
    right: Tensor     # Q_i [i, i], or [i + 1, i + 1] with a bias
    spectrum: Tensor  # [o, i]
    l2: Tensor        # [i], the regulariser's diagonal in the basis

    def inverse(self, damping: float) -> Tensor:
        """1 / (spectrum + l2 + damping), [o, i]."""
        return inverse(self.spectrum + self.l2, damping)

    def rows(self, blocks: dict) -> Tensor:
        """The layer's gradients [m, b, o, i] of a batch, in the eigenbasis."""
        V = blocks[self.weight].rows().unflatten(2, (len(self.left), -1))
        V = V if self.bias is None else torch.cat([V, blocks[self.bias].rows()[..., None]], 3)
        return self.left.T @ V @ self.right

    def factors(self, block: Outer) -> tuple[Tensor, Tensor]:
        """a [b, i] and g [m, b, o] of examples with one place, in the eigenbasis."""
        a = block.a[:, 0] @ self.right[:block.a.shape[2]]
        return a if self.bias is None else a + self.right[-1], block.g[:, :, 0] @ self.left

    def squares(self, blocks: dict, w: Tensor) -> Tensor:
        """sum_b w_b (Q_o^T g a^T Q_i)^2 over a batch and its vectors, [o, i]."""
        if single(blocks[self.weight]):
            a, g = self.factors(blocks[self.weight])
            return (w[:, None] * g.square().sum(0)).T @ a.square()
        return (w[:, None, None] * self.rows(blocks).square().sum(0)).sum(0)

    def lengths(self, blocks: dict, damping: float) -> Tensor:
        """The squared length [b] of each gradient in the metric of `inverse`."""
        if single(blocks[self.weight]):
            a, g = self.factors(blocks[self.weight])
            return ((g[0].square() @ self.inverse(damping)) * a.square()).sum(1)
        return (self.rows(blocks)[0].square() * self.inverse(damping)).sum((1, 2))

    def scaled(self, named: dict, diagonal: Tensor) -> dict:
        """Q diag(diagonal [o, i]) Q^T times the layer's part of vectors [p, k], given and returned by parameter."""
        V = named[self.weight].T.unflatten(1, (len(self.left), -1))                         # [k, o, i]
        V = V if self.bias is None else torch.cat([V, named[self.bias].T[:, :, None]], 2)
        X = self.left @ (diagonal * (self.left.T @ V @ self.right)) @ self.right.T
        if self.bias is None:
            return {self.weight: X.flatten(1).T}
        return {self.weight: X[:, :, :-1].flatten(1).T, self.bias: X[:, :, -1].T}

    def separated(self, damping: float, tol: float) -> tuple[Tensor, Tensor] | None:
        """u [r, o] and w [r, i] with sum_r u_r w_r^T = `inverse` to `tol` in norm; None where that saves nothing."""
        U, s, W = torch.linalg.svd(self.inverse(damping), full_matrices=False)
        rank = int((s.flip(0).square().cumsum(0).sqrt().flip(0) > tol * s.norm()).sum())
        if rank * sum(self.spectrum.shape) > self.spectrum.numel() / 2:
            return None
        return U.T[:rank] * s[:rank, None], W[:rank]


class Kronecker:
    """The factored GGN, ready for solves at any damping.

    Cost: the pass over the training set that the GGN needs anyway, an eigendecomposition of each factor, and for
    EK-FAC a second look at the kept gradients.

    Args:
        G: a GGN or Fisher; its training weights are kept to.
        corrected: True for EK-FAC, False for K-FAC.
        sums: of G's factors, where its rows have been seen already.
    """

    def __init__(self, G: GGN, corrected: bool = True, sums: "Sums | None" = None):
        self.task, self.corrected, w = G.task, corrected, weights(G.task, G.w)
        l2 = {name: float(piece[0]) for name, piece in pieces(G.task, penalty(G.task)).items()}
        if sums is None:
            sums = Sums(G.task, G.w)
            for _ in together([G.rows], lambda rows, _, i, blocks: sums.see(rows, i, blocks)):
                pass
        self.layers = [decomposed(name, *found, l2) for name, found in sums.found.items()]
        inside = {name for layer in self.layers for name in (layer.weight, layer.bias)}
        others = [name for name in parameters(G.task) if name not in inside]
        self.diagonal = {name: sum(found[name].diagonal(w[rows]) for rows, found in G.rows) / len(w) + l2[name]
                         for name in others}
        if corrected:
            for layer in self.layers:
                layer.spectrum = sum(layer.squares(found, w[rows]) for rows, found in G.rows) / len(w)

    def solve(self, B: Tensor, damping: float = 0.0) -> Tensor:
        """(G + damping I)^-1 B for B [p, k]; 0 in directions without any curvature."""
        return self.scaled(B, lambda layer: layer.inverse(damping), lambda values: inverse(values, damping))

    def __matmul__(self, V: Tensor) -> Tensor:
        """The factored G times V [p, k]."""
        return self.scaled(V, lambda layer: layer.spectrum + layer.l2, lambda values: values)

    def scaled(self, V: Tensor, of_layer, of_rest) -> Tensor:
        named = pieces(self.task, V)
        found = {name: of_rest(values)[:, None] * named[name] for name, values in self.diagonal.items()}
        for layer in self.layers:
            found |= layer.scaled(named, of_layer(layer))
        return torch.cat([found[name] for name in parameters(self.task)])

    def facts(self, damping: float) -> dict:
        """The smallest eigenvalue of the damped matrix: never negative."""
        spectra = [*self.diagonal.values(), *(layer.spectrum + layer.l2 for layer in self.layers)]
        return {"smallest eigenvalue": min(float(v.min()) for v in spectra) + damping, "indefinite": False}

    def queries(self, test: Gradients, damping: float = 0.0, tol: float | None = None) -> list:
        """(G + damping I)^-1 v_i of the test points in the form that `products` multiplies.

        Where examples have one place in a layer no gradient is formed: 1 / (spectrum + l2 + damping), [o, i], is
        written as sum_r u_r w_r^T, its singular vectors to a relative error of `tol`, and each term is a product
        (a_i w_r . a_j)(g_i u_r . g_j) in the eigenbasis. Other layers multiply solved gradients.

        Left out, `tol` is 1e-5 for K-FAC, whose singular values fall fast (seven terms for a layer of 784 x 120), and
        3e-4 for EK-FAC (twenty terms): both change scores by less than a thousandth there.
        """
        tol = tol or (3e-4 if self.corrected else 1e-5)
        blocks = [found for _, found in test]
        terms = {layer: layer.separated(damping, tol) for layer in self.layers if single(blocks[0][layer.weight])}
        terms = {layer: found for layer, found in terms.items() if found}
        others = [layer for layer in self.layers if layer not in terms]
        return [({layer: (*layer.factors(found[layer.weight]), *terms[layer]) for layer in terms},
                 arranged(found, self.solved(found, damping, others))) for found in blocks]

    def products(self, queries: list, train: Gradients) -> Tensor:
        """v_i^T (G + damping I)^-1 g_j for every test point asked for and every training example, [n_test, n_train]."""
        columns = []
        for _, known in train:
            needed = set().union(*(inside for inside, _ in queries))
            turned = {layer: layer.factors(known[layer.weight]) for layer in needed}
            columns.append(torch.cat([answer(query, known, turned) for query in queries]))
        return torch.cat(columns, 1)

    def solved(self, blocks: dict, damping: float, layers: list) -> dict:
        """(G + damping I)^-1 g_i [p, b] by parameter, of a batch's gradients in `layers` and outside all layers."""
        named = {name: block.rows()[0].T for name, block in blocks.items() if name in self.diagonal
                 or any(name in (layer.weight, layer.bias) for layer in layers)}
        found = {name: inverse(values, damping)[:, None] * named[name] for name, values in self.diagonal.items()}
        for layer in layers:
            found |= layer.scaled(named, layer.inverse(damping))
        return found

    def self_products(self, train: Gradients, damping: float = 0.0) -> Tensor:
        """g_j^T (G + damping I)^-1 g_j for every training example, [n_train]."""
        return torch.cat([sum(layer.lengths(found, damping) for layer in self.layers)
                          + sum(found[name].lengths(inverse(values, damping))[0]
                                for name, values in self.diagonal.items()) for _, found in train])


def answer(query: tuple, known: dict, turned: dict) -> Tensor:
    """The products [b, b'] of one batch of test points with one batch of training examples."""
    inside, X = query
    S = sum(known[name].times(V)[0].T for name, V in X.items())
    for layer, (a, g, *terms) in inside.items():
        a2, g2 = turned[layer]
        for u, w in zip(*terms, strict=True):
            S = S + ((a * w) @ a2.T) * ((g[0] * u) @ g2[0].T)
    return S


def inverse(values: Tensor, damping: float) -> Tensor:
    """1 / (values + damping); without damping, 0 where a value is 0 to rounding.

    Raises:
        ValueError: all values and the damping are 0.
    """
    total = values + damping
    none = total <= (0 if damping else torch.finfo(values.dtype).eps * values.max())
    if none.all():
        raise ValueError("the factored curvature, l2 and damping are all 0 in a layer: set damping > 0")
    return torch.where(none, 0.0, 1 / torch.where(none, 1.0, total))


def single(block) -> bool:
    """Whether a block holds the factors of examples with one place."""
    return type(block) is Outer and block.a.shape[1] == 1


def biases(task: Task) -> dict:
    """The trained bias that goes with each weight: of the same layer, where no other layer uses either."""
    names, owners = {id(p): name for name, p in parameters(task).items()}, {}
    for module in task.model.modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), []).append(module)
    return {names[id(m.weight)]: names[id(m.bias)] for m in task.model.modules()
            if id(getattr(m, "weight", None)) in names and id(getattr(m, "bias", None)) in names
            and len(owners[id(m.weight)]) == len(owners[id(m.bias)]) == 1}


class Sums:
    """For each weight with factors its bias and the sums over examples and places of (a, 1)(a, 1)^T and g g^T.

    `see` takes the factors of one batch and vector; `Gradients` calls it as they pass.
    """

    def __init__(self, task: Task, w: Tensor | None = None):
        self.partner, self.w, self.found = biases(task), weights(task, w), {}

    def see(self, where: slice, i: int, blocks: dict) -> None:
        for name, block in blocks.items():
            if type(block) is Outer:
                w, (_, A, S) = self.w[where], self.found.get(name, (None, 0, 0))
                A = A + moments(block.a, w) / (self.w.sum() * block.a.shape[1]) if i == 0 else A
                S = S + moments(block.g[0], w)[:-1, :-1] / len(self.w)
                bias = self.partner.get(name)  # not in the blocks if it is used outside its layer too
                self.found[name] = (bias if bias in blocks else None, A, S)


def moments(a: Tensor, w: Tensor) -> Tensor:
    """sum_b w_b sum_t (a, 1)(a, 1)^T of rows a [b, T, i]: [i + 1, i + 1]."""
    total = w @ a.sum(1)
    if a.shape[1] == 1:
        second = (w[:, None] * a[:, 0]).T @ a[:, 0]
    else:
        second = (w @ (a.mT @ a).flatten(1)).view(a.shape[2], -1)
    return torch.cat([torch.cat([second, total[None]]), torch.cat([total, w.sum()[None] * a.shape[1]])[:, None]], 1)


def eigen(A: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, those that are 0 to rounding set to 0, and eigenvectors of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(A)
    return torch.where(values > 10 * torch.finfo(A.dtype).eps * values[-1], values, 0.0), vectors


def decomposed(weight: str, bias: str | None, A: Tensor, S: Tensor, l2: dict) -> Layer:
    """A layer with K-FAC's spectrum from its two moments."""
    s_left, left = eigen(S)
    s_right, right = eigen(A if bias is not None else A[:-1, :-1])
    if bias is not None and (null := s_right == 0).any():  # one of the null directions has all of the bias's share
        right[:, null] = right[:, null] @ torch.linalg.qr(right[-1:, null].T, mode="complete").Q
    share = right[-1].square() if bias is not None else torch.zeros_like(s_right)  # of the bias in each direction
    return Layer(weight, bias, left, right, s_left[:, None] * s_right,
                 l2[weight] * (1 - share) + (l2[bias] * share if bias is not None else 0.0))
