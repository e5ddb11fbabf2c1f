"""The field of view: where an image says what is there.

The grid of a file ends at six faces. Where the outermost slice holds no tissue, the background goes on beyond the face.
Where it does, the tissue is cut there, and nothing is known beyond. A voxel is known if it lies on the inner side of
every cut face.
"""

import numpy as np
from scipy import ndimage

from drivenmorph_jax.images.intensity import foreground
from drivenmorph_jax.images.volume import resample

CUT = 0.05  # share of tissue in the outermost slice, of that in the fullest slice along the axis, from which it is cut


def bounds(volume):
    """The lowest and the highest voxel coordinate (2, 3) at which a Volume is known: infinite at faces without cut."""
    tissue, ends = foreground(volume.data), np.array([3 * [-np.inf], 3 * [np.inf]])
    for axis, last in enumerate(np.array(tissue.shape) - 1):
        full = np.count_nonzero(tissue, axis=tuple(a for a in range(3) if a != axis))
        for end, place in ((0, 0), (1, last)):
            if full[place] > CUT * full.max():
                ends[end, axis] = place
    return ends


def known(volume, shape, affine, transform=None, rim=0.0):
    """The voxels of a grid (shape, affine) at which a Volume is known, bool, or None where it is known everywhere.

    Args:
      volume: the Volume, an image as `intensity.anchored` returns it.
      shape, affine: the grid; the affine maps voxels to RAS mm.
      transform: T (4, 4), from the world of the grid to the world of the volume, in RAS mm. None is the identity.
      rim: mm along a cut face that do not count as known either.
    """
    ends = bounds(volume)
    if np.isinf(ends).all():
        return None
    transform = np.eye(4) if transform is None else transform
    return _between(np.linalg.inv(volume.affine) @ transform @ affine, shape,
                    ends + np.outer((1, -1), rim / volume.spacing))


def _between(matrix, shape, ends):
    """The voxels x of a grid of `shape` with ends[0] <= matrix x <= ends[1] along every axis: bool."""
    inside = np.ones(shape, bool)
    for row, low, high in zip(matrix, *ends, strict=False):
        if np.isfinite((low, high)).any():
            x = sum(np.expand_dims(row[a] * np.arange(n), [b for b in range(3) if b != a])
                    for a, n in enumerate(shape)) + row[3]
            inside &= (x >= low - 1e-6) & (x <= high + 1e-6)
    return inside


def resample_known(volume, shape, affine):
    """(the Volume on a grid as `volume.resample` samples it, `known` there). Beyond a cut face its rim is repeated."""
    data, there = resample(volume, shape, affine), known(volume, shape, affine)
    if there is not None:
        repeated = ndimage.affine_transform(volume.data, np.linalg.inv(volume.affine) @ affine, output_shape=shape,
                                            order=1, mode="nearest", prefilter=False)
        data = np.where(there, data, repeated)
    return data, there
