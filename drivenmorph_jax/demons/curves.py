"""Curves, such as a sulcus that is drawn in both images, as landmarks.

A curve is a polyline (n, dims), n >= 2. The two curves of a pair need not have the same number of points. Places along
the curve of the fixed image are landmarks, and each goes to a place along the curve of the moving image: `matching`.
"""

import numpy as np

FINER = 16  # places of the moving curve for each step along the fixed one
STRETCH = 0.5  # a step along the moving curve is so much shorter or longer than the mean step, at most
EVEN = 3.0  # weight of steps of equal length against near points


def along(curve, number):
    """`number` points of a curve (n, dims), from its start to its end, at equal distances along it."""
    curve = np.asarray(curve, float)
    length = np.concatenate([[0], np.linalg.norm(np.diff(curve, axis=0), axis=-1).cumsum()])
    places = np.linspace(0, length[-1], number)
    return np.stack([np.interp(places, length, axis) for axis in curve.T], -1)


def length(curve):
    """The length of a curve (n, dims)."""
    return float(np.linalg.norm(np.diff(np.asarray(curve, float), axis=0), axis=-1).sum())


def matching(places, curve):
    """The points of a curve to which places in order go: (K, dims), and the minimum below divided by K.

      min over s of sum_k |x_k - c(s_k)|^2 + EVEN sum_k e_k^2,   e_k = s_k+1 - s_k - h,   h = S / (K - 1)
      with s_1 = 0,   s_K = S,   |e_k| <= STRETCH h

    c(s) is the point of the curve at the distance s from its start, and S is its length. So the ends go to the ends,
    the order is kept, and between the ends each place goes to a near point, by nearly equal steps. The minimum is found
    by dynamic programming over `FINER` points of the curve for each step.

    Args:
      places: x_k (K, dims), K >= 2: points of the other curve, where the transform found so far maps them.
      curve: (n, dims).

    Reference: Sakoe, Chiba, "Dynamic programming algorithm optimization for spoken word recognition", 1978.
    """
    places = np.asarray(places, float)
    fine = along(curve, FINER * (len(places) - 1) + 1)
    cost = np.square(places[:, None] - fine[None]).sum(-1)
    steps = np.arange(round(FINER * (1 - STRETCH)), round(FINER * (1 + STRETCH)) + 1)
    uneven = EVEN * ((steps - FINER) * length(curve) / (len(fine) - 1)) ** 2
    best, came = np.where(np.arange(len(fine)) == 0, cost[0], np.inf), []
    for row in cost[1:]:
        before = np.arange(len(fine))[:, None] - steps
        sums = np.where(before >= 0, best[np.maximum(before, 0)], np.inf) + uneven
        came.append(before[np.arange(len(fine)), sums.argmin(1)])
        best = row + sums.min(1)
    found = [len(fine) - 1]
    for way in reversed(came):
        found.append(way[found[-1]])
    return fine[found[::-1]], best[-1] / len(places)
