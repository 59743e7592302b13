"""Where the classes lie on a map: the mean of each and the ellipse of two standard deviations."""

import numpy as np

FLAT = 1e-6  # of the map's largest coordinate: a half-axis below it is rounding, and no width


def ellipses(xy, groups) -> np.ndarray:
    """Centre and ellipse of each group of points in the plane.

    The ellipse holds the points at a Mahalanobis distance of at most 2 from the mean m,

        (x - m)' C^-1 (x - m) <= 4,    C the group's covariance (its n - 1 form),

    86.5 % of a normal distribution. Its half-axes are twice the roots of the eigenvalues of C. Cost O(n).

    Args:
        xy: [n, 2].
        groups: [n] whole numbers.

    Returns:
        float32 [number of groups, 6]: group, mean x and y, long and short half-axis, angle of the long one from the x
        axis in radians. The last three are NaN where the points lie on a line or are fewer than 3.
    """
    xy, found = np.asarray(xy, dtype=float), []
    for group in np.unique(groups):
        points = xy[groups == group]
        values, axes = np.linalg.eigh(np.cov(points.T)) if len(points) > 2 else (np.zeros(2), np.eye(2))
        short, long = 2 * np.sqrt(values.clip(min=0))
        shape = (long, short, np.arctan2(*axes[::-1, 1])) if short > FLAT * np.abs(xy).max() else (np.nan,) * 3
        found.append((group, *points.mean(0), *shape))
    return np.array(found, dtype=np.float32).reshape(-1, 6)
