"""The working grid: an isotropic grid around the foreground of an image, on which registration runs.

World coordinates are RAS millimetres. A grid is (shape, affine), and

  world = affine @ (i, j, k, 1)
"""

import itertools

import numpy as np

from drivenmorph_jax.images.intensity import foreground
from drivenmorph_jax.images.volume import canonical

COARSE = 2.0  # mm


def coarse_factor(spacing):
    """How many voxels of `spacing` mm, along an axis, are pooled where voxels of about 2 mm are wanted."""
    return max(1, round(COARSE / spacing))


def working_grid(volume, spacing=1.0, multiple=16, margin=8.0):
    """An isotropic grid around the foreground, along the canonical axes of the volume.

    The grid of an oblique volume is equally oblique, so no rotation has to be interpolated. A sheared volume gets the
    nearest rigid axes. Voxel centres lie at whole multiples of `spacing` from the first voxel of the volume. Resampling
    a volume of exactly this spacing therefore copies its voxels.

    Args:
      volume: the Volume.
      spacing: voxel size in mm.
      multiple: every side is a multiple of it, or each of its own (3,); the surplus is shared between both ends.
      margin: mm around the foreground.

    Returns:
      (shape, affine), the affine from voxels to RAS mm.
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
    """The first and the last voxel of a mask along each axis.

    .05 % of the mask is left out at each end, so that single specks do not count.
    """
    total = np.count_nonzero(mask)
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        share = np.cumsum(np.count_nonzero(mask, axis=others)) / total
        yield np.searchsorted(share, 5e-4, side="right"), np.searchsorted(share, 1 - 5e-4)
