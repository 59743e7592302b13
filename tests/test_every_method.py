import pytest
import torch
from problems import digits_task

import influence_nb
from influence_nb import GGN, Hessian, Scores, check_method
from influence_nb.attribute import CG, EKFAC, KFAC, METHODS, TRAK, GradDot, Influence

VARIANTS = [*(method() for method in METHODS), Influence(curvature=GGN), CG(curvature=Hessian),
            influence_nb.Cosine("linear1"), EKFAC(damping=1e-4, refine=20)]
NEAR = {KFAC: 0.9, EKFAC: 0.9,  # Pearson with retraining where a layer is a Kronecker product only nearly,
        TRAK: 0.95}             # and where three classes are taken for one against the others


@pytest.mark.parametrize("method", VARIANTS, ids=lambda m: f"{type(m).__name__}-{m}"[:40])
def test_method_passes_the_conformance_check(method):
    passed = check_method(method, NEAR.get(type(method), 0.99))
    assert {"shape", "duplicates", "order of the data", "fitted anew", "model left as found",
            "random state"} <= set(passed)
    effect, selves = method.fit(digits_task()).scores().is_effect, hasattr(method, "self_influence")
    assert ("leave-one-out" in passed) == effect and ("self-influence in any order" in passed) == selves
    assert ("self-influence and scores" in passed) == (effect and selves)


@pytest.mark.parametrize("method", METHODS)
def test_method_is_public(method):
    assert getattr(influence_nb, method.__name__) is method and method.__name__ in influence_nb.__all__


class Wrong:
    """Influence with one fault: the check must find each."""

    def __init__(self, fault):
        self.fault = fault

    def fit(self, task):
        if self.fault == "again" and hasattr(self, "inner"):
            return self
        self.inner, self.task = Influence(damping=1.0 if self.fault == "damped" else 0.0, curvature=GGN).fit(task), task
        if self.fault == "mode":
            task.model.eval()
        if self.fault == "random":
            torch.rand(1)
        return self

    def scores(self, split=None):
        scores = self.inner.scores(split)
        if self.fault == "rows" and split is not None:
            split = split.take([1, 0]) if len(split) == 2 else split
            scores = self.inner.scores(split)
        values = {"sign": -1, "scale": len(self.task.train)}.get(self.fault, 1) * scores.values
        return Scores(values, "Wrong()", scores.task, scores.test_ids, scores.train_ids)

    def self_influence(self):
        factor = {"sign": -1, "scale": len(self.task.train), "selves": 0.5}.get(self.fault, 1)
        own = factor * self.inner.self_influence()
        return {"shape": own[:, None], "nan": own / 0 * 0, "order": own + torch.arange(41)}.get(self.fault, own)


@pytest.mark.parametrize("fault, name", [("sign", "sign"), ("scale", "leave-one-out"), ("damped", "leave-one-out"),
                                         ("mode", "model left as found"), ("random", "random state"),
                                         ("rows", "part of the test points"), ("again", "fitted anew"),
                                         ("shape", "self-influence"), ("nan", "self-influence"),
                                         ("order", "self-influence in any order"),
                                         ("selves", "self-influence and scores")])
def test_the_check_finds_a_planted_fault(fault, name):
    with pytest.raises(ValueError, match=f"Wrong fails '{name}'"):
        check_method(Wrong(fault))


def test_a_plain_gradient_product_is_no_removal_effect():
    class Pretender(GradDot):
        def scores(self, split=None):
            s = super().scores(split)
            return Scores(s.values / 41, "Pretender()", s.task, s.test_ids, s.train_ids)

        def self_influence(self):
            return super().self_influence() / 41

    for pearson in (0.99, min(NEAR.values())):
        with pytest.raises(ValueError, match="fails 'leave-one-out'"):
            check_method(Pretender(), pearson)
