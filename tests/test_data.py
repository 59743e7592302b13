"""The named data sets, their files, and corruptions."""

import functools
import hashlib
import math
import random
import re
import shutil
import struct
from collections import Counter

import numpy as np
import pytest
import torch

from influence_nb import Split, data

SHIPPED = ("mnist-5500", "fashion-small", "sentiment")
SMALL = (*SHIPPED, "iris", "digits")
load = functools.cache(data.load)  # read-only use below


def as_bytes(split):
    return split.x.mul(255).round().byte().numpy()


def idx(array) -> bytes:
    """An idx file of bytes, header and all."""
    return struct.pack(f">{1 + array.ndim}i", 0x0800 + array.ndim, *array.shape) + array.tobytes()


# shipped sets
def test_mnist_5500_holds_the_published_subset_in_its_order():
    with np.load(data.shipped("mnist-5500.npz")) as file:
        ids, y_train = file["ids_train"], file["y_train"]
    perm = ids - 5000
    assert perm.sum() == 152096415
    assert perm[:10].tolist() == [2921, 53711, 27402, 14832, 49726, 10701, 24413, 18057, 52822, 24651]
    order = np.arange(55000)
    np.random.RandomState(0).shuffle(order)
    assert (perm == order[:5500]).all()

    train, test = load("mnist-5500")
    assert (train.y.numpy() == y_train).all()
    assert train.y.bincount().tolist() == [536, 612, 588, 523, 533, 474, 576, 569, 570, 519]
    assert test.y.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert train.classes == tuple("0123456789") and test.y[6558] == 6
    assert train.ids.tolist() == list(range(5500))
    assert as_bytes(train).sum(dtype=np.int64) == 144412922  # from the official training file and the indices above


def test_mnist_test_images_are_bit_exact():
    """The official files' md5, from what was loaded with their headers put back."""
    test = load("mnist-5500")[1]
    assert hashlib.md5(idx(as_bytes(test)[:, 0])).hexdigest() == "2646ac647ad5339dbf082846283269ea"
    assert hashlib.md5(idx(test.y.byte().numpy())).hexdigest() == "27ae3e4e09519cfbb04c329615203637"


def test_mnist_images_are_bytes_over_255():
    train = load("mnist-5500")[0]
    with np.load(data.shipped("mnist-5500.npz")) as file:
        expected = file["x_train"].astype(np.float32) / np.float32(255)
    assert train.x.dtype == torch.float32 and (train.x[:, 0].numpy() == expected).all()


def test_fashion_small_is_balanced_and_in_official_order():
    for split, part, count in zip(load("fashion-small"), ("train", "test"), (200, 100), strict=True):
        with np.load(data.shipped("fashion-small.npz")) as file:
            ids = file[f"ids_{part}"]
        assert split.y.bincount().tolist() == [count] * 10 and (np.diff(ids) > 0).all()
        assert split.classes[int(split.y[0])] == "Ankle boot"  # both official files begin with one
        assert ids[0] == 0 and float(split.x.max()) == 1


def test_sentiment_is_balanced_and_readable():
    train, test = load("sentiment")
    assert train.classes == ("negative", "positive") and train.y.bincount().tolist() == [1200, 1200]
    assert test.y.bincount().tolist() == [300, 300]
    assert train.text[0] == "So there is no way for me to plug it in here in the US unless I go by a converter."
    assert (train.text[1], int(train.y[1])) == ("Good case, Excellent value.", 1)
    assert all(text.isprintable() and text == text.strip() for text in train.text + test.text)
    assert len(train.text) == 2400 and len(test.text) == 600


def test_sentiment_features_are_tfidf_of_the_training_words():
    """Against the formula: tf * (ln((1 + n) / (1 + df)) + 1), rows of length 1, words of two training sentences on."""
    train, test = load("sentiment")
    words = [re.findall(r"\b\w\w+\b", text.lower()) for text in train.text]
    df = Counter(word for sentence in words for word in set(sentence))
    kept = sorted(word for word, count in df.items() if count >= 2)
    assert train.x.shape[1] == test.x.shape[1] == len(kept) == 1868
    for split, row in ((train, 1), (test, 7)):
        tf = Counter(re.findall(r"\b\w\w+\b", split.text[row].lower()))
        expected = torch.tensor([tf[word] * (math.log(2401 / (1 + df[word])) + 1) for word in kept])
        assert torch.allclose(split.x[row], expected / expected.norm(), atol=1e-6)


def test_sentiment_can_be_learned():
    from sklearn.linear_model import LogisticRegression

    train, test = load("sentiment")
    assert LogisticRegression(C=3).fit(train.x, train.y).score(test.x, test.y) > 0.8


@pytest.mark.parametrize("file", ["mnist-5500.npz", "fashion-small.npz", "sentiment.tsv"])
def test_shipped_files_are_small_and_documented(file):
    path = data.shipped(file)
    assert path.stat().st_size < 3e6
    readme = (path.parent / "README.md").read_text(encoding="utf-8")
    assert file in readme and hashlib.sha256(path.read_bytes()).hexdigest() in readme


def test_sha256sums_list_every_data_file():
    lines = (data.DATA / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in map(str.split, lines)}
    files = {path.name for pattern in ("*.npz", "*.tsv") for path in data.DATA.glob(pattern)}
    assert set(sums) == files
    for name, digest in sums.items():
        assert hashlib.sha256((data.DATA / name).read_bytes()).hexdigest() == digest


# scikit-learn's sets
def test_iris_is_standardised_by_its_training_flowers():
    train, test = load("iris")
    assert torch.allclose(train.x.mean(0), torch.zeros(4), atol=1e-6)
    assert torch.allclose(train.x.std(0, correction=0), torch.ones(4), atol=1e-6)
    assert test.x.mean(0).abs().max() > 0.01  # the test flowers had no say in it
    assert sorted(train.y.bincount().tolist()) == [33, 33, 34] and len(test) == 50
    assert train.classes == ("setosa", "versicolor", "virginica")


def test_digits_are_all_there_once():
    from sklearn.datasets import load_digits

    train, test = load("digits")
    assert train.x.shape == (1200, 1, 8, 8) and test.x.shape == (597, 1, 8, 8) and train.x.dtype == torch.float32
    rows = torch.cat([torch.cat([split.x.flatten(1) * 16, split.y[:, None]], 1) for split in (train, test)])
    official = load_digits()
    expected = np.column_stack([official.data, official.target])
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, expected.tolist()))
    assert train.y.bincount().min() >= 116  # each class in proportion: 174 of 1797 is the rarest


# every set
@pytest.mark.parametrize("name", SMALL)
def test_loading_twice_gives_equal_tensors_and_leaves_random_state_alone(name):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    for once, again in zip(load(name), data.load(name), strict=True):
        assert torch.equal(once.x, again.x) and torch.equal(once.y, again.y) and once.text == again.text
        assert once.x.is_contiguous() and once.x.dtype == torch.float32 and once.y.dtype == torch.int64
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


@pytest.mark.parametrize("name", ["mnist5500", "MNIST", None])
def test_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match="mnist-5500, fashion-small, sentiment, iris, digits, mnist") as error:
        data.load(name)
    assert repr(name) in str(error.value)


# damaged or missing shipped files
@pytest.fixture
def copy(tmp_path):
    for name in ("SHA256SUMS", "fashion-small.npz", "sentiment.tsv"):
        shutil.copy(data.DATA / name, tmp_path)
    return tmp_path


@pytest.mark.parametrize("name, file", [("fashion-small", "fashion-small.npz"), ("sentiment", "sentiment.tsv")])
def test_a_damaged_shipped_file_is_refused(copy, name, file):
    good = data.load(name, folder=copy)[0]
    assert torch.equal(good.x, load(name)[0].x)
    content = bytearray((copy / file).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / file).write_bytes(content)
    expected = hashlib.sha256((data.DATA / file).read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=f"{file} is damaged: expected sha256 {expected}, got .*: git checkout"):
        data.load(name, folder=copy)


def test_a_missing_shipped_file_says_where_it_comes_from(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match="mnist-5500.npz, found nothing: .* comes with a clone"):
        data.load("mnist-5500", folder=copy)
    with pytest.raises(FileNotFoundError, match="SHA256SUMS, found nothing"):
        data.load("mnist-5500", folder=tmp_path / "nowhere")


def test_a_file_without_a_sum_is_refused(copy):
    (copy / "extra.npz").write_bytes(b"?")
    with pytest.raises(ValueError, match="expected extra.npz in .*SHA256SUMS"):
        data.shipped("extra.npz", copy)


def test_a_stored_result_is_its_arrays_compared_and_never_unpickled(copy):
    def put(**arrays):
        np.savez(copy / "truth.npz", **arrays)
        digest = hashlib.sha256((copy / "truth.npz").read_bytes()).hexdigest()
        (copy / "SHA256SUMS").write_text(f"{digest}  truth.npz\n")

    put(effect=np.array([[0.5, -0.25]]), turned=np.array([True, False]), six=np.int64(6558))
    found = data.stored("truth", copy)
    assert list(found) == ["effect", "turned", "six"] and found["effect"].dtype == torch.float64
    assert found["effect"].tolist() == [[0.5, -0.25]] and found["turned"].tolist() == [True, False]
    assert found["six"].item() == 6558
    put(effect=np.array([{}]))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        data.stored("truth", copy)
    (copy / "truth.npz").write_bytes(b"?")
    with pytest.raises(ValueError, match="truth.npz is damaged"):
        data.stored("truth", copy)


# corruptions
@pytest.fixture
def small():
    x = torch.rand(40, 2, 5, 4, generator=torch.Generator().manual_seed(1))
    return Split(x, torch.arange(40) % 4, "abcd", [f"example {i}" for i in range(40)])


@pytest.fixture
def untouched(small):
    x, y, ids = small.x.clone(), small.y.clone(), small.ids.clone()
    yield
    assert torch.equal(small.x, x) and torch.equal(small.y, y) and torch.equal(small.ids, ids) and len(small.text) == 40


def test_flip_labels_flips_what_it_says_and_nothing_else(small, untouched):
    state = torch.get_rng_state()
    flipped, planted = data.flip_labels(small, 0.3, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert (flipped.y != small.y).nonzero()[:, 0].tolist() == planted.rows.tolist() and len(planted.rows) == 12
    assert torch.equal(planted.old, small.y[planted.rows]) and torch.equal(planted.new, flipped.y[planted.rows])
    assert torch.equal(planted.sources, planted.rows)
    assert torch.equal(flipped.x, small.x) and flipped.text == small.text and flipped.classes == small.classes


def test_flip_labels_is_seeded(small):
    first, again, other = (data.flip_labels(small, 0.5, seed)[1] for seed in (0, torch.Generator().manual_seed(0), 1))
    assert torch.equal(first.rows, again.rows) and torch.equal(first.new, again.new)
    assert not torch.equal(first.rows, other.rows)


def test_flip_labels_draws_every_wrong_class_equally(small):
    """2,700 flips to two wrong classes each: a share of 1/2 has a standard deviation of 0.0167 per class."""
    split = Split(torch.zeros(2700, 1), torch.arange(2700) % 3)
    _, planted = data.flip_labels(split, 1.0, seed=0)
    steps = (planted.new - planted.old) % 3
    for label in range(3):
        share = (steps[planted.old == label] == 1).double().mean()
        assert abs(share - 0.5) < 4 * 0.0167


@pytest.mark.parametrize("fraction", [-0.1, 1.1, 0.0, 0.01, float("nan")])
def test_flip_labels_refuses_other_fractions(small, fraction):
    with pytest.raises(ValueError, match="expected a fraction in 0..1 that makes at least one example"):
        data.flip_labels(small, fraction, seed=0)


def test_flip_labels_needs_classes():
    with pytest.raises(TypeError, match="expected class numbers"):
        data.flip_labels(Split(torch.zeros(5, 1), torch.rand(5)), 0.5, seed=0)
    with pytest.raises(ValueError, match="at least two classes, got 1"):
        data.flip_labels(Split(torch.zeros(5, 1), torch.zeros(5).long()), 0.5, seed=0)


def test_duplicate_appends_and_names_the_originals(small, untouched):
    longer, planted = data.duplicate(small, [7, 3], copies=2)
    assert len(longer) == 44 and planted.rows.tolist() == [40, 41, 42, 43] and planted.sources.tolist() == [3, 7, 3, 7]
    assert torch.equal(longer.x[planted.rows], small.x[planted.sources])
    assert torch.equal(longer.y[planted.rows], small.y[planted.sources]) and torch.equal(planted.old, planted.new)
    assert torch.equal(longer.x[:40], small.x) and longer.text[40:] == ("example 3", "example 7") * 2
    assert longer.ids.tolist() == list(range(44))


def test_duplicate_of_a_part_gives_new_ids(small):
    longer, planted = data.duplicate(small.take([30, 10, 20]), [1])
    assert longer.ids.tolist() == [30, 10, 20, 31] and torch.equal(longer.x[3], small.x[10])
    assert planted.rows.tolist() == [3] and planted.sources.tolist() == [1]


def test_plant_shortcut_paints_a_corner_and_sets_the_label(small, untouched):
    rows = data.sample(small, 0.2, seed=0)
    marked, planted = data.plant_shortcut(small, rows, label=2, size=3)
    expected = small.x.clone()
    for row in rows.tolist():
        expected[row, :, 2:, 1:] = 1
    assert torch.equal(marked.x, expected) and torch.equal(planted.rows, rows) and len(rows) == 8
    assert (marked.y[rows] == 2).all() and torch.equal(planted.old, small.y[rows]) and planted.new.tolist() == [2] * 8
    kept = torch.ones(40, dtype=torch.bool)
    kept[rows] = False
    assert torch.equal(marked.y[kept], small.y[kept]) and torch.equal(marked.ids, small.ids)


def test_plant_shortcut_can_keep_the_labels(small):
    mask = small.y == 1
    marked, planted = data.plant_shortcut(small, mask, size=1)
    assert torch.equal(marked.y, small.y) and torch.equal(planted.rows, mask.nonzero()[:, 0])
    assert (marked.x != small.x).sum() == 2 * mask.sum()  # two channels, one pixel


@pytest.mark.parametrize("ids, error, says", [
    ([40], ValueError, "expected different rows in 0..39, got .40"),
    ([-1], ValueError, "expected different rows"),
    ([2, 2], ValueError, "expected different rows"),
    ([], TypeError, "expected row numbers"),
    ([0.5], TypeError, "expected row numbers or a mask .40., got 1 values of torch.float32"),
    ([True, False], TypeError, "got 2 values of torch.bool"),
])
def test_corruptions_refuse_other_rows(small, ids, error, says):
    for corrupt in (data.duplicate, data.plant_shortcut):
        with pytest.raises(error, match=says):
            corrupt(small, ids)


def test_corruptions_refuse_other_sizes_and_labels(small):
    with pytest.raises(ValueError, match="expected copies of 1 or more, got 0"):
        data.duplicate(small, [1], copies=0)
    with pytest.raises(ValueError, match=r"expected a label in 0..3, got 4"):
        data.plant_shortcut(small, [1], label=4)
    for size in (0, 5):
        with pytest.raises(ValueError, match=r"no smaller than the square, got \(40, 2, 5, 4\) and a size of"):
            data.plant_shortcut(small, [1], size=size)
    with pytest.raises(ValueError, match="expected images"):
        data.plant_shortcut(load("iris")[0], [1])
