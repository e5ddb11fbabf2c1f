"""The `Volume`: an image or label map with its grid and header, and its reorientation, resampling and smoothing.

World coordinates are RAS millimetres. A grid is (shape, affine), and

  world = affine @ (i, j, k, 1)
"""

from dataclasses import dataclass, replace

import nibabel
import numpy as np
from nibabel import orientations
from scipy import ndimage


@dataclass(frozen=True, eq=False)
class Volume:
    """A 3-D image (float32) or label map (int32) on its own voxel grid."""

    data: np.ndarray  # (X, Y, Z), in the file's voxel order
    affine: np.ndarray  # (4, 4), voxel to RAS mm
    header: nibabel.Nifti1Header
    path: str  # as the user gave it

    @property
    def spacing(self):
        """Voxel size along each axis: (3,) in mm."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


def same_grid(a, b, tolerance=1e-3):
    """Whether two Volumes have the same shape, and affines whose entries differ by no more than `tolerance`."""
    return a.data.shape == b.data.shape and np.allclose(a.affine, b.affine, rtol=0, atol=tolerance)


def canonical(volume):
    """The same volume with its axes permuted and flipped to be nearest to R, A, S. Nothing is interpolated."""
    flips = orientations.io_orientation(volume.affine)
    affine = volume.affine @ orientations.inv_ornt_aff(flips, volume.data.shape)
    data = np.ascontiguousarray(orientations.apply_orientation(volume.data, flips))
    return replace(volume, data=data, affine=affine)


def resample(volume, shape, affine, transform=None, order=1, repeated=False):
    """Sample a Volume on the grid (shape, affine).

      out(o) = volume(A_volume^-1 T affine o)    at voxel o of the grid

    Args:
      volume: the Volume.
      shape, affine: the grid; the affine maps voxels to RAS mm.
      transform: T (4, 4), from the world of the grid to the world of the volume, in RAS mm. None is the identity.
      order: 1 is linear, 0 nearest.
      repeated: outside the volume the value is that of the nearest voxel at its border, else 0.

    Returns:
      An array of `shape` with the type of the volume.
    """
    transform = np.eye(4) if transform is None else transform
    matrix = np.linalg.inv(volume.affine) @ transform @ affine
    # Given whole, the matrix would be refused where rounding changed its last row.
    return ndimage.affine_transform(volume.data, matrix[:3, :3], matrix[:3, 3], tuple(shape), order=order,
                                    mode="nearest" if repeated else "grid-constant", prefilter=False)


def smoothed(volume, spacing):
    """The Volume, smoothed along axes with voxels finer than `spacing` mm. Resampling to `spacing` then does not alias.

    The full width at half maximum of the Gaussian is `spacing`. Axes with voxels of at least .9 `spacing` are not
    smoothed.
    """
    sigma = np.where(volume.spacing < 0.9 * spacing, spacing / 2.355 / volume.spacing, 0)
    return replace(volume, data=ndimage.gaussian_filter(volume.data, sigma)) if sigma.any() else volume


def block_means(x, factors):
    """Means of x (X, Y, Z) over blocks of `factors` voxels. Voxels at the far ends that fill no block are cut off."""
    whole = x[tuple(slice(n // k * k) for n, k in zip(x.shape, factors, strict=True))]
    blocks = [side for n, k in zip(whole.shape, factors, strict=True) for side in (n // k, k)]
    return whole.reshape(blocks).mean((1, 3, 5))


def part_of(affine, shape, inner):
    """The slices of a grid with `affine` that hold a part of it: a grid of `shape` with the affine `inner`."""
    start = np.rint(np.linalg.solve(affine, inner[:, 3]))[:3].astype(int)
    return tuple(slice(first, first + n) for first, n in zip(start, shape, strict=True))


def affine_of_part(affine, part):
    """The affine of the part of a grid with `affine` that slices cut out."""
    found = np.array(affine, float)
    found[:3, 3] = [one.start for one in part] @ affine[:3, :3].T + affine[:3, 3]
    return found


def on_grid(shape, affine, header=None, path=""):
    """A Volume of zeros that stands for a grid alone."""
    return Volume(np.broadcast_to(np.float32(0), shape), np.asarray(affine, float),
                  header or nibabel.Nifti1Header(), path)
