"""Transforms of FSL: the matrices of FLIRT and the warps of FNIRT.

FSL counts in mm from the corner of an image: its voxel indices times their size, where i runs backward in an image
whose affine has a positive determinant. `frame` is this map. A transform of FSL can be read only with both images.
Source: FSL's FAQ on FLIRT, and `fsl.transform` of fslpy.
"""

import numpy as np

from drivenmorph_jax.images import writing
from drivenmorph_jax.transforms.world import by_planes, map_points

DISPLACEMENTS = 2006  # NIfTI intent of a FNIRT warp
COEFFICIENTS = (2007, 2008, 2009, 2016, 2017, 2018)


def frame(volume):
    """The map (4, 4) from RAS mm to FSL's mm of an image, of which the Volume `volume` has the grid."""
    out = np.diag([*volume.spacing, 1.0])
    if np.linalg.det(volume.affine[:3, :3]) > 0:
        out[0] = -volume.spacing[0], 0, 0, (volume.data.shape[0] - 1) * volume.spacing[0]
    return out @ np.linalg.inv(volume.affine)


def from_flirt(matrix, fixed, moving):
    """The map from the fixed to the moving world in RAS mm of a FLIRT matrix, which leads from moving to fixed."""
    return np.linalg.inv(frame(moving)) @ np.linalg.inv(matrix) @ frame(fixed)


def from_warp(vectors, grid, moving):
    """The displacement (X, Y, Z, 3) in RAS mm of a FNIRT warp.

      F_moving^-1 (F_grid x + v) - x    of relative vectors v; of absolute ones F_moving^-1 v - x

    A warp does not say whether its vectors are relative. Absolute ones grow with the coordinate by about 1 mm in a mm,
    relative ones by less than half of it.

    Args:
      vectors: (X, Y, Z, 3) in FSL's mm.
      grid: the Volume of the warp. It lies in the fixed world.
      moving: the Volume whose grid is that of the moving image.
    """
    to_fsl, to_world = frame(grid), np.linalg.inv(frame(moving))
    some = vectors[::4, ::4, ::4].reshape(-1, 3)
    index = np.stack(np.meshgrid(*(np.arange(0, n, 4) for n in vectors.shape[:3]), indexing="ij"), -1).reshape(-1, 3)
    at = map_points(to_fsl @ grid.affine, index)
    at, some = at - at.mean(0), some - some.mean(0)
    relative = (at * some).sum() < 0.5 * (at * at).sum()
    return by_planes(vectors.shape, grid.affine, lambda i, x: map_points(
        to_world, vectors[i] + (map_points(to_fsl, x) if relative else 0)) - x)


def write_warp(path, displacement, fixed, moving):
    """Write a displacement (X, Y, Z, 3) in RAS mm on the grid of the Volume `fixed` as a relative warp of FNIRT."""
    to_fixed, to_moving = frame(fixed), frame(moving)
    vectors = by_planes(displacement.shape, fixed.affine, lambda i, x: map_points(to_moving, x + displacement[i])
                        - map_points(to_fixed, x))
    writing.save(path, vectors, fixed, DISPLACEMENTS)
