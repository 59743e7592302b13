"""Make the data files beside this script from the published ones: python data/make_data.py FOLDER

FOLDER holds MNIST and Fashion-MNIST in any layout that `data.load` reads (if they are not there, they are downloaded
into it), and amazon.json, imdb.json and yelp.json of the npm package sentiment 5.0.2 (in its test/fixtures).
Without FOLDER, only SHA256SUMS is written anew.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from influence_nb import raw

HERE = Path(__file__).parent
CONTROLS = {0x85: "…", 0x96: "–", 0x97: "—"}  # Windows characters that the published files hold as control codes


def mnist_5500(folder: Path) -> None:
    """Koh & Liang (2017), load_mnist.py: 5,000 images set aside, the others shuffled with seed 0, a tenth kept."""
    x_train, y_train, x_test, y_test = raw.published("mnist", folder)
    order = np.arange(55000)
    np.random.RandomState(0).shuffle(order)
    ids = 5000 + order[:5500]
    assert ids.sum() == 152096415 + 5000 * 5500
    np.savez_compressed(HERE / "mnist-5500.npz", x_train=x_train[ids, 0], y_train=y_train[ids], ids_train=ids,
                        x_test=x_test[:, 0], y_test=y_test)


def fashion_small(folder: Path) -> None:
    """The first 200 training and 100 test images of each class, in official order."""
    x_train, y_train, x_test, y_test = raw.published("fashion-mnist", folder)
    train, test = (np.sort(np.concatenate([np.flatnonzero(y == c)[:count] for c in range(10)]))
                   for y, count in ((y_train, 200), (y_test, 100)))
    np.savez_compressed(HERE / "fashion-small.npz", x_train=x_train[train, 0], y_train=y_train[train], ids_train=train,
                        x_test=x_test[test, 0], y_test=y_test[test], ids_test=test)


def sentiment(folder: Path) -> None:
    """Every fifth sentence of each source and label is for testing; one sentence a line, tabs between, no quoting."""
    lines = ["part\tsource\tlabel\ttext"]
    for source in ("amazon", "imdb", "yelp"):
        seen = [0, 0]
        for entry in json.loads((folder / f"{source}.json").read_text(encoding="utf-8"))[:1000]:  # the last is empty
            label, text = entry["class"], entry["text"].strip().translate(CONTROLS)
            assert text.isprintable(), text
            seen[label] += 1
            lines.append(f"{'train' if seen[label] % 5 else 'test'}\t{source}\t{label}\t{text}")
        assert seen == [500, 500]
    (HERE / "sentiment.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def sums() -> None:
    """SHA256SUMS of every data file here, as `sha256sum --check` reads it."""
    files = sorted([*HERE.glob("*.npz"), *HERE.glob("*.tsv")])
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    (HERE / "SHA256SUMS").write_text("".join(lines), newline="\n")


if __name__ == "__main__":
    for make in (mnist_5500, fashion_small, sentiment) if len(sys.argv) > 1 else ():
        make(Path(sys.argv[1]))
    sums()
