import numpy as np
import pytest
import torch

from influence_nb import Task, data, models, newton


def test_all_cnn_has_the_published_shapes():
    model = models.all_cnn()
    counts = {name: sum(p.numel() for p in layer.parameters()) for name, layer in model.named_children()}
    assert counts == dict(h1_a=80, h1_c=584, h2_a=584, h2_c=584, h3_a=584, h3_c=90, h3_d=0, softmax_linear=110)
    assert sum(counts.values()) == 2616
    shapes, x = [], torch.rand(2, 1, 28, 28)
    for layer in model:
        x = layer(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(8, 26, 26), (8, 12, 12), (8, 10, 10), (8, 4, 4), (8, 2, 2), (10, 2, 2), (10,), (10,)]


def test_all_cnn_starts_from_the_cut_normal_distribution():
    weights = torch.cat([models.all_cnn(seed).h1_c[0].weight.detach().flatten() for seed in range(20)])
    std = 2 / 72**0.5
    assert weights.abs().max() <= 2 * std
    assert abs(weights.std() / (0.8796 * std) - 1) < 0.02  # the cut shrinks a normal's deviation to 0.8796
    assert all((p == 0).all() for name, p in models.all_cnn().named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("make", [lambda seed: models.logistic(6, 3, seed=seed), models.all_cnn,
                                  lambda seed: models.mlp([6, 5, 3], seed=seed)])
def test_seeds_decide_and_the_global_random_state_stays(make):
    before = torch.get_rng_state()
    same, other = (torch.cat([p.flatten() for p in make(seed).parameters()]) for seed in (3, 4))
    assert torch.equal(same, torch.cat([p.flatten() for p in make(3).parameters()])) and not torch.equal(same, other)
    assert torch.equal(before, torch.get_rng_state())


def test_mlp_is_the_formula_it_names():
    model, x = models.mlp([6, 5, 3], seed=1).double(), torch.rand(4, 2, 3, dtype=torch.float64)
    hidden = torch.tanh(x.flatten(1) @ model.linear1.weight.T + model.linear1.bias)
    assert torch.allclose(model(x), hidden @ model.linear2.weight.T + model.linear2.bias)
    with pytest.raises(ValueError, match="at least input and output width"):
        models.mlp([4])


def test_weights_survive_a_file_and_foreign_ones_are_refused(tmp_path):
    model = models.mlp([6, 5, 3], seed=1)
    path = models.save_weights(model, tmp_path / "net")
    again = models.load_weights(models.mlp([6, 5, 3], seed=2), path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    with pytest.raises(ValueError, match="net.npz are of another model"):
        models.load_weights(models.mlp([6, 4, 3]), path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        models.load_weights(model, path)
    np.savez(path, **{"linear1.weight": np.array([{}], dtype=object)})
    with pytest.raises(ValueError, match="expected weights written by save_weights"):
        models.load_weights(model, path)


def test_the_converged_all_cnn_is_stationary_and_still_misreads_the_six():
    train, test = (split.to(torch.float64) for split in data.load("mnist-5500"))
    task = Task(models.converged_all_cnn(), train, test, l2=1e-3)
    value, slope = newton.risk_and_slope(task, newton.theta(task))
    assert value == pytest.approx(0.115531994982, abs=1e-11) and slope.norm() < 1e-10
    assert len(task.mistakes()) == 255 and task.predict(test.take([6558])).tolist() == [2]


def test_the_shipped_all_cnn_reads_sixes_as_the_published_one_does():
    task = Task(models.trained_all_cnn(), *data.load("mnist-5500"), l2=1e-3)
    mistakes = task.mistakes()
    sixes = [i for i in mistakes.tolist() if task.test.y[i] == 6]
    assert len(mistakes) == 276  # of 10,000: 97.24 % right
    assert len(sixes) == 21 and 6558 in sixes and task.predict()[6558] == 2
    assert sum(p.numel() for p in task.model.parameters()) == 2616 and not task.model.training
