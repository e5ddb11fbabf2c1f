"""Metrics of a registration: overlap, surface distance, regularity, inverse consistency, and statistics of the force.

They use NumPy and SciPy, on the arrays of one pair. A field u is (D, H, W, 3) in voxels, pull-back, phi = id + u.
Label maps and masks are (D, H, W) on the fixed grid. Spacing is in mm, in the order of the array's axes.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree
from surface_distance import lookup_tables

from drivenmorph_jax.fields.jacobian import determinant_by_slabs

DEFINITIONS = {
    "dice": "2|A n B|/(|A|+|B|) per label, moving labels warped with nearest neighbour; a label absent from"
            " either image is left out, one that warping has lost counts as 0; mean over labels, then over pairs.",
    "dice_initial": "The same Dice before the deformation (after the affine).",
    "hd95": "95th percentile of the surface distances (weighted by surfel area) of each direction, the "
            "larger of the two, in mm, as the package surface-distance and Learn2Reg compute it; labels as "
            "for Dice, without those that warping has lost.",
    "lncc": "Mean squared local correlation of the fixed and the warped moving image in boxes of 9 voxels, cut at the "
            "border.",
    "sdlogj": "Standard deviation of log J inside the fixed brain; J = det(I + grad u) by central "
              "differences in voxels, clipped at 1e-9, 2 voxels cropped at each side of the grid.",
    "sdlogj_l2r": "Learn2Reg's form, standard deviation of log(clip(J + 3, 1e-9, 1e9)) inside the fixed "
                  "brain, J as for sdlogj; about four times smaller than sdlogj.",
    "sdlogj_l2r_whole": "The same over the whole image, as Learn2Reg's evaluation of OASIS and tables that follow it "
                        "have it.",
    "fold_pct": "Percentage of voxels inside the fixed brain with J <= 0, J as for sdlogj.",
    "ndv_pct": "Non-diffeomorphic volume (Liu et al. 2022): 100 times the negative parts of ten finite-"
               "difference determinants / 2 / 6, summed over the fixed brain and divided by its number of "
               "voxels.",
    "inverse_mm": "Mean |phi^-1(phi(x)) - x| inside the fixed brain, in mm; phi^-1 sampled linearly.",
    "seconds": "Network and resampling of the field to the grid of the scores, after compilation; no file is read.",
    "brain": "The fixed brain is where the fixed image is above 0, holes filled; images are skull-stripped.",
    "tre_mm": "Mean Euclidean distance between the found and the true displacement inside the fixed brain, "
              "in mm.",
    "cosine": "Cosine between driving force and remaining displacement, mean over brain voxels where the "
              "remaining displacement exceeds 1 voxel; a zero force counts as 0.",
    "pearson": "Pearson correlation of |force| and |remaining displacement| over brain voxels.",
    "spearman": "Spearman rank correlation of |force| and |remaining displacement| over brain voxels.",
    "r2": "R^2 of the least-squares fit u = A p + c of the remaining displacement u (3 components) on the "
          "force p, A a 3x3 matrix, over brain voxels.",
}


def brain(image):
    """The voxels where a skull-stripped image is above 0, with holes filled: (D, H, W) bool."""
    # Parts of the background that reach no face are holes. SciPy's binary_fill_holes grows the outside step by step.
    parts, count = ndimage.label(~(image > 0))
    outside = np.zeros(count + 1, bool)
    for axis in range(image.ndim):
        for face in (0, -1):
            outside[np.take(parts, face, axis)] = True
    outside[0] = False  # the foreground
    return ~outside[parts]


def warp_labels(labels, u):
    """The label of the voxel nearest to x + u(x), clamped at the edge: (D, H, W), of the type given."""
    index = 0
    for axis, n in enumerate(labels.shape):
        x = np.arange(n, dtype=np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
        nearest = np.rint(np.clip(x + u[..., axis], 0, n - 1)).astype(np.intp)
        index = index * n + nearest
    return labels.reshape(-1)[index]


def dice(fixed_labels, moved_labels, exclude=(0,), moving_labels=None):
    """Dice overlap 2|A n B| / (|A| + |B|) of every label that both images have.

    Args:
      fixed_labels, moved_labels: arrays of one shape, whole numbers >= 0.
      exclude: labels to leave out.
      moving_labels: the moving image's label map before warping, of any shape. A label that it has and the warped map
        lacks gets a Dice of 0. Without it, the labels of `moved_labels` count.

    Returns:
      {label: Dice}.
    """
    fixed, moved = _whole(fixed_labels).ravel(), _whole(moved_labels).ravel()
    moving = moved if moving_labels is None else _whole(moving_labels).ravel()
    size = int(max(fixed.max(), moved.max(), moving.max())) + 1
    in_fixed, in_moved, in_moving = (np.bincount(x, minlength=size) for x in (fixed, moved, moving))
    in_both = np.bincount(fixed[fixed == moved], minlength=size)
    present = np.flatnonzero((in_fixed > 0) & (in_moving > 0))
    return {int(label): float(2 * in_both[label] / (in_fixed[label] + in_moved[label]))
            for label in present if label not in exclude}


def mean_dice(fixed_labels, moved_labels, exclude=(0,), moving_labels=None):
    """Mean of `dice` over the labels; nan where the images have no label in common."""
    return _mean(dice(fixed_labels, moved_labels, exclude, moving_labels).values())


def hd95(fixed_labels, moved_labels, spacing_mm, exclude=(0,)):
    """95 % Hausdorff distance in mm of every label that both maps have.

      max(q95 of d(A -> B), q95 of d(B -> A))

    Each percentile is weighted by the area of the surface elements.

    Args:
      fixed_labels, moved_labels: (D, H, W), whole numbers >= 0.
      spacing_mm: voxel size in mm, (3,).
      exclude: labels to leave out.

    Returns:
      {label: mm}.

    Reference: the package surface-distance, as in Learn2Reg. The definition and the tables of areas are those of the
    package. The distances come from k-d trees of the surface points instead of distance maps of the volume. Other
    packages differ by up to 10 mm.
    """
    fixed, moved = _whole(fixed_labels), _whole(moved_labels)
    boxes = {}
    found = zip(ndimage.find_objects(fixed), ndimage.find_objects(moved), strict=False)
    for label, (f, m) in enumerate(found, start=1):
        if f and m and label not in exclude:
            boxes[label] = tuple(slice(min(a.start, b.start), max(a.stop, b.stop))
                                 for a, b in zip(f, m, strict=True))

    areas = _surface_areas(tuple(map(float, spacing_mm)))

    def one(label):
        (a, area_a), (b, area_b) = (_surface(x[boxes[label]] == label, areas) for x in (fixed, moved))
        a, b = a * np.asarray(spacing_mm), b * np.asarray(spacing_mm)
        return float(max(_percentile(KDTree(b).query(a)[0], area_a), _percentile(KDTree(a).query(b)[0], area_b)))

    with ThreadPoolExecutor() as pool:
        return dict(zip(boxes, pool.map(one, boxes), strict=True))


@cache
def _surface_areas(spacing):
    """Area in mm^2 of the surface within 2^3 voxels, for each of the 256 ways in which a label fills them."""
    return np.array(lookup_tables.create_table_neighbour_code_to_surface_area(spacing))


def _surface(mask, areas):
    """The places (N, 3) where a mask fills 2^3 voxels in part, and the area of the surface within each."""
    padded = np.pad(mask, 1).astype(np.uint8)
    n = np.array(mask.shape) + 1
    weights = np.array(lookup_tables.ENCODE_NEIGHBOURHOOD_3D_KERNEL, np.uint8)
    code = sum(weight * padded[i:i + n[0], j:j + n[1], k:k + n[2]] for (i, j, k), weight in np.ndenumerate(weights))
    places = np.nonzero((code > 0) & (code < 255))
    return np.stack(places, axis=-1), areas[code[places]]


def _percentile(distances, areas):
    """The distance below which 95 % of the area lies."""
    order = np.argsort(distances)
    share = np.cumsum(areas[order]) / areas.sum()
    return distances[order][min(np.searchsorted(share, 0.95), len(order) - 1)]


def jacobian(u):
    """J = det(I + grad u) by central differences in voxels, with 2 voxels cropped at each side: (D-4, H-4, W-4)."""
    return determinant_by_slabs(np.asarray(u, np.float32))[2:-2, 2:-2, 2:-2]


def fold_pct(jac, mask=None):
    """Percentage of voxels with J <= 0; `jac` from `jacobian`, `mask` (D, H, W) on the uncropped grid."""
    return float(100 * np.mean(_inside(jac, mask) <= 0))


def sdlogj(jac, mask=None):
    """Standard deviation of log max(J, 1e-9); arguments as for `fold_pct`."""
    return float(np.std(np.log(np.maximum(_inside(jac, mask), 1e-9)), dtype=np.float64))


def sdlogj_l2r(jac, mask=None):
    """Learn2Reg's std of log(clip(J + 3, 1e-9, 1e9)); arguments as for `fold_pct`.

    Its evaluation of OASIS, and tables that follow it, take no mask.
    """
    return float(np.std(np.log(np.clip(_inside(jac, mask) + 3, 1e-9, 1e9)), dtype=np.float64))


# A unit cube splits into five tetrahedra in two ways: one at each of four corners, and one in the middle. Both ways
# together give every voxel ten tetrahedra: the corner tetrahedra of the eight cubes around it, and the middle ones of
# two opposite cubes. A tetrahedron is listed by its three edges from the voxel.
_TETRAHEDRA = [((i, 0, 0), (0, j, 0), (0, 0, k)) for i in (1, -1) for j in (1, -1) for k in (1, -1)] + [
    ((s, s, 0), (s, 0, s), (0, s, s)) for s in (1, -1)]


def ndv_pct(u, mask=None):
    """Non-diffeomorphic volume: the volume that phi turns inside out, in % of the mask's volume.

      100 / |mask| sum over x in mask, tetrahedra t at x of max(0, -vol(phi(t))) / 2,   |mask| in voxels

    phi is the piecewise linear map through the voxels. The factor 1 / 2 averages over the two ways to split a cube.
    Beyond the border, the field keeps the value at the edge, so no voxel is cropped.

    Args:
      u: (D, H, W, 3) displacement in voxels.
      mask: (D, H, W) or None for the whole grid.

    Reference: Liu, Chen, Wei, Carass, Prince, "On finite difference Jacobian computation in deformable image
    registration", 2022, arXiv 2212.06060.
    """
    u = np.asarray(u, np.float32)
    shape = u.shape[:3]
    mask = np.ones(shape, bool) if mask is None else np.asarray(mask) > 0
    padded = np.pad(u, [(1, 1)] * 3 + [(0, 0)], mode="edge")
    folded = 0.0
    for i in range(shape[0]):  # plane by plane, so that the edges of all tetrahedra fit in the cache
        where = mask[i]
        if not where.any():
            continue
        here = u[i][where]
        edges = {}
        for offset in {edge for tetrahedron in _TETRAHEDRA for edge in tetrahedron}:
            a, b, c = (1 + o for o in offset)
            there = padded[i + a, b:b + shape[1], c:c + shape[2]][where]
            edges[offset] = there - here + np.array(offset, np.float32)
        for tetrahedron in _TETRAHEDRA:
            orientation = np.sign(np.linalg.det(tetrahedron))
            signed = orientation * _triple_product(*(edges[edge] for edge in tetrahedron)) / 6
            folded -= np.minimum(signed, 0).sum(dtype=np.float64) / 2
    return float(100 * folded / mask.sum())


def inverse_consistency(u, u_inv, spacing, mask=None):
    """Mean |phi^-1(phi(x)) - x| = |u(x) + u_inv(x + u(x))| over the mask, in mm; u_inv is sampled linearly.

    Args:
      u, u_inv: (D, H, W, 3) in voxels, on grids of one shape and spacing.
      spacing: voxel size in mm, (3,).
      mask: (D, H, W) on the fixed grid, or None.
    """
    where = np.nonzero(np.ones(u.shape[:3], bool) if mask is None else mask)
    forward = u[where]
    position = (np.stack(where, axis=-1) + forward).T
    back = [ndimage.map_coordinates(u_inv[..., axis], position, order=1, mode="nearest") for axis in range(3)]
    return float(np.mean(np.linalg.norm((forward + np.stack(back, axis=-1)) * spacing, axis=-1)))


def tre(u, u_true, spacing, mask=None):
    """Mean |u(x) - u_true(x)| over the mask in mm; the fields are (D, H, W, 3) in voxels of `spacing` mm."""
    where = ... if mask is None else np.asarray(mask) > 0
    return float(np.mean(np.linalg.norm((u[where] - u_true[where]) * spacing, axis=-1)))


def force_statistics(force, remaining, mask=None):
    """How well a driving force p agrees with the displacement u that remains, in direction and in size.

    Args:
      force, remaining: (D, H, W, 3) in voxels.
      mask: (D, H, W) or None.

    Returns:
      {"cosine", "pearson", "spearman", "r2"}, see `DEFINITIONS`; nan where undefined (no displacement remains).
    """
    where = ... if mask is None else np.asarray(mask) > 0
    from scipy import stats  # imported where it is used: it takes a second, and `register` ranks nothing

    p, u = (np.asarray(x[where], np.float64).reshape(-1, 3) for x in (force, remaining))
    p_size, u_size = np.linalg.norm(p, axis=-1), np.linalg.norm(u, axis=-1)
    far = u_size > 1
    cosine = np.sum(p[far] * u[far], axis=-1) / np.maximum(p_size[far] * u_size[far], 1e-12)

    design = np.concatenate([p, np.ones_like(p[:, :1])], axis=-1)
    # The normal equations are 4x4; a QR of a million rows would take seconds. pinv, since all p may lie in a plane.
    fit = design @ (np.linalg.pinv(design.T @ design) @ (design.T @ u))
    scatter = np.sum((u - u.mean(axis=0)) ** 2)
    return {
        "cosine": _mean(cosine),
        "pearson": _correlation(p_size, u_size),
        "spearman": _correlation(stats.rankdata(p_size), stats.rankdata(u_size)),
        "r2": float(1 - np.sum((u - fit) ** 2) / scatter) if scatter > 0 else float("nan"),
    }


def pair_metrics(u, u_inv, fixed_labels, moving_labels, spacing, mask=None, exclude=(0,), hausdorff=True,
                 u_true=None):
    """Every number of one pair as {metric: float}, named and defined as in `DEFINITIONS`.

    Args:
      u, u_inv: (D, H, W, 3) in voxels; without an inverse (None), `inverse_mm` is left out.
      fixed_labels, moving_labels: (D, H, W) on one grid, the moving ones before the deformation; or None.
      spacing: voxel size in mm, (3,).
      mask: (D, H, W), the fixed brain.
      exclude: labels to leave out of Dice and HD95.
      hausdorff: False leaves out HD95, which takes longer than all other metrics together.
      u_true: (D, H, W, 3) in voxels, where the true field is known; adds `tre_mm`.
    """
    u = np.asarray(u, np.float32)
    row = {}
    if fixed_labels is not None and moving_labels is not None:
        moved_labels = warp_labels(moving_labels, u)
        row["dice"] = mean_dice(fixed_labels, moved_labels, exclude, moving_labels)
        row["dice_initial"] = mean_dice(fixed_labels, moving_labels, exclude)
        if hausdorff:
            row["hd95"] = _mean(hd95(fixed_labels, moved_labels, spacing, exclude).values())
    jac = jacobian(u)
    row["sdlogj"] = sdlogj(jac, mask)
    row["sdlogj_l2r"] = sdlogj_l2r(jac, mask)
    row["sdlogj_l2r_whole"] = sdlogj_l2r(jac)
    row["fold_pct"] = fold_pct(jac, mask)
    row["ndv_pct"] = ndv_pct(u, mask)
    if u_inv is not None:
        row["inverse_mm"] = inverse_consistency(u, np.asarray(u_inv, np.float32), spacing, mask)
    if u_true is not None:
        row["tre_mm"] = tre(u, u_true, spacing, mask)
    return row


def summarise(rows):
    """{metric: {"mean", "std"}} over the pairs that have the metric. nan and keys that are no metric are skipped.

    The std is that of the pairs themselves (ddof = 0).
    """
    summary = {}
    for metric in dict.fromkeys(key for row in rows for key in row if key in DEFINITIONS):
        values = np.array([row[metric] for row in rows if metric in row], np.float64)
        values = values[~np.isnan(values)]
        if values.size:
            summary[metric] = {"mean": float(values.mean()), "std": float(values.std())}
    return summary


def _whole(labels):
    labels = np.asarray(labels)
    return labels if np.issubdtype(labels.dtype, np.integer) else np.rint(labels).astype(np.int32)


def _mean(values):
    values = list(values)
    return float(np.mean(values)) if values else float("nan")


def _correlation(a, b):
    a, b = a - a.mean(), b - b.mean()
    size = np.sqrt(np.dot(a, a) * np.dot(b, b))
    return float(np.dot(a, b) / size) if size > 0 else float("nan")


def _inside(jac, mask):
    return jac if mask is None else jac[np.asarray(mask)[2:-2, 2:-2, 2:-2] > 0]


def _triple_product(a, b, c):
    """a . (b x c) over the last axis: the signed volume of the parallelepiped."""
    return (a[..., 0] * (b[..., 1] * c[..., 2] - b[..., 2] * c[..., 1])
            - a[..., 1] * (b[..., 0] * c[..., 2] - b[..., 2] * c[..., 0])
            + a[..., 2] * (b[..., 0] * c[..., 1] - b[..., 1] * c[..., 0]))
