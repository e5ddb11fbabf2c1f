"""The Jacobian determinant of a transform phi = id + u."""

import jax.numpy as jnp

from drivenmorph_jax.grid import difference


def jacobian_determinant(u):
    """det(I + grad u) at every voxel, by central differences (one-sided at the border).

    Args:
      u: (..., D, H, W, 3) displacement in voxels.

    Returns:
      (..., D, H, W). Above 1 the transform expands, at or below 0 it folds.
    """
    a, b, c = (jnp.moveaxis(difference(u, axis), -1, 0) for axis in range(3))
    a, b, c = (a[0] + 1, a[1], a[2]), (b[0], b[1] + 1, b[2]), (c[0], c[1], c[2] + 1)
    return (a[0] * (b[1] * c[2] - b[2] * c[1])
            - a[1] * (b[0] * c[2] - b[2] * c[0])
            + a[2] * (b[0] * c[1] - b[1] * c[0]))
