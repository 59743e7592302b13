"""The blocks of gradients by themselves: parts of them, and large tables."""

import pytest
import torch
from test_layers import S, linear, near, task_of
from torch import nn

from influence_nb.blocks import Tokens, narrow
from influence_nb.curvature import output_factors
from influence_nb.gradients import Gradients


@pytest.mark.parametrize("make, kind", [(linear(6, 40), "sequence"), (linear(6, 5), "vector"),
                                        (lambda: nn.Embedding(7, 3), "tokens")])
def test_a_block_of_some_examples_has_their_gradients(make, kind):
    task = task_of(S(make, nn.Tanh), kind)
    (_, blocks), = Gradients(task, task.train, output_factors, batch_size=11)
    for block in blocks.values():
        assert torch.equal(narrow(block, slice(3, 8)).rows(), block.rows()[:, 3:8])
        assert torch.equal(narrow(block, [9, 2]).rows(), block.rows()[:, [9, 2]])
    wide = blocks.get("0.0.weight")
    if kind == "sequence":  # one example at a time
        found = torch.cat([part.rows() for _, part in wide.few(most=1)], 1)
        assert len(list(wide.few(most=1))) == 11 and torch.allclose(found, wide.rows(), atol=1e-15)


def test_an_embeddings_diagonal_takes_no_more_than_its_places():
    """1,000 examples of 5 tokens from a table of 1,000,000 rows: as rows they would be 2 x 10^9 numbers and more."""
    random = torch.Generator().manual_seed(0)
    a = torch.randint(10**6, (1000, 5), generator=random)
    a[:, 3] = a[:, 0]  # repeated in its example
    block = Tokens(a, torch.randn(1, 1000, 5, 2, generator=random, dtype=torch.float64), 10**6)
    w, metric = torch.rand(1000, dtype=torch.float64), torch.rand(2 * 10**6, dtype=torch.float64)
    both = (block.g[0, :, 0] + block.g[0, :, 3]).square()
    each = torch.cat([both[:, None], block.g[0, :, [1, 2, 4]].square()], 1)                 # [b, 4, d]
    expected = torch.zeros(10**6, 2, dtype=torch.float64).index_put_(
        (a[:, [0, 1, 2, 4]],), w[:, None, None] * each, accumulate=True)
    assert near(block.diagonal(w), expected.flatten())
    assert near(block.lengths(metric), (each * metric.view(-1, 2)[a[:, [0, 1, 2, 4]]]).sum((1, 2))[None])
    assert near(block.squares(), each.sum((1, 2))[None])
