"""The field of view: where an image says what is there.

The grid of a file ends at six faces. Where the outermost slice holds hardly any tissue, the background goes on beyond
the face. Elsewhere the tissue is cut there. Straight beyond the tissue of a cut face, and `AROUND` it, nothing is
known. Beyond the rest of the face the background goes on. The images are as `intensity.anchored` returns them.
"""

from dataclasses import replace

import numpy as np
from scipy import ndimage

from drivenmorph_jax.images.intensity import foreground
from drivenmorph_jax.images.volume import resample

AROUND = 10.0  # mm
CUT = 0.05  # a face is cut from this share of tissue in its slice, of that in the fullest slice along the axis


def cut_faces(volume):
    """The voxel coordinates (2, 3) of the lower and upper faces at which a Volume is cut; infinite at other faces."""
    return _cut_faces(foreground(volume.data))


def _cut_faces(tissue):
    faces = np.array([3 * [-np.inf], 3 * [np.inf]])
    for axis, n in enumerate(tissue.shape):
        full = np.count_nonzero(tissue, axis=tuple(a for a in range(3) if a != axis))
        for end, place in enumerate((0, n - 1)):
            if full[place] > CUT * full.max():
                faces[end, axis] = place
    return faces


def beyond(volume, shape, affine, transform=None, rim=0.0):
    """How far the voxels of a grid lie beyond the cut faces of a Volume, and which of them are unknown.

    Args:
      volume: the Volume.
      shape, affine: the grid; the affine maps voxels to RAS mm.
      transform: T (4, 4), from the world of the grid to the world of the volume, in RAS mm. None is the identity.
      rim: mm along the cut faces that do not count as known either.

    Returns:
      (the distance in mm beyond the cut faces, float32, 0 on their inner side; bool, True where nothing is known), of
      `shape`. None where no face is cut.
    """
    tissue = foreground(volume.data)
    faces = _cut_faces(tissue)
    if np.isinf(faces).all():
        return None
    matrix = np.linalg.inv(volume.affine) @ (np.eye(4) if transform is None else transform) @ affine
    squares = np.zeros(shape, np.float32)
    for row, size, low, high in zip(matrix, volume.spacing, *faces, strict=False):
        if np.isfinite((low, high)).any():
            x = row[3] + sum(np.ix_(*(step * np.arange(n) for step, n in zip(row, shape, strict=False))))
            out = size * np.maximum(low - x, x - high) + rim
            squares += np.where(out > 1e-3 * size, out, 0) ** 2
    bright = replace(volume, data=tissue.astype(np.float32))
    tissue = resample(bright, shape, affine, transform, repeated=True) > 0.5  # of the nearest voxel
    reach = 2 * np.rint(AROUND / np.linalg.norm(affine[:3, :3], axis=0)).astype(int) + 1
    return np.sqrt(squares), (squares > 0) & ndimage.maximum_filter(tissue, reach.tolist(), mode="nearest")


def resample_known(volume, shape, affine):
    """A Volume on a grid as `volume.resample` samples it, and where it is known there (bool, or None if everywhere).

    Beyond a cut face the values of the face are repeated.
    """
    data, out = resample(volume, shape, affine), beyond(volume, shape, affine)
    if out is None:
        return data, None
    return np.where(out[1], resample(volume, shape, affine, repeated=True), data), ~out[1]
