"""What one backward pass knows about single examples, parameter by parameter.

A layer that multiplies rows a_t with a weight W [o, i] has, for one example, the gradient

    d loss / d W = sum_t g_t a_t^T,    a_t [i] the inputs of its places t, g_t [o] the gradients of its outputs

with one place for a Linear layer, one for every patch of a convolution, one for every position in a sequence. Keeping
a and g instead of the gradient makes products of gradients cheap: (g_s . g_t')(a_s . a_t'). Source: Goodfellow (2015);
for convolutions, Rochette et al. (2019).

A block holds the gradients of one parameter for m vectors pulled back from the outputs of b examples: `Outer` as a and
g, `Tokens` as indices into an embedding and g, `Rows` as they are. All have the methods of `Rows`, explained there.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(eq=False)
class Rows:
    """Gradients as they are: g [m, b, p]."""

    g: Tensor

    def rows(self) -> Tensor:
        """The gradients [m, b, p]."""
        return self.g

    def arrange(self, V: Tensor) -> Tensor:
        """V [p, k] laid out for `times`; `restore` undoes it."""
        return V

    def restore(self, V: Tensor) -> Tensor:
        """V [p, k] from the layout of `arrange` and `combine`."""
        return V

    def times(self, V: Tensor) -> Tensor:
        """Products with the columns of an arranged V [p, k]: [m, b, k]."""
        return self.g @ V

    def combine(self, U: Tensor) -> Tensor:
        """The sum with weights U [m, b, k], [p, k] as `arrange` lays it out."""
        return self.g.flatten(0, 1).T @ U.flatten(0, 1)

    def dot(self, other) -> Tensor:
        """Products of the first gradients of two blocks, [b, b']."""
        return self.rows()[0] @ other.rows()[0].T

    def squares(self) -> Tensor:
        """The squared length of every gradient, [m, b]."""
        return self.g.square().sum(2)

    def lengths(self, metric: Tensor) -> Tensor:
        """Squared lengths where each parameter counts with its metric [p], [m, b]."""
        return self.g.square() @ metric

    def diagonal(self, w: Tensor) -> Tensor:
        """The sum over examples, with weights w [b], and their vectors of the squared gradients, [p]."""
        return w @ self.g.square().sum(0)


@dataclass(eq=False)
class Outer:
    """sum_t g_t a_t^T: a [b, T, i] and g [m, b, T, o] stand for gradients [m, b, o i]."""

    a: Tensor
    g: Tensor

    def rows(self) -> Tensor:
        return torch.stack([g.mT @ self.a for g in self.g]).flatten(2)

    def arrange(self, V: Tensor) -> Tensor:
        return V.reshape(self.g.shape[-1], self.a.shape[-1], -1).transpose(0, 1).flatten(1)     # [i, o k]

    def restore(self, V: Tensor) -> Tensor:
        return V.reshape(self.a.shape[-1], self.g.shape[-1], -1).transpose(0, 1).flatten(0, 1)  # [o i, k]

    def times(self, V: Tensor) -> Tensor:
        (b, T, i), o = self.a.shape, self.g.shape[-1]
        moved = (self.a.reshape(b * T, i) @ V).view(b, T * o, -1)                           # [b, T o, k]
        return (across(self.g) @ moved).transpose(0, 1)

    def combine(self, U: Tensor) -> Tensor:
        b, T, i = self.a.shape
        pulled = across(self.g).mT @ U.transpose(0, 1)                                      # [b, T o, k]
        return self.a.reshape(b * T, i).T @ pulled.reshape(b * T, -1)                       # [i, o k]

    def dot(self, other) -> Tensor:
        if type(other) is not Outer:
            return Rows.dot(self, other)
        (b, T, i), o, (b2, T2) = self.a.shape, self.g.shape[-1], other.a.shape[:2]
        if T == T2 == 1:
            return (self.a[:, 0] @ other.a[:, 0].T) * (self.g[0, :, 0] @ other.g[0, :, 0].T)
        if b * b2 * T * T2 * (o + i) > (b * T + b2 * T2 + b * b2) * o * i:
            return Rows.dot(self, other)
        return by_places(self.a, self.g[0], other.a, other.g[0], torch.matmul)

    def squares(self) -> Tensor:
        if self.a.shape[1] == 1:
            return self.a.square().sum((1, 2)) * self.g.square().sum((2, 3))
        return torch.stack([((self.a @ self.a.mT) * (g @ g.mT)).sum((1, 2)) for g in self.g])

    def lengths(self, metric: Tensor) -> Tensor:
        if self.a.shape[1] == 1:
            metric = metric.view(self.g.shape[3], -1)                                       # [o, i]
            return ((self.g[:, :, 0].square() @ metric) * self.a[:, 0].square()).sum(2)
        return torch.cat([Rows(part.rows()).lengths(metric) for _, part in self.few()], 1)

    def diagonal(self, w: Tensor) -> Tensor:
        if self.a.shape[1] == 1:
            return ((w[:, None] * self.g[:, :, 0].square().sum(0)).T @ self.a[:, 0].square()).flatten()
        return sum(Rows(part.rows()).diagonal(w[where]) for where, part in self.few())

    def few(self, most: int = 2**24):
        """(where, block) of some examples after others, whose gradients are at most `most` numbers."""
        step = max(1, most // (len(self.g) * self.g.shape[3] * self.a.shape[2]))
        for start in range(0, len(self.a), step):
            where = slice(start, start + step)
            yield where, narrow(self, where)


@dataclass(eq=False)
class Tokens:
    """sum_t onehot(a_t) g_t^T: a [b, T], rows of a table that has `size` of them, and g [m, b, T, d]."""

    a: Tensor
    g: Tensor
    size: int
    arrange, restore = Rows.arrange, Rows.restore

    def rows(self) -> Tensor:
        m, b, _, d = self.g.shape
        places = self.a[None, :, :, None].expand_as(self.g)
        return self.g.new_zeros(m, b, self.size, d).scatter_add(2, places, self.g).flatten(2)

    def times(self, V: Tensor) -> Tensor:
        found = V.view(self.size, self.g.shape[-1], -1)[self.a]                             # [b, T, d, k]
        return (across(self.g) @ found.flatten(1, 2)).transpose(0, 1)

    def combine(self, U: Tensor) -> Tensor:
        pulled = (across(self.g).mT @ U.transpose(0, 1)).unflatten(1, (-1, self.g.shape[-1]))  # [b, T, d, k]
        total = pulled.new_zeros(self.size, *pulled.shape[2:])
        return total.index_add(0, self.a.flatten(), pulled.flatten(0, 1)).flatten(0, 1)

    def dot(self, other) -> Tensor:
        if type(other) is not Tokens:
            return Rows.dot(self, other)
        return by_places(self.a, self.g[0], other.a, other.g[0], lambda s, t: (s[:, None] == t[None]).to(self.g))

    def squares(self) -> Tensor:
        example, _, g = self.merged()
        return self.g.new_zeros(self.g.shape[:2]).index_add(1, example, g.square().sum(2))

    def lengths(self, metric: Tensor) -> Tensor:
        example, token, g = self.merged()
        each = (g.square() * metric.view(self.size, -1)[token]).sum(2)
        return self.g.new_zeros(self.g.shape[:2]).index_add(1, example, each)

    def diagonal(self, w: Tensor) -> Tensor:
        example, token, g = self.merged()
        each = w[example, None] * g.square().sum(0)
        return each.new_zeros(self.size, each.shape[1]).index_add(0, token, each).flatten()

    def merged(self) -> tuple[Tensor, Tensor, Tensor]:
        """example [u], token [u] and g [m, u, d] with the places of one token in one example summed."""
        first = self.size * torch.arange(len(self.a), device=self.a.device)[:, None]
        pairs, place = torch.unique(first + self.a, return_inverse=True)
        g = self.g.new_zeros(len(self.g), len(pairs), self.g.shape[3])
        return pairs // self.size, pairs % self.size, g.index_add(1, place.flatten(), self.g.flatten(1, 2))


def across(g: Tensor) -> Tensor:
    """g [m, b, T, o] example by example: [b, m, T o]."""
    return g.transpose(0, 1).flatten(2)


def narrow(block, rows):
    """The block of some of its examples."""
    return Rows(block.g[:, rows]) if type(block) is Rows else replace(block, a=block.a[rows], g=block.g[:, rows])


def joined(blocks: list):
    """The gradients of one example summed over blocks: a layer that is used more than once."""
    first, kinds = blocks[0], {type(block) for block in blocks}
    if len(blocks) == 1:
        return first
    if kinds & {Rows} or len(kinds) > 1:
        return Rows(sum(block.rows() for block in blocks))
    return replace(first, a=torch.cat([block.a for block in blocks], 1), g=torch.cat([block.g for block in blocks], 2))


def stacked(blocks: list):
    """The blocks of several vectors m as one."""
    return replace(blocks[0], g=torch.cat([block.g for block in blocks])) if len(blocks) > 1 else blocks[0]


def compact(block, m: int):
    """A block of one vector in the smaller of the ways to keep m of them."""
    if type(block) is Rows:
        return block
    dense = block.g[0, :, 0].numel() * (block.a.shape[-1] if type(block) is Outer else block.size)
    return block if block.a.numel() + m * block.g.numel() <= m * dense else Rows(block.rows())


def numbers(block) -> int:
    """How many numbers a block keeps."""
    return sum(v.numel() for v in vars(block).values() if isinstance(v, Tensor))


def by_places(a, g, a2, g2, match, most: int = 2**24) -> Tensor:
    """sum_st match(a_s, a2_t) (g_s . g2_t) for every pair of examples, [b, b'], at most `most` numbers at a time."""
    T, (b2, T2) = g.shape[1], g2.shape[:2]
    step = max(1, most // (T * b2 * T2))
    right, right_g = a2.flatten(0, 1), g2.flatten(0, 1)
    out = []
    for part, part_g in zip(a.split(step), g.split(step)):
        left = part.flatten(0, 1)
        pairs = match(left, right.T if right.ndim > 1 else right) * (part_g.flatten(0, 1) @ right_g.T)
        out.append(pairs.view(len(part), T, b2, T2).sum((1, 3)))
    return torch.cat(out)
