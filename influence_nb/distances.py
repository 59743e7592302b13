"""Distances between embeddings, with and without classes, and the nearest by any of them.

A distance is a plain function (test [m, d], train [n, d], y [n] class numbers of the training examples) -> [m, n],
0 = same. Attributes say more where there is more to say:

* `unit`: a text for the axis; `label`: what to call it there, in place of "NAME distance";
* `of_inputs = True`: it wants raw inputs in place of embeddings;
* `of_classes = True`: it needs y; `of_train = True`: it is the same for every test point, so that one row is kept.

`DISTANCES` is the menu that an `Atlas` starts with. A new distance is one function, and one line there.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """The cosine [n_a, n_b] of the angles between rows, in -1..1; a zero vector has 0 with everything."""
    lengths = torch.linalg.vector_norm(a, dim=1)[:, None] * torch.linalg.vector_norm(b, dim=1)
    return (a @ b.T).div_(lengths.clamp_(min=torch.finfo(a.dtype).tiny)).clamp_(-1, 1)


def cosine(test: Tensor, train: Tensor, y: Tensor | None = None) -> Tensor:
    """1 - cos of the angle: 0 = same direction, 1 = orthogonal, 2 = opposite. A zero vector is at 1 from everything.

    >>> cosine(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0], [0.0, 0.0]]))
    tensor([[0.0400, 1.0000]])
    """
    return similarity(test, train).neg_().add_(1)


def euclidean(test: Tensor, train: Tensor, y: Tensor | None = None) -> Tensor:
    """|test - train|, from the differences themselves, so that equal rows are at exactly 0.

    >>> euclidean(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[5., 0.]])
    """
    return torch.cdist(test, train, compute_mode="donot_use_mm_for_euclid_dist")


def pixel(test: Tensor, train: Tensor, y: Tensor | None = None) -> Tensor:
    """Euclidean distance of the raw inputs [m, ...] and [n, ...], whatever the layer."""
    return euclidean(test.flatten(1), train.flatten(1))


# distances that know the classes, computed class by class
def centroid(test: Tensor, train: Tensor, y: Tensor) -> Tensor:
    """Euclidean distance of the test point from the centroid of the training example's class. Raises as `centroids`.

    >>> centroid(torch.tensor([[4.0, 5.0]]), torch.tensor([[0.0, 2.0], [4, 4], [2, 0]]), torch.tensor([0, 1, 0]))
    tensor([[5., 1., 5.]])
    """
    return by_class(lambda test, x: euclidean(test, mean(x)), test, train, y)


def own_centroid(test: Tensor, train: Tensor, y: Tensor) -> Tensor:
    """Euclidean distance of the training example from the centroid of its own class, itself included.

    The same for every test point. Raises as `centroids`.
    """
    return by_class(lambda test, x: euclidean(mean(x), x), test, train, y)


def mahalanobis(test: Tensor, train: Tensor, y: Tensor) -> Tensor:
    """Mahalanobis distance of the training example from its own class: how unusual it is there.

    sqrt((x - mean)' C^-1 (x - mean)), with C the covariance of the class, shrunk towards a multiple of the identity by
    the share of Ledoit and Wolf (2004, "A well-conditioned estimator for large-dimensional covariance matrices"). The
    same for every test point.

    Why not the pseudo-inverse of a singular covariance: in a class with no more examples than dimensions it puts all
    of them at one distance, and elsewhere it hangs on what counts as rank. Shrinkage is small where examples abound
    (the share falls as 1 / n_k). Its price: a shift, a rotation or another unit changes nothing, but a stretch of some
    directions does, and a column that is there twice weighs more. Columns that are constant in a class are left out.
    An example that is alone in its class, or like all others there, is at 0.

    Unit: standard deviations. Cost: O(n d min(n_k, d)), in float64, class by class. Raises as `centroids`.
    """
    return by_class(lambda test, x: unusual(x), test, train, y)


def unusual(x: Tensor) -> Tensor:
    """Mahalanobis distance [n] of each row of x [n, d] from their mean, in float64."""
    x = x[:, (x != x[0]).any(0)].double()
    n, d = x.shape
    x = x - x.mean(0)
    if d > n:
        x = torch.linalg.qr(x.T, mode="r")[1].T  # [n, n], the same lengths and angles
    C = x.T @ x / n
    level = C.trace() / d
    spread = C.square().sum() - d * level**2  # |C - level * I|^2
    noise = (x.square().sum(1).square().mean() - C.square().sum()) / n  # estimates |C - its expectation|^2
    share = noise / spread.clamp(min=torch.finfo(C.dtype).tiny)
    share = share.clamp(1e-12 * d, 1)  # two examples give 0, and then C is singular
    C = (1 - share) * C + share * level * torch.eye(len(C), dtype=C.dtype, device=C.device)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(C), x.T, upper=False)  # [d, n]
    return torch.linalg.vector_norm(white, dim=0)


def centroid_relationship(test: Tensor, train: Tensor, y: Tensor) -> Tensor:
    """cos(test, centroid) / cos(train, centroid), with the centroid of the training example's class.

    Brinkman and Larsson Horken (2018, eq. 2.13 and fig. 5.17), read to the letter: what they call the distance to a
    cluster is a cosine. 1 = the test point lies in the class's direction as closely as the example does, less = it lies
    further off. A denominator nearer to 0 than 1e-4 counts as 1e-4, with its sign. Raises as `centroids`.
    """
    return by_class(lambda test, x: similarity(test, mean(x)) / away(similarity(mean(x), x)), test, train, y)


def centroid_relationship_distance(test: Tensor, train: Tensor, y: Tensor) -> Tensor:
    """(1 - cos(test, centroid)) / (1 - cos(train, centroid)), with the centroid of the training example's class.

    `centroid_relationship` with a distance in place of the similarity: more than 1 = the test point lies further from
    the class's direction than the example does. A denominator below 1e-4 counts as 1e-4. Raises as `centroids`.
    """
    return by_class(lambda test, x: cosine(test, mean(x)) / away(cosine(mean(x), x)), test, train, y)


def away(values: Tensor) -> Tensor:
    """values, with those nearer to 0 than 1e-4 at 1e-4 of their sign; below it a float32 cosine has under 3 digits."""
    return torch.where(values < 0, values.clamp(max=-1e-4), values.clamp(min=1e-4))


def mean(x: Tensor) -> Tensor:
    """The centroid [1, d] of rows x [n, d]."""
    return x.mean(0, keepdim=True)


def by_class(function: Callable, test: Tensor, train: Tensor, y: Tensor) -> Tensor:
    """[m, n] put together from function(test [m, d], rows of one class [n_k, d]) -> [m or 1, n_k or 1]."""
    y = class_numbers(train, y)
    found = train.new_empty(len(test), len(train))
    for k in y.unique():
        mine = (y == k).nonzero()[:, 0]
        found[:, mine] = function(test, train[mine]).to(found.dtype)
    return found


def centroids(train: Tensor, y: Tensor) -> Tensor:
    """The mean embedding of each class, [c, d] with c = y.max() + 1; NaN for a number that no example has.

    >>> centroids(torch.tensor([[0.0, 2.0], [4.0, 4.0], [2.0, 0.0]]), torch.tensor([0, 1, 0]))
    tensor([[1., 1.],
            [4., 4.]])

    Raises:
        ValueError: y is not [n] class numbers, or train is not finite.
    """
    y = class_numbers(train, y)
    return torch.cat([mean(train[y == k]) for k in range(int(y.max()) + 1)])


def class_numbers(train: Tensor, y: Tensor) -> Tensor:
    """y [n] on the device of train, or an error that says why these are no classes of these embeddings."""
    if y is None or y.shape != (len(train),):
        raise ValueError(f"expected y [n] = ({len(train)},), the class numbers of train {tuple(train.shape)}, got "
                         f"{None if y is None else tuple(y.shape)}: task.train.y?")
    if y.is_floating_point() or y.min() < 0:
        raise ValueError(f"expected class numbers 0, 1, 2, ..., got {y.dtype} from {y.min():g} to {y.max():g}: "
                         "y.long() if they are classes, else a distance that needs none")
    if not train.is_floating_point():
        raise ValueError(f"expected embeddings of floating type, got {train.dtype}: x.float()?")
    if not torch.isfinite(train.sum()) and (bad := ~torch.isfinite(train).all(1)).any():
        raise ValueError(f"embeddings must be finite, got NaN or infinity in {bad.sum()} of {len(train)} rows, first "
                         f"in row {bad.int().argmax()}: does the model overflow?")
    return y.to(train.device)


def neighbours(distance, k: int) -> Tensor:
    """Ids of the k nearest training examples, nearest first; of equally near ones the smaller id comes first.

    >>> neighbours(torch.tensor([[2.0, 1.0, 2.0, 0.5]]), k=3)
    tensor([[3, 1, 0]])

    Args:
        distance: Tensor or array [m, n], or one row [n].
        k: 1 to n.

    Returns:
        Tensor [m, k] or [k] of ids.

    Raises:
        ValueError: k is out of range.
    """
    distance = torch.as_tensor(distance)
    if not 1 <= k <= distance.shape[-1]:
        raise ValueError(f"k must lie in 1..{distance.shape[-1]}, the number of training examples, got {k}")
    return distance.argsort(dim=-1, stable=True)[..., :k]


cosine.unit = "1 - cos, no unit"
euclidean.unit = centroid.unit = own_centroid.unit = "units of the activation"
pixel.unit = "Euclidean, units of pixel value"
mahalanobis.unit = "standard deviations of the class"
centroid_relationship.unit = "test / training example, cos"
centroid_relationship_distance.unit = "test / training example, 1 - cos"
centroid_relationship.label = centroid_relationship_distance.label = "centroid relationship"
pixel.of_inputs = own_centroid.of_train = mahalanobis.of_train = True
for knows_classes in (centroid, own_centroid, mahalanobis, centroid_relationship, centroid_relationship_distance):
    knows_classes.of_classes = True

DISTANCES = {"cosine": cosine, "Euclidean": euclidean, "pixel": pixel, "centroid": centroid,
             "own centroid": own_centroid, "Mahalanobis": mahalanobis, "centroid relationship": centroid_relationship,
             "centroid relationship (1 - cos)": centroid_relationship_distance}
