"""Scores: what each training example did to each test point, with what is needed to believe it."""

import html
import json
import platform
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .task import Task

EFFECT = "nats per removed example"
ROUGH = "the run is too ROUGH for its derivative, do not trust these: a smaller learning rate, fewer epochs or GELU"
INDEFINITE = "the curvature is INDEFINITE here, do not trust these: curvature=GGN, more damping, or train to a minimum"

UNSOLVED = "the median residual is above 1: read ranks, not sizes (refine=, more products or more damping)"


class Top(NamedTuple):
    """The strongest training examples of one test point: ids and scores, strongest first."""

    test_id: int
    helpful: list
    helpful_scores: list
    harmful: list
    harmful_scores: list


@dataclass(frozen=True, eq=False)
class Scores:
    """What each training example did to each test point, with what is needed to believe it.

    Args:
        values: Tensor [n_test, n_train]; positive = helpful.
        method: the method's repr.
        task: fingerprint of the task.
        test_ids, train_ids: Tensors [n_test], [n_train].
        unit: "nats per removed example" for removal effects; anything else is ranked, never compared in nats.
        certificate: what the numbers rest on (gradient norm at theta, residuals, smallest eigenvalue, damping).
        provenance: curvature, solver, seeds, versions.
    """

    values: Tensor
    method: str
    task: str
    test_ids: Tensor
    train_ids: Tensor
    unit: str = EFFECT
    certificate: dict = field(default_factory=dict)
    provenance: dict = field(default_factory=dict)

    def __post_init__(self):
        expected = (len(self.test_ids), len(self.train_ids))
        if tuple(self.values.shape) != expected:
            hint = ": transpose?" if tuple(self.values.shape) == expected[::-1] else ""
            raise ValueError(f"scores must be [n_test, n_train] = {expected}, got {tuple(self.values.shape)}{hint}")
        versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        object.__setattr__(self, "provenance", {"versions": versions, **self.provenance})

    @property
    def shape(self):
        return tuple(self.values.shape)

    @property
    def is_effect(self) -> bool:
        """Whether the values are removal effects, so that their sign and size mean something."""
        return self.unit.endswith("per removed example")

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values.detach().cpu(), dtype=dtype)

    def row(self, test_id: int) -> Tensor:
        """The scores [n_train] of one test point, by its id."""
        where = (self.test_ids == int(test_id)).nonzero()
        if not len(where):
            known = ", ".join(map(str, self.test_ids[:5].tolist())) + (", ..." if len(self.test_ids) > 5 else "")
            raise KeyError(f"no test point {int(test_id)} in these scores, which hold {len(self.test_ids)}: {known}")
        return self.values[where[0, 0]]

    def top(self, test_id: int, k: int = 10) -> Top:
        """The k most helpful and the k most harmful training examples of one test point.

        Of removal effects, only positive ones are called helpful and only negative ones harmful, so that a list may be
        shorter than k. Equal scores keep the order of their ids.
        """
        row, sides = self.row(test_id).detach().cpu(), []
        for sign in (1, -1):
            order = torch.argsort(-sign * row, stable=True)[:k]
            order = order[sign * row[order] > 0] if self.is_effect else order
            sides += [self.train_ids[order].tolist(), row[order].tolist()]
        return Top(int(test_id), *sides)

    def save(self, path) -> Path:
        """Write values, ids and records to `path` (.npz, nothing pickled)."""
        path = Path(path) if Path(path).suffix == ".npz" else Path(f"{path}.npz")
        records = {"format": "influence_nb scores 1", "method": self.method, "task": self.task, "unit": self.unit,
                   "certificate": self.certificate, "provenance": self.provenance}
        with open(path, "wb") as file:
            np.savez_compressed(file, values=np.asarray(self), test_ids=self.test_ids.numpy(),
                                train_ids=self.train_ids.numpy(), records=np.array(json.dumps(records)))
        return path

    @classmethod
    def load(cls, path, task: Task | None = None) -> "Scores":
        """Read scores from `path`; with `task`, refuse the scores of another one.

        Raises:
            ValueError: the file is damaged, is no scores file, or belongs to another task.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                records = json.loads(str(file["records"]))
                arrays = [torch.from_numpy(file[name]) for name in ("values", "test_ids", "train_ids")]
            if records.pop("format") != "influence_nb scores 1":
                raise ValueError("unknown format")
        except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile,
                zipfile.zlib.error) as error:
            raise ValueError(f"expected a scores file written by Scores.save, got {Path(path).name}, which is "
                             f"damaged or something else ({error}): compute the scores again") from error
        values, test_ids, train_ids = arrays
        scores = cls(values=values, test_ids=test_ids, train_ids=train_ids, **records)
        if task is not None and scores.task != (expected := task.fingerprint()):
            raise ValueError(f"expected scores of task {expected}, got scores of task {scores.task} in "
                             f"{Path(path).name}: the model, its training data or the loss differ; compute the scores "
                             "again")
        return scores

    def flags(self) -> list[str]:
        """What a reader must know first: an indefinite curvature, a rough run, systems that were not solved."""
        residual = self.certificate.get("residual") or [0]
        smoothness = self.certificate.get("smoothness")
        rough = smoothness is not None and not smoothness >= 0.5
        return ([INDEFINITE] * bool(self.certificate.get("indefinite")) + [ROUGH] * rough
                + [UNSOLVED] * bool(np.median(residual) > 1))

    def __repr__(self):
        flag = "".join(f"; {flag}" for flag in self.flags())
        return f"Scores({self.method}, {self.shape[0]} test x {self.shape[1]} train, {self.unit}{flag})"

    def _repr_html_(self):
        low, high = float(self.values.min()), float(self.values.max())
        sign = "positive = helpful" if self.is_effect else "ranked only, not a removal effect"
        rows = [("method", self.method), ("unit", self.unit), ("sign", sign), ("range", f"{low:.3g} to {high:.3g}"),
                ("task", self.task), *self.certificate.items()]
        body = "".join(f"<tr><th style='text-align:left'>{html.escape(str(name))}</th>"
                       f"<td style='text-align:left'>{html.escape(shown(value))}</td></tr>" for name, value in rows)
        flag = "".join(f"<p><b>{html.escape(flag)}</b></p>" for flag in self.flags())
        return (f"<b>Scores</b> {self.shape[0]} test points × {self.shape[1]} training examples"
                f"<table>{body}</table>{flag}")


def shown(value) -> str:
    """A certificate's value as a reader wants it: floats to three digits, long lists by their worst entry."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, (list, tuple)) and value:
        return f"at most {max(value):.3g} over {len(value)} test points"
    return str(value)
