"""Names alone cannot tell functions apart; what they compute with can, and in every process alike."""

import functools
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import digits_task
from torch import nn

from influence_nb import fit, models
from influence_nb.fingerprint import described, digest

RATE = 0.1


def made(source, **known):
    """What a notebook's cell defines as `f`, among the cell's globals."""
    exec(source, cell := {"__name__": "__main__", "torch": torch, **known})
    return cell["f"]


def closed(lr):
    def train(task, w):
        return fit(task, 3, optimizer=partial(torch.optim.SGD, lr=lr), w=w)
    return train


class Trains:
    """A retrainer with a setting."""

    def __init__(self, lr):
        self.lr = lr

    def __call__(self, task, w):
        return fit(task, 3, optimizer=partial(torch.optim.SGD, lr=self.lr), w=w)

    def run(self, task, w):
        return self(task, w)


@dataclass
class Settings:
    lr: float
    seeds: list


class Net(nn.Module):
    """A model with settings, a lock and what it saw last."""

    def __init__(self, scale=2.0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.linear = nn.Linear(3, 2)
        self.scale, self.last, self.lock, self.act = scale, None, threading.Lock(), lambda o: o * RATE

    def forward(self, x):
        self.last = self.act(self.scale * self.linear(x))
        return self.last


CELLS = {  # two of a notebook, in which f is not the same
    "number": ("def f(p): return torch.optim.SGD(p, lr=0.1)", "def f(p): return torch.optim.SGD(p, lr=0.5)"),
    "function": ("def f(p): return torch.optim.SGD(p)", "def f(p): return torch.optim.Adam(p)"),
    "default": ("def f(p, lr=0.1): return lr", "def f(p, lr=0.5): return lr"),
    "keyword": ("def f(p, *, lr=0.1): return lr", "def f(p, *, lr=0.5): return lr"),
    "inside": ("def f(p): return [0.1 * q for q in p]", "def f(p): return [0.5 * q for q in p]"),
    "global": ("lr = 0.1\ndef f(p): return lr", "lr = 0.5\ndef f(p): return lr"),
    "global inside": ("lr = 0.1\ndef f(p): return [lr for q in p]", "lr = 0.5\ndef f(p): return [lr for q in p]"),
    "called": ("def g(p): return 1\ndef f(p): return g(p)", "def g(p): return 2\ndef f(p): return g(p)"),
    "itself": ("def f(p): return 1 if p else f(1)", "def f(p): return 2 if p else f(1)"),
    "method": ("class f:\n def a(self): return 1", "class f:\n def a(self): return 2"),
    "attribute": ("class f:\n lr = 1", "class f:\n lr = 2"),
    "property": ("class f:\n @property\n def a(self): return 1", "class f:\n @property\n def a(self): return 2"),
    "parent": ("class g: lr = 1\nclass f(g): pass", "class g: lr = 2\nclass f(g): pass"),
}
PAIRS = {
    **{name: (made(one), made(other)) for name, (one, other) in CELLS.items()},
    "closure": (closed(0.1), closed(0.5)),
    "instance": (Trains(0.1), Trains(0.5)),
    "bound method": (Trains(0.1).run, Trains(0.5).run),
    "other method": (Trains(0.1).run, Trains(0.1).__call__),
    "dataclass": (Settings(0.1, [1]), Settings(0.1, [2])),
    "list": (partial(fit, lrs=[0.1]), partial(fit, lrs=[0.5])),
    "dict": (partial(fit, lrs={"a": (0.1,)}), partial(fit, lrs={"a": (0.5,)})),
    "set": (partial(fit, ids={1, 2}), partial(fit, ids={1, 3})),
    "scalar": (partial(fit, lr=np.float32(0.1)), partial(fit, lr=np.float32(0.5))),
    "array": (partial(fit, w=np.arange(3)), partial(fit, w=np.arange(1, 4))),
    "objects": (partial(fit, w=np.array([None, 1])), partial(fit, w=np.array([None, 2]))),
    "tensor": (partial(fit, w=torch.zeros(3).bfloat16()), partial(fit, w=torch.ones(3).bfloat16())),
    "shape": (torch.zeros(3, 2), torch.zeros(2, 3)),
    "dtype": (partial(fit, dtype=torch.float32), partial(fit, dtype=torch.float64)),
    "path": (partial(fit, folder=Path("a")), partial(fit, folder=Path("b"))),
    "generator": (torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)),
    "loss": (nn.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss(label_smoothing=0.5)),
    "activation": (models.mlp([3, 4, 2]), models.mlp([3, 4, 2], nn.ReLU)),
    "model": (Net(), Net(scale=3.0)),
    "weights": (models.mlp([3, 4, 2]), models.mlp([3, 4, 2], seed=1)),
}


@pytest.mark.parametrize("one, other", PAIRS.values(), ids=PAIRS)
def test_what_differs_is_told_apart(one, other):
    assert described(one) == described(one) != described(other)


def test_what_is_made_again_is_the_same():
    assert described(closed(0.1)) == described(closed(0.1)) and described(Trains(0.1).run) == described(Trains(0.1).run)
    assert described(made("def f(p): return 1")) == described(made("\n\n# why\ndef f(p):\n    return 1"))
    assert described(Net()) == described(Net())
    assert described(partial(fit, epochs=3, seed=1, progress=False)) == described(partial(fit, seed=1, epochs=3))
    seen = Net()
    seen(torch.ones(1, 3)), seen.register_forward_hook(lambda *given: None), seen.eval()
    assert described(seen) == described(Net())


@pytest.mark.parametrize("value", [closed(0.1), Net()], ids=["function", "model"])
def test_what_is_compiled_is_what_it_was(value):
    assert described(torch.compile(value)) == described(value)


def test_a_setting_is_read_in_the_words():
    words = described(partial(fit, epochs=3, optimizer=partial(torch.optim.SGD, lr=0.1)))
    assert words == "influence_nb.train.fit(epochs=3, optimizer=torch.optim.sgd.SGD(lr=0.1))"
    assert [described(each) for each in (np.exp, len, torch)] == ["numpy.exp", "builtins.len", "torch"]
    assert described(closed(0.1)).startswith("test_fingerprint.closed.<locals>.train:")


@pytest.mark.parametrize("value, words", [
    (partial(fit, lock=threading.Lock()), "holds a lock"),
    (made("def f(p): return lock", lock=threading.Lock()), "holds a lock"),
    (Trains(i for i in range(3)), "holds a generator"),
    (functools.lru_cache(lambda p: p), "holds a _lru_cache_wrapper .it is known by its name only"),
])
def test_what_no_other_process_can_know_is_refused(value, words):
    with pytest.raises(ValueError, match=f"functions, classes and values.*{words}.*make that inside the function"):
        described(value)


def everything():
    """Descriptions, one of each."""
    task = digits_task(trained=False)
    return [*(described(value) for pair in PAIRS.values() for value in pair), task.fingerprint()]


def test_another_process_agrees():
    here = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]), "PYTHONHASHSEED": "7"}
    code = "import json, test_fingerprint; print(json.dumps(test_fingerprint.everything()))"
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == everything()


def test_a_digest_sees_numbers_shape_and_type():
    x = torch.arange(6.0)
    assert len({digest(each) for each in (x, x.double(), x.reshape(2, 3), x + 1, x.numpy())}) == 5
    assert digest(x) == digest(x.clone()) == digest(torch.arange(12.0)[::2] / 2)
