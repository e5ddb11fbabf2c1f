"""World-space transforms and their files: displacements in RAS mm on a grid, and 4x4 affines.

Everything pulls back. x is a point of the fixed world, y of the moving world, both RAS mm. W is the affine of
the working grid, which lies in the fixed world, u the field found on it in voxels, T the affine alignment:

    fixed to moving   y = T d(x),        d(x) = W (w + u(w)),           w = W^-1 x
    moving to fixed   x = d^-1(T^-1 y),  d^-1(z) = W (w + u_inv(w)),    w = W^-1 z

A file holds the displacement y - x (or x - y). LPS, the world of ITK and ANTs, is (-x, -y, z) of RAS.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy import ndimage

from drivenmorph_jax.fields import unfold
from drivenmorph_jax.fields.jacobian import determinant


def linear_part(displacement, affine):
    """The affine (4, 4) nearest to x -> x + displacement(x), in RAS mm: least squares over every fourth voxel."""
    some = tuple(slice(None, None, 4) for _ in range(3))
    index = np.moveaxis(np.indices(displacement.shape[:3]), 0, -1)[some].reshape(-1, 3)
    x = map_points(affine, index)
    y = x + displacement[some].reshape(-1, 3)
    found, *_ = np.linalg.lstsq(np.column_stack([x, np.ones(len(x))]), y, rcond=None)
    out = np.eye(4)
    out[:3] = found.T
    return out


def total_displacement(shape, affine, u, work_affine, transform):
    """T d(x) - x, from fixed to moving, at every voxel of the fixed grid: (X, Y, Z, 3), RAS mm.

    (shape, affine) is the fixed grid; u (D, H, W, 3), in voxels of the grid with affine `work_affine`, is
    sampled linearly and edge-clamped; `transform` T (4, 4) maps the fixed to the moving world. It is made
    without folds by `unfolded_in_world`.
    """
    deform = _deformation(u, work_affine)
    displacement = _displacement(shape, affine, lambda x: map_points(transform, deform(x)))
    return unfolded_in_world(displacement, affine, transform)


def total_inverse_displacement(shape, affine, u_inverse, work_affine, transform):
    """d^-1(T^-1 y) - y, from moving to fixed, at every voxel of the moving grid: (X, Y, Z, 3), RAS mm.

    (shape, affine) is the moving grid; u_inverse (D, H, W, 3) lies on the same working grid as u, and
    `transform` is the same T. It is made without folds by `unfolded_in_world`.
    """
    deform, back = _deformation(u_inverse, work_affine), np.linalg.inv(transform)
    return unfolded_in_world(_displacement(shape, affine, lambda y: deform(map_points(back, y))), affine, back)


def unfolded_in_world(displacement, affine, transform):
    """A displacement (X, Y, Z, 3) in RAS mm with Jacobian determinants above 0, as `fields.unfold.unfolded` makes it.

    On a grid coarser than the one it was found on, samples of a field that folds nowhere can fold: a difference over
    two voxels bridges what turns within them. Where they do not, or where the affine part, `transform` (4, 4), is a
    reflection, the displacement is returned as it is.
    """
    if np.linalg.det(transform) < 0 or jacobian_determinant_of_displacement(displacement, affine).min() > 0:
        return displacement
    linear = affine[:3, :3].astype(np.float32)
    return np.asarray(unfold.unfolded(displacement @ np.linalg.inv(linear).T)) @ linear.T


def force_on_grid(shape, affine, force, work_affine):
    """Forces (D, H, W, 3) in voxels of the working grid as vectors in RAS mm on another grid: (X, Y, Z, 3)."""
    to_voxel, channels = np.linalg.inv(work_affine), _channels_first(force)
    back = work_affine[:3, :3].T
    return by_planes((*shape, 3), affine, lambda i, x: _sample(channels, map_points(to_voxel, x)) @ back)


def pull_back(volume, displacement, affine, order=1):
    """Pull a Volume back: out(x) = volume(x + displacement(x)), (X, Y, Z) in the volume's own type.

    `displacement` (X, Y, Z, 3) in RAS mm lies on the grid with `affine`. Order 1 is linear, 0 nearest;
    outside the volume the value is 0.
    """
    to_voxel = np.linalg.inv(volume.affine)

    def plane(i, x):
        voxel = np.moveaxis(map_points(to_voxel, x + displacement[i]), -1, 0)
        return ndimage.map_coordinates(volume.data, voxel, order=order, mode="grid-constant", prefilter=False)
    return by_planes(displacement.shape[:3], affine, plane, volume.data.dtype)


def transform_points(points, displacement, affine):
    """Move points (N, 3) in RAS mm: p + displacement(p), sampled linearly and edge-clamped.

    A pull-back displacement from fixed to moving moves points of the fixed image to the moving one.
    """
    points = np.asarray(points, np.float64)
    return points + _sample(_channels_first(displacement), map_points(np.linalg.inv(affine), points))


def jacobian_determinant_of_displacement(displacement, affine):
    """det d(x + displacement(x)) / dx at every voxel, by central differences in world space: (X, Y, Z).

    `displacement` (X, Y, Z, 3) in RAS mm on a grid with `affine`, oblique or sheared as it may be.
    """
    to_voxel = np.linalg.inv(affine)[:3, :3].T.astype(np.float32)
    depth, step = len(displacement), 16  # a slab at a time: nine derivatives of a whole head fill memory
    out = np.empty(displacement.shape[:3], np.float32)
    for start in range(0, depth, step):
        stop, first, last = min(start + step, depth), max(start - 1, 0), min(start + step + 1, depth)
        gradient = np.gradient(displacement[first:last] @ to_voxel, axis=(0, 1, 2))
        out[start:stop] = determinant([[g[start - first:stop - first, ..., j] + (i == j) for j in range(3)]
                                       for i, g in enumerate(gradient)])
    return out


def _deformation(u, affine):
    """The map z -> W (w + u(w)), w = W^-1 z, of world points (..., 3)."""
    to_voxel, field = np.linalg.inv(affine), _channels_first(u)

    def deform(points):
        voxel = map_points(to_voxel, points)
        return map_points(affine, voxel + _sample(field, voxel))

    return deform


def _displacement(shape, affine, move):
    return by_planes((*shape, 3), affine, lambda i, x: move(x) - x)


def by_planes(shape, affine, plane, dtype=np.float32):
    """plane(i, world points (Y, Z, 3)) for every plane i of a grid (X, Y, Z, ...), as one array.

    Planes run on all cores, and one by one: all points of a head at once, in float64, would fill memory.
    """
    y, z = np.meshgrid(np.arange(shape[1]), np.arange(shape[2]), indexing="ij")
    first = np.stack([np.zeros_like(y), y, z], axis=-1)
    out = np.empty(shape, dtype)

    def fill(i):
        out[i] = plane(i, map_points(affine, first + (i, 0, 0)))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fill, range(shape[0])))
    return out


def map_points(matrix, points):
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def _channels_first(field):
    return np.ascontiguousarray(np.moveaxis(np.asarray(field, np.float32), -1, 0))


def _sample(channels, voxel):
    voxel = np.moveaxis(voxel, -1, 0)
    return np.stack([ndimage.map_coordinates(c, voxel, order=1, mode="nearest", prefilter=False)
                     for c in channels], axis=-1)
