"""Every layer type against plain autograd, one example at a time, in float64."""

import pytest
import torch
from torch import nn

from influence_nb import GGN, Split, Task, gradients
from influence_nb.curvature import output_factors
from influence_nb.gradients import Gradients, loss_slopes, unit_vectors

SHAPES = {"vector": (6,), "sequence": (3, 6), "signal": (2, 9), "image": (2, 6, 5), "volume": (2, 4, 3, 3)}


def task_of(make, kind, n=11, n_test=5, seed=0, **settings):
    """A task with 4 classes on random inputs; the net ends where `make` ends, a linear layer follows it."""
    random = torch.Generator().manual_seed(seed)
    if kind == "tokens":
        x = torch.randint(7, (n + n_test, 5), generator=random)
    else:
        x = torch.randn(n + n_test, *SHAPES[kind], generator=random, dtype=torch.float64)
    y = torch.randint(4, (n + n_test,), generator=random)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = make().double().eval()
        head = nn.Linear(net(x[:2]).flatten(1).shape[1], 4).double()
        model = nn.Sequential(net, nn.Flatten(), head)
        for p in model.parameters():  # norm layers start from 1 and 0, which hides errors
            p.data += 0.3 * torch.randn_like(p)
        for value in model.buffers():
            if value.is_floating_point():
                value += torch.rand_like(value)
    return Task(model, Split(x[:n], y[:n]), Split(x[n:], y[n:]), **settings)


class Calls(nn.Module):
    """A net from its layers and a function (layers, x) -> outputs."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function, self.layers = function, nn.ModuleDict(layers)

    def forward(self, x):
        return self.function(self.layers, x)


def frozen(net, *names):
    for name in names:
        net.get_parameter(name).requires_grad_(False)
    return net


def tied():
    """The table of an embedding is the weight of an output layer too."""
    net = Calls(lambda m, x: m["out"](m["embed"](x).mean(1)), embed=nn.Embedding(7, 3), out=nn.Linear(3, 7))
    net.layers["out"].weight = net.layers["embed"].weight
    return net


def transformer(batch_first):
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=batch_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(m, x):
        h = m["embed"](x)
        return m["encoder"](h).mean(1) if batch_first else m["encoder"](h.transpose(0, 1)).mean(0)

    return Calls(forward, embed=nn.Embedding(7, 4), encoder=encoder)


def attention(first, kind="encoder.layers.{}.self_attn.{}"):
    return {"0.layers." + kind.format(layer, name) for layer in range(2)
            for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")} | (
        set() if first else {f"0.layers.encoder.layers.{layer}.{name}.{own}" for layer in range(2)
                             for name in ("linear1", "linear2", "norm1", "norm2") for own in ("weight", "bias")})


def S(*layers):
    return lambda: nn.Sequential(*(layer() for layer in layers))


def C(function, **layers):
    return lambda: Calls(function, **{name: layer() for name, layer in layers.items()})


def conv(*args, d=2, **settings):
    return lambda: (nn.Conv1d, nn.Conv2d, nn.Conv3d)[d - 1](*args, **settings)


def linear(*args, **settings):
    return lambda: nn.Linear(*args, **settings)


# name: (net, what it takes, the parameters that hooks cannot give, "0." before the net's own names)
NETS = {
    "linear": (S(linear(6, 5), nn.Tanh), "vector", set()),
    "linear without bias": (S(linear(6, 5, bias=False), nn.Tanh), "vector", set()),
    "linear on a sequence": (S(linear(6, 5), nn.Tanh, linear(5, 2, bias=False)), "sequence", set()),
    "wide, on a sequence": (S(linear(6, 40), nn.Tanh, linear(40, 30)), "sequence", set()),
    "nested": (S(S(linear(6, 5), nn.Tanh), S(S(linear(5, 3)), nn.Sigmoid)), "vector", set()),
    "in place": (S(linear(6, 5), lambda: nn.ReLU(inplace=True), linear(5, 5), lambda: nn.ELU(inplace=True)), "vector",
                 set()),
    "conv1d": (S(conv(2, 3, 3, d=1, stride=2, padding=2, dilation=2), nn.Tanh), "signal", set()),
    "conv1d same": (S(conv(2, 3, 4, d=1, padding="same", bias=False), nn.Tanh), "signal", set()),
    "conv2d": (S(conv(2, 3, (3, 2), stride=(2, 1), padding=(1, 2)), nn.Tanh, conv(3, 2, 2, bias=False)), "image",
               set()),
    "conv2d same": (S(conv(2, 3, 2, padding="same", dilation=2), nn.Tanh), "image", set()),
    "conv2d valid": (S(conv(2, 3, 2, padding="valid", dilation=(1, 2)), nn.Tanh), "image", set()),
    "conv2d circular": (S(conv(2, 3, 3, padding=(1, 2), padding_mode="circular"), nn.Tanh), "image", set()),
    "conv2d reflect": (S(conv(2, 3, 3, padding=1, stride=2, padding_mode="reflect"), nn.Tanh), "image", set()),
    "conv2d replicate": (S(conv(2, 3, 3, padding="same", padding_mode="replicate"), nn.Tanh), "image", set()),
    "conv2d groups": (S(conv(2, 6, 2, groups=2, padding=1), nn.Tanh), "image", set()),
    "conv2d depthwise": (S(conv(2, 2, 3, groups=2, bias=False), nn.Tanh, conv(2, 3, 1)), "image", set()),
    "conv2d whole image": (S(conv(2, 5, (6, 5)), nn.Tanh), "image", set()),
    "conv3d": (S(conv(2, 3, 2, d=3, stride=(2, 1, 1), padding=(0, 1, 0)), nn.Tanh), "volume", set()),
    "embedding": (S(lambda: nn.Embedding(7, 3), nn.Tanh), "tokens", set()),
    "embedding with padding": (S(lambda: nn.Embedding(7, 3, padding_idx=2), nn.Tanh), "tokens", set()),
    "embedding of a small table": (S(lambda: nn.Embedding(7, 1)), "tokens", set()),
    "layer norm": (S(linear(6, 5), lambda: nn.LayerNorm(5), nn.Tanh), "sequence", set()),
    "layer norm without bias": (S(linear(6, 5), lambda: nn.LayerNorm(5, bias=False), nn.Tanh), "vector", set()),
    "layer norm of an image": (S(lambda: nn.LayerNorm((6, 5)), nn.Tanh), "image", set()),
    "group norm": (S(conv(2, 4, 2), lambda: nn.GroupNorm(2, 4), nn.Tanh), "image", set()),
    "batch norm 1d": (S(linear(6, 5), lambda: nn.BatchNorm1d(5), nn.Tanh), "vector", set()),
    "batch norm 1d of a signal": (S(conv(2, 3, 2, d=1), lambda: nn.BatchNorm1d(3), nn.Tanh), "signal", set()),
    "batch norm 2d": (S(conv(2, 3, 2, bias=False), lambda: nn.BatchNorm2d(3), nn.ReLU), "image", set()),
    "batch norm 3d": (S(lambda: nn.BatchNorm3d(2), nn.Tanh), "volume", set()),
    "frozen weight": (lambda: frozen(S(linear(6, 5), nn.Tanh)(), "0.weight"), "vector", set()),
    "frozen bias": (lambda: frozen(S(conv(2, 3, 2), nn.Tanh)(), "0.bias"), "image", set()),
    "frozen layer": (lambda: frozen(S(linear(6, 5), nn.Tanh, linear(5, 3))(), "0.weight", "0.bias"), "vector", set()),
    "called twice": (C(lambda m, x: m["a"](torch.tanh(m["a"](x))), a=linear(6, 6)), "vector", set()),
    "called on a sequence and on its mean": (C(lambda m, x: m["a"](torch.tanh(m["a"](x)).mean(1)), a=linear(6, 6)),
                                             "sequence", set()),
    "looked up twice": (C(lambda m, x: m["a"](x).mean(1) * m["a"](x[:, 0]), a=lambda: nn.Embedding(7, 3)), "tokens",
                        set()),
    "convolved twice": (C(lambda m, x: m["a"](torch.tanh(m["a"](x))), a=conv(2, 2, 2)), "image", set()),
    "not called": (C(lambda m, x: m["a"](x), a=linear(6, 5), b=linear(6, 5)), "vector",
                   {"0.layers.b.weight", "0.layers.b.bias"}),
    "tied": (tied, "tokens", set()),
    "used outside": (C(lambda m, x: torch.tanh(m["a"](x)) @ m["a"].weight, a=linear(6, 6)), "vector",
                     {"0.layers.a.weight"}),
    "bias used outside": (C(lambda m, x: torch.tanh(m["a"](x)) * m["a"].bias, a=linear(6, 6)), "vector",
                          {"0.layers.a.bias"}),
    "keyword": (C(lambda m, x: m["b"](torch.tanh(m["a"](input=x))), a=linear(6, 5), b=linear(5, 3)), "vector",
                set()),
    "keyword and not": (C(lambda m, x: m["a"](torch.tanh(m["a"](input=x))), a=linear(6, 6)), "vector",
                        set()),
    "sequence first": (C(lambda m, x: torch.tanh(m["a"](x.transpose(0, 1))).mean(0), a=linear(6, 5)), "sequence",
                       {"0.layers.a.weight", "0.layers.a.bias"}),
    "other module": (S(linear(6, 5), lambda: nn.PReLU(5), linear(5, 3)), "vector", {"0.1.weight"}),
    "parametrised": (S(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.Tanh), "vector",
                     {"0.0.bias", "0.0.parametrizations.weight.original0", "0.0.parametrizations.weight.original1"}),
    "transformer": (lambda: transformer(True), "tokens", attention(True)),
    "transformer, sequence first": (lambda: transformer(False), "tokens", attention(False)),
    "lstm": (C(lambda m, x: m["lstm"](m["embed"](x))[0][:, -1], embed=lambda: nn.Embedding(7, 3),
               lstm=lambda: nn.LSTM(3, 4, batch_first=True)), "tokens",
             {f"0.layers.lstm.{name}_l0" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}),
}
every_net = pytest.mark.parametrize("net", NETS)


def autograd(task, split, vectors):
    """J [m, n, p], one example and one vector at a time."""
    named, rows = list(gradients.parameters(task).values()), []
    for i in range(len(split)):
        one = split.take([i])
        outputs = task.model.eval()(one.x)
        found = [torch.autograd.grad(outputs, named, v, retain_graph=True, allow_unused=True, materialize_grads=True)
                 for v in vectors(task, outputs.detach(), one.y)]
        rows.append(torch.stack([torch.cat([g.flatten() for g in gs]) for gs in found]))
    return torch.stack(rows, 1)


def near(got, expected):
    return got.shape == expected.shape and (got - expected).norm() <= 1e-12 * expected.norm()


@every_net
@pytest.mark.parametrize("vectors, keep", [(loss_slopes, 2**30), (unit_vectors, 0), (output_factors, 2**30)],
                         ids=["loss, kept", "outputs, streamed", "factors, kept"])
def test_gradients_and_their_products_equal_autograd_one_example_at_a_time(net, vectors, keep):
    task = task_of(*NETS[net][:2])
    J = autograd(task, task.train, vectors)
    G = Gradients(task, task.train, vectors, batch_size=4, keep=keep)  # a ragged last batch
    random = torch.Generator().manual_seed(1)
    V = torch.randn(J.shape[2], 3, generator=random, dtype=torch.float64)
    U = torch.randn(*J.shape[:2], 2, generator=random, dtype=torch.float64)
    w = torch.rand(11, generator=random, dtype=torch.float64)
    assert near(G.dense(), J)
    assert near(G @ V, J @ V)
    assert near(G.transposed(U), torch.einsum("mnp,mnk->pk", J, U))
    assert near(G.gram(V, w), torch.einsum("mnp,n,mnk->pk", J, w, J @ V))
    assert near(G.squared_norms(), J.square().sum((0, 2)))


@every_net
@pytest.mark.parametrize("vectors", [loss_slopes, output_factors])
def test_squares_of_single_entries_equal_those_of_autograd(net, vectors):
    task = task_of(*NETS[net][:2])
    J = autograd(task, task.train, vectors)
    random = torch.Generator().manual_seed(1)
    w = torch.rand(11, generator=random, dtype=torch.float64)
    metric = torch.rand(J.shape[2], generator=random, dtype=torch.float64)
    parts, diagonal, lengths = gradients.pieces(task, metric), 0, []
    for where, blocks in Gradients(task, task.train, vectors, batch_size=4):
        diagonal = diagonal + torch.cat([blocks[name].diagonal(w[where]) for name in parts])
        lengths.append(sum(blocks[name].lengths(part) for name, part in parts.items()))
    assert near(diagonal, torch.einsum("n,mnp->p", w, J.square()))
    assert near(torch.cat(lengths, 1), J.square() @ metric)


@every_net
def test_pairwise_products_equal_those_of_autograd(net):
    task = task_of(*NETS[net][:2])
    expected = autograd(task, task.test, loss_slopes)[0] @ autograd(task, task.train, loss_slopes)[0].T
    test, train = Gradients(task, task.test, batch_size=3), Gradients(task, task.train, batch_size=4)
    assert near(test.dot(train), expected)


@every_net
def test_only_what_hooks_cannot_see_is_left_to_other_ways(net):
    task = task_of(*NETS[net][:2])
    assert set(gradients.parameters(task)) - Gradients(task, task.train).trusted == NETS[net][2]
    single = task.to(torch.float32)
    assert set(gradients.parameters(task)) - Gradients(single, single.train).trusted == NETS[net][2]


def test_a_wide_model_has_its_memory_bounded_by_block():
    """A batch holds what is kept of an example, and twice what passes through its layers."""
    task = task_of(S(linear(6, 500), nn.Tanh, linear(500, 300), nn.Tanh), "vector")
    numbers = {"kept": 6 + 500 + 500 + 500 + 300 + 300 + 300 + 4 + 4, "passing": 2 * (6 + 500 + 500 + 300 + 300 + 4)}
    bytes_each = 8 * sum(numbers.values())
    for examples in (1, 7, 100):
        assert Gradients(task, task.train, block=examples * bytes_each + 8).batch_size == examples
    assert Gradients(task, task.train, block=1).batch_size == 1
    several = Gradients(task, task.train, unit_vectors, block=100 * bytes_each).batch_size
    assert 30 < several < 70  # four vectors an example share the inputs
    assert near(Gradients(task, task.train, block=3 * bytes_each).dense(), autograd(task, task.train, loss_slopes))


@pytest.mark.parametrize("norm, kind", [(lambda: nn.BatchNorm2d(2, track_running_stats=False), "image"),
                                        (C(lambda m, x: x - x.mean(0)), "vector")])
def test_examples_that_see_each_other_are_refused(norm, kind):
    with pytest.raises(ValueError, match=r"for itself, but its outputs change .* BatchNorm without running"):
        task_of(norm, kind)


def test_a_norm_that_cannot_take_one_example_is_refused():
    with pytest.raises(ValueError, match="one at a time: Expected more than 1 value per channel"):
        task_of(S(linear(6, 5), lambda: nn.BatchNorm1d(5, track_running_stats=False)), "vector")


class Own(nn.Linear):
    """A linear layer that the hooks do not know."""


@pytest.mark.parametrize("layer", [nn.Linear, Own])
def test_a_layer_that_takes_part_of_a_batch_is_refused_or_goes_the_general_way(layer):
    def routed(m, x):
        large = x[:, 0] > 0
        return torch.zeros_like(x).index_put((large,), m["a"](x[large])) + m["a"](x)

    task = task_of(C(routed, a=lambda: layer(6, 6)), "vector")
    task.train.x[:, 0] = -1.0
    task.train.x[[0, 1, 2, 3, 6, 10], 0] = 1.0  # the probes, of the first rows and of four from all, meet these only
    task.train.x[5, 0] = 1.0
    G = Gradients(task, task.train, batch_size=4)
    if layer is Own:
        assert near(G.dense(), autograd(task, task.train, loss_slopes))
    else:
        with pytest.raises(ValueError, match=r"layer of 0\.layers\.a\.\w+ must take every batch whole, .*class Own"):
            G.dense()


def half_squares(outputs, y):
    return 0.5 * (outputs.flatten(1).sum(1) - y).square()


@pytest.mark.parametrize("shape", [(), (1,), (3, 2)])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_outputs_of_any_shape_and_sets_of_any_size(shape, n):
    random = torch.Generator().manual_seed(n)
    x = torch.randn(n + 2, 4, generator=random, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 6 if shape == (3, 2) else 1),
                        nn.Unflatten(1, shape) if shape else nn.Flatten(0)).double()
    loss = half_squares if shape else lambda outputs, y: 0.5 * (outputs - y).square()
    task = Task(net, Split(x[:n], x[:n, 0]), Split(x[n:], x[n:, 0]), loss)
    J = autograd(task, task.train, unit_vectors)
    L = torch.ones(J.shape[0], J.shape[0], dtype=torch.float64)  # of a squared sum
    assert near(Gradients(task, task.train, unit_vectors).dense(), J)
    assert near(GGN(task).dense(), torch.einsum("mnp,mk,knq->pq", J, L, J) / n)
    assert near(gradients.example_gradients(task, task.train), autograd(task, task.train, loss_slopes)[0])


def test_a_loss_linear_in_the_outputs_has_no_curvature():
    task = task_of(S(linear(6, 5), nn.Tanh), "vector", loss=lambda outputs, y: outputs.sum(1))
    assert GGN(task).dense().abs().max() == 0
    assert torch.allclose(gradients.example_gradients(task, task.train), autograd(task, task.train, loss_slopes)[0])


def test_float32_gradients_are_those_of_float64_to_its_rounding():
    for net in ("conv2d groups", "layer norm", "embedding", "transformer"):
        task = task_of(*NETS[net][:2])
        exact, single = (gradients.example_gradients(t, t.train) for t in (task, task.to(torch.float32)))
        assert single.dtype == torch.float32
        assert (single - exact).norm() <= 1e-6 * exact.norm()
