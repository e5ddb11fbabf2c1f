"""Volumes from NIfTI files, checked; grids to work on; volumes back to NIfTI files.

World coordinates are RAS millimetres throughout. A grid is (shape, affine), and
world = affine @ (i, j, k, 1).
"""

import itertools

import numpy as np

from drivenmorph_jax.images.intensity import foreground
from drivenmorph_jax.images.volume import canonical


def working_grid(volume, spacing=1.0, multiple=16, margin=8.0):
    """An isotropic grid round the foreground, along the volume's own canonical axes: (shape, affine).

    `spacing` and `margin` are in mm; every side is a multiple of `multiple`, the surplus shared between both
    ends. An oblique volume gets an equally oblique grid, so nothing is interpolated for a rotation's sake; of
    a sheared one the nearest rigid axes are taken. Voxel centres lie at whole multiples of `spacing` from the
    volume's first voxel, so resampling a volume of exactly that spacing copies it.
    """
    volume = canonical(volume)
    left, _, right = np.linalg.svd(volume.affine[:3, :3] / volume.spacing)
    axes = left @ right
    corners = np.array(list(itertools.product(*_bounding_box(foreground(volume.data)))))
    along = corners @ volume.affine[:3, :3].T @ axes  # mm from the first voxel
    low, high = along.min(axis=0) - margin, along.max(axis=0) + margin
    fewest = (high - low) / spacing + 1
    shape = multiple * np.ceil(fewest / multiple - 1e-6).astype(int)
    start = np.round(((low + high) / spacing - (shape - 1)) / 2)
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing
    affine[:3, 3] = volume.affine[:3, 3] + axes @ (start * spacing)
    return tuple(shape.tolist()), affine


def _bounding_box(mask):
    """First and last voxel of a mask along each axis, without .05 % of it at each end: specks don't count."""
    total = np.count_nonzero(mask)
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        share = np.cumsum(np.count_nonzero(mask, axis=others)) / total
        yield np.searchsorted(share, 5e-4, side="right"), np.searchsorted(share, 1 - 5e-4)
