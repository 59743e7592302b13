"""A map given as two arrays, where an Atlas would compute one; and the check that a map places every point."""

import numpy as np

from influence_nb.widgets.pointcloud import packed


def placed(atlas, layer, projection, n_train, test_ids, near=None) -> list[bytes]:
    """Places of training and test points as bytes of float32, checked."""
    both = [np.asarray(xy, dtype=np.float32) for xy in atlas.place(layer, projection, test_ids, near=near)]
    for xy, n, name in zip(both, (n_train, len(test_ids)), ("training", "test"), strict=True):
        if xy.shape != (n, 2):
            raise ValueError(f"the embedding must place {n} {name} points as [{n}, 2], got {xy.shape}")
        if not np.isfinite(xy).all():
            row = int((~np.isfinite(xy).all(1)).argmax())
            raise ValueError(f"the embedding must place {name} points at finite numbers, got {xy[row]} in row {row}")
    return [packed(xy, "f4") for xy in both]


class FixedMap:
    """Places [n_train, 2] and [n_test, 2] with the names of an Atlas; the distance is the one on the map."""

    layers, projections, distances = ["given map"], ["given"], ["on the map"]

    def __init__(self, pair, task, test_ids):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError("embedding must be an Atlas or a pair of arrays (train_xy, test_xy), got "
                            f"{type(pair).__name__}")
        n_train, n_test = len(task.train), len(task.test)
        self.train_xy, test_xy = (np.asarray(xy, dtype=np.float32) for xy in pair)
        if self.train_xy.shape != (n_train, 2):
            raise ValueError(f"embedding[0] must be [n_train, 2] = ({n_train}, 2), got {self.train_xy.shape}")
        if test_xy.shape not in ((n_test, 2), (len(test_ids), 2)):
            raise ValueError(f"embedding[1] must be [n_test, 2] = ({n_test}, 2), or ({len(test_ids)}, 2) for the test "
                             f"points shown, got {test_xy.shape}")
        self.test_xy = test_xy[test_ids] if len(test_xy) == n_test else test_xy
        self.row = {i: row for row, i in enumerate(test_ids)}

    def near(self, projection):
        return None  # it looks at no neighbours

    def place(self, layer, projection, test_ids, near=None):
        return self.train_xy, self.test_xy[[self.row[i] for i in test_ids]]

    def distance(self, layer, metric, test_id):
        return np.linalg.norm(self.train_xy - self.test_xy[self.row[test_id]], axis=1)

    def distance_label(self, metric):
        return "distance on the map"
