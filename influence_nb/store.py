"""Finished retrainings on disk: a folder that a run which was killed goes on from, and that can be audited.

`header.json` says what was asked. Every other file is an .npz of plain arrays, with the training weights `w` [b, n]
that b models were trained with, their `readings` [b, n_test], and their `certificates` as JSON. It is named by a digest
of w, and written under another name first: a file that has its name is whole.
"""

import json
import os
import platform
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from threading import get_ident
from typing import NamedTuple

import numpy as np
import torch

from .fingerprint import described, digest
from .task import Task

FORMAT = "influence_nb truth 1"


class Block(NamedTuple):
    """Retrained models: their training weights [b, n], readings [b, n_test] and certificates."""

    w: np.ndarray
    readings: np.ndarray
    certificates: list


@dataclass
class Store:
    """The finished retrainings in `folder`, all of the one question `asked`; a new or empty folder becomes one.

    Raises:
        ValueError: the folder holds the answers to another question, or something else. It is left as it was.
    """

    folder: Path
    asked: dict

    def __post_init__(self):
        self.folder = Path(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not any(path.name[0] != "." for path in self.folder.iterdir()):
            versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
            header = json.dumps({"format": FORMAT, **self.asked, "versions": versions}, indent=1)
            written(self.folder / "header.json", lambda file: file.write(header.encode()))
        self.check()

    def check(self) -> None:
        found = header_of(self.folder)
        wrong = [f"{name} {value!r}, got {found.get(name)!r}" for name, value in self.asked.items()
                 if found.get(name) != value]
        if wrong:
            raise ValueError(f"expected retrainings of {'; of '.join(wrong)} in the folder {self.folder.name}: give "
                             "store= another folder, for every question its own")

    def get(self, w: np.ndarray) -> Block | None:
        """The block of retrainings with these weights [b, n], if it is there."""
        path = self.path(w)
        if not path.exists():
            return None
        block = opened(path)
        if not np.array_equal(block.w, w):
            raise ValueError(f"{path.name} holds retrainings with other weights than its name says: delete it, and its "
                             "retrainings are done again")
        return block

    def put(self, block: Block) -> None:
        """Keep a finished block, in a folder that no other run has made its own meanwhile."""
        self.check()
        written(self.path(block.w), lambda file: np.savez_compressed(
            file, w=block.w, readings=block.readings, certificates=np.array(json.dumps(block.certificates))))

    def path(self, w: np.ndarray) -> Path:
        return self.folder / f"{digest(w)}.npz"


def audit(folder) -> tuple[dict, Block]:
    """What a folder of retrainings holds: its header, and all of them as one block.

    They are in the order of their weights: without example 0 first, without none last. Of those with the same weights,
    from calls that retrained another number together, there is one.

    Raises:
        ValueError: it is no such folder, or a file in it is damaged.
    """
    header, blocks = header_of(Path(folder)), [opened(path) for path in sorted(Path(folder).glob("*.npz"))]
    if not blocks:
        raise ValueError(f"no retraining is finished in the folder {Path(folder).name}")
    w, readings = (np.concatenate([getattr(block, name) for block in blocks]) for name in ("w", "readings"))
    w, first = np.unique(w, axis=0, return_index=True)
    certificates = [c for block in blocks for c in block.certificates]
    return header, Block(w, readings[first], [certificates[i] for i in first])


def header_of(folder: Path) -> dict:
    """What was asked of the retrainings in `folder`."""
    try:
        header = json.loads((folder / "header.json").read_text())
        if header["format"] != FORMAT:
            raise ValueError("unknown format")
        return header
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"expected a new or empty folder, or one of retrainings, got {folder.name} ({error}): give "
                         "store= another folder") from error


def opened(path: Path) -> Block:
    """Read one file of a store."""
    try:
        with np.load(path, allow_pickle=False) as file:
            block = Block(file["w"], file["readings"], json.loads(str(file["certificates"])))
        if not len(block.w) == len(block.readings) == len(block.certificates):
            raise ValueError("its parts have different lengths")
        return block
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile,
            zipfile.zlib.error) as error:
        raise ValueError(f"{path.name} in the folder {path.parent.name} is damaged, or no file of a store ({error}): "
                         "delete it, and its retrainings are done again") from error


def written(path: Path, write) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.stem}-{os.getpid()}-{get_ident()}")
    with open(temporary, "wb") as file:
        write(file)
    os.replace(temporary, path)


def certificate(found) -> dict:
    """The plain entries of the record that a retrainer returns: gradient norm, steps, passes, risk."""
    entries = {f.name: getattr(found, f.name) for f in fields(found)} if is_dataclass(found) else {}
    plain = (int, float, str, type(None))
    return {name: value for name, value in entries.items() if isinstance(value, plain)
            or (isinstance(value, list) and all(isinstance(v, plain) for v in value))}


def question(task: Task, retrain: Callable | None, tol: float) -> dict:
    """What a store is asked: the task, its test points, and how it is retrained."""
    kind = f"to the nearest optimum, |gradient| <= {tol:g}" if retrain is None else described(retrain)
    return {"task": task.fingerprint(), "test points": digest(task.test.x, task.test.y), "retraining": kind}
