"""Transforms in world space: from a field in voxels to displacements in RAS mm, and their use on images and points.

Every transform pulls back. x is a point of the fixed world and y a point of the moving world, both in RAS mm. W is the
affine of the working grid, which lies in the fixed world. u is the displacement on this grid, in voxels, and u_inv that
of the inverse. T is the affine alignment.

  fixed to moving   y = T d(x),        d(x) = W (w + u(w)),           w = W^-1 x
  moving to fixed   x = d^-1(T^-1 y),  d^-1(z) = W (w + u_inv(w)),    w = W^-1 z

The displacement from fixed to moving is y - x, that from moving to fixed x - y.
"""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy import ndimage

from drivenmorph_jax.fields.grid import inside, widened
from drivenmorph_jax.fields.jacobian import determinant_by_slabs
from drivenmorph_jax.fields.unfold import REACH, unfolded_around_folds
from drivenmorph_jax.fields.warp import warp
from drivenmorph_jax.runtime.stored import stored


def linear_part(displacement, affine):
    """The affine (4, 4) closest to x -> x + displacement(x), in RAS mm, by least squares over some of the voxels.

    `displacement` (X, Y, Z, 3) is in RAS mm, on the grid with `affine`. Up to every fourth voxel is taken along each
    axis. Along an axis with one voxel, the affine neither stretches nor shears.
    """
    some = tuple(slice(None, None, max(1, min(4, n // 8))) for n in displacement.shape[:3])
    index = np.stack(np.meshgrid(*(np.arange(n)[part] for n, part in zip(displacement.shape, some, strict=False)),
                                 indexing="ij"), -1).reshape(-1, 3)
    x, d = map_points(affine, index), displacement[some].reshape(-1, 3).astype(np.float64)
    middle, mean = x.mean(0), d.mean(0)
    found, *_ = np.linalg.lstsq(x - middle, d - mean, rcond=None)
    out = np.eye(4)
    out[:3, :3] += found.T
    out[:3, 3] = mean - found.T @ middle
    return out


def total_displacement(shape, affine, u, work_affine, transform):
    """The displacement T d(x) - x, from fixed to moving, at every voxel of the fixed grid.

    u is sampled linearly and clamped at its edge. `unfolded_in_world` then removes folds.

    Args:
      shape, affine: the grid of the fixed image.
      u: (D, H, W, 3) displacement in voxels of the working grid.
      work_affine: W, the affine of the working grid.
      transform: T (4, 4), from the fixed to the moving world.

    Returns:
      (X, Y, Z, 3), in RAS mm.
    """
    displacement = _placed(u, np.linalg.inv(work_affine) @ affine, (transform @ work_affine)[:3, :3], shape,
                           transform @ affine - affine)
    return unfolded_in_world(displacement, affine, transform)


def total_inverse_displacement(shape, affine, u_inverse, work_affine, transform):
    """The displacement d^-1(T^-1 y) - y, from moving to fixed, at every voxel of the moving grid.

    `unfolded_in_world` removes folds.

    Args:
      shape, affine: the grid of the moving image.
      u_inverse: (D, H, W, 3) displacement of the inverse, in voxels of the working grid of u.
      work_affine: W, the affine of the working grid.
      transform: T (4, 4), from the fixed to the moving world.

    Returns:
      (X, Y, Z, 3), in RAS mm.
    """
    back = np.linalg.inv(transform)
    displacement = _placed(u_inverse, np.linalg.inv(work_affine) @ back @ affine, work_affine[:3, :3], shape,
                           back @ affine - affine)
    return unfolded_in_world(displacement, affine, back)


def unfolded_in_world(displacement, affine, transform):
    """A displacement (X, Y, Z, 3) in RAS mm whose folds are removed by `fields.unfold.unfolded`.

    A field without folds can fold when it is sampled on a coarser grid: a difference over two coarse voxels does not
    see changes between them. The displacement is returned unchanged if it has no folds. It is also unchanged if its
    affine part `transform` (4, 4) is a reflection.
    """
    if np.linalg.det(transform) < 0:
        return displacement
    return unfolded_around_folds(displacement, np.linalg.inv(affine)[:3, :3])


def unfolded_part(displaced, part, shape, affine, transform):
    """The part of a displacement whose folds `unfolded_in_world` removes as it would in the whole.

    At the border of a part, one-sided differences find folds that are none. So a larger part is unfolded.

    Args:
      displaced: function of a part of the grid, a tuple of slices, that returns the displacement there, RAS mm.
      part: the part that is returned.
      shape, affine: those of the grid.
      transform: as of `unfolded_in_world`.
    """
    far = widened(part, shape, 1 + REACH)
    return unfolded_in_world(displaced(far), affine, transform)[inside(part, far)]


def force_on_grid(shape, affine, force, work_affine):
    """Forces of the working grid as vectors in RAS mm on the grid (shape, affine): (X, Y, Z, 3).

    `force` (D, H, W, 3) is in voxels of the working grid, and `work_affine` is the affine of that grid.
    """
    return _placed(force, np.linalg.inv(work_affine) @ affine, work_affine[:3, :3], shape)


def pull_back(volume, displacement, affine, interpolation="linear", outside=None):
    """Pull a Volume back onto the grid of a displacement.

      out(x) = volume(x + displacement(x))

    Args:
      volume: the Volume.
      displacement: (X, Y, Z, 3) in RAS mm, on the grid with `affine`.
      interpolation: "linear"; "cubic", by B-splines; "nearest"; or "label", the label whose voxels among the eight
        around a point have the largest linear weight together.
      outside: the value outside the volume for "linear" and "cubic", 0 if None. For labels it is always 0.

    Returns:
      (X, Y, Z), in the type of the volume. "nearest" and "label" keep every value exactly.
    """
    to_voxel, outside = np.linalg.inv(volume.affine), outside or 0
    if interpolation == "cubic":  # of the differences from the value outside, so that the splines fall to it
        splines = ndimage.spline_filter(volume.data - outside, 3, output=np.float32)

    def plane(i, x):
        voxel = map_points(to_voxel, x + displacement[i])
        if interpolation == "nearest":  # by index, because SciPy's float64 does not hold every 64-bit integer
            return _nearest(volume.data, voxel)
        if interpolation == "label":
            return _most_weight(volume.data, voxel)
        if interpolation == "cubic":
            return outside + ndimage.map_coordinates(splines, np.moveaxis(voxel, -1, 0), order=3, prefilter=False,
                                                     mode="grid-constant")
        return ndimage.map_coordinates(volume.data, np.moveaxis(voxel, -1, 0), order=1, mode="grid-constant",
                                       cval=outside, prefilter=False)
    return by_planes(displacement.shape[:3], affine, plane, volume.data.dtype)


def _most_weight(data, voxel):
    """The label with the largest linear weight among the eight voxels around each of `voxel` (..., 3). Outside `data`
    (D, H, W) is 0. Of equal weights, the smaller label wins, as in ITK."""
    low = np.floor(voxel)
    labels, weights = [], []
    for corner in itertools.product((0, 1), repeat=3):
        place = low + corner
        weights.append(np.prod(1 - abs(voxel - place), axis=-1))
        labels.append(_nearest(data, place))
    labels, weights = np.stack(labels), np.stack(weights)
    order = np.argsort(labels, axis=0, kind="stable")
    labels, weights = (np.take_along_axis(x, order, 0) for x in (labels, weights))
    best, most = labels[0], np.zeros(labels.shape[1:])
    for label in labels:
        total = np.where(labels == label, weights, 0).sum(0)
        better = total > most * (1 + 1e-9)
        best, most = np.where(better, label, best), np.where(better, total, most)
    return best


def overlaps(shape, affine, displacement, grid_affine):
    """Whether any voxel x of the grid of a displacement has its x + displacement(x) in the field of view of an image.

    The field of view ends half a voxel beyond the centres of the outermost voxels.

    Args:
      shape, affine: the grid of the image.
      displacement, grid_affine: (X, Y, Z, 3) in RAS mm, and the affine of its grid.
    """
    to_voxel, points = np.linalg.inv(affine), _planes(displacement.shape, grid_affine)
    from_the_middle = sorted(range(len(displacement)), key=lambda i: abs(2 * i - len(displacement)))
    return any(_nearest_index(shape, map_points(to_voxel, points(i) + displacement[i]))[1].any()
               for i in from_the_middle)


def jacobian_determinant_of_displacement(displacement, affine):
    """The Jacobian determinant of x -> x + displacement(x) in world space, by central differences: (X, Y, Z).

    `displacement` (X, Y, Z, 3) is in RAS mm, on the grid with `affine`, which may be oblique or sheared.
    """
    return determinant_by_slabs(displacement, np.linalg.inv(affine)[:3, :3])


def _placed(field, place, linear, shape, offset=None):
    """A field on another grid: linear field(place i) + offset i at every voxel i, (X, Y, Z, 3), float32.

    `field` (D, H, W, 3) is sampled linearly and clamped at its edge. `place` and `offset` are (4, 4), `linear` (3, 3).
    Places are rounded to 1e-5 voxels.
    """
    field = np.asarray(field, np.float32) @ linear.T.astype(np.float32)
    offset = np.zeros((4, 4)) if offset is None else offset
    parts = ([_along_axis(matrix, axis, n).astype(np.float32) for axis, n in enumerate(shape)]
             for matrix in (place - np.eye(4), offset))
    return np.array(_sampled_at(field, *parts))


def _along_axis(matrix, axis, n):
    """The part of one axis of n voxels in matrix i at the voxels i of a grid: (n, 1, 1, 3), (1, n, 1, 3) or
    (1, 1, n, 3). Those of the three axes add up to matrix i."""
    part = np.arange(n)[:, None] * matrix[:3, axis] + (matrix[:3, 3] if axis == 0 else 0)
    return part.reshape([-1 if a == axis else 1 for a in range(3)] + [3])


@stored
def _sampled_at(field, shift, offset):
    return sum(offset) + warp(field, sum(shift))


def displacement_of(move, shape, affine):
    """The displacement move(x) - x of a map of points at every voxel of a grid: (X, Y, Z, 3) in RAS mm, float32."""
    return by_planes((*shape, 3), affine, lambda i, x: move(x) - x)


def by_planes(shape, affine, plane, dtype=np.float32):
    """One array of plane(i, x) for every plane i of a grid, x (Y, Z, 3) the world points of the plane.

    `shape` (X, Y, Z, ...) is the shape of the result, `affine` that of the grid. Each core computes one plane at a
    time, because the points of a whole head, in float64, would fill memory.
    """
    points = _planes(shape, affine)
    return _in_planes(shape, lambda i: plane(i, points(i)), dtype)


def _in_planes(shape, plane, dtype=np.float32, out=None):
    out = np.empty(shape, dtype) if out is None else out

    def fill(i):
        out[i] = plane(i)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fill, range(shape[0])))
    return out


def without_affine(displacement, affine, linear):
    """The displacement L^-1 phi(x) - x of a transform phi without its affine part L, (X, Y, Z, 3) in RAS mm, float32.

    `displacement` is phi(x) - x on a grid, `affine` that of the grid, and `linear` is L (4, 4).
    """
    return followed_by(np.linalg.inv(linear), displacement, affine)


def followed_by(matrix, displacement, affine, out=None):
    """The displacement M (x + d(x)) - x on the grid of a displacement d: (X, Y, Z, 3) in RAS mm, float32.

    `matrix` is M (4, 4), `displacement` is d, and `affine` that of its grid. `out` is an array for the result, which
    may be `displacement` itself.
    """
    linear, offset = matrix[:3, :3].T.astype(np.float32), matrix @ affine - affine
    x, y, z = (_along_axis(offset, axis, n) for axis, n in enumerate(displacement.shape[:3]))
    return _in_planes(displacement.shape, lambda i: displacement[i] @ linear + (x[i] + y[0] + z[0]), out=out)


def _planes(shape, affine):
    """The function that gives the world points (Y, Z, 3) of plane i of a grid."""
    y, z = np.meshgrid(np.arange(shape[1]), np.arange(shape[2]), indexing="ij")
    first = np.stack([np.zeros_like(y), y, z], axis=-1)
    return lambda i: map_points(affine, first + (i, 0, 0))


def map_points(matrix, points):
    """Points (..., 3), mapped by an affine matrix (4, 4)."""
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def _nearest(data, voxel):
    """The values of `data` (D, H, W) at the voxels nearest to `voxel` (..., 3); 0 outside."""
    index, inside = _nearest_index(data.shape, voxel)
    out = np.zeros(inside.shape, data.dtype)
    out[inside] = data[tuple(index[inside].astype(int).T)]
    return out


def _nearest_index(shape, voxel):
    """The nearest index to each of `voxel` (..., 3), as floats, and whether it lies in an array of `shape`."""
    index = np.floor(voxel + 0.5)
    return index, ((index >= 0) & (index < shape)).all(-1)


def channels_first(field):
    """A field (D, H, W, 3) as an array (3, D, H, W), which `sample` takes."""
    return np.ascontiguousarray(np.moveaxis(np.asarray(field, np.float32), -1, 0))


def sample(channels, voxel):
    """Linear samples (..., 3) of a field `channels` (3, D, H, W) at `voxel` (..., 3), clamped at its edge."""
    voxel = np.moveaxis(voxel, -1, 0)
    return np.stack([ndimage.map_coordinates(c, voxel, order=1, mode="nearest", prefilter=False)
                     for c in channels], axis=-1)
