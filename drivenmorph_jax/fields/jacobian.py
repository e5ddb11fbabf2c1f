"""The Jacobian determinant of a transform phi = id + u."""

import chex
import jax
import jax.numpy as jnp

from drivenmorph_jax.fields.grid import difference


def jacobian_determinant(u: chex.Array) -> jax.Array:
    """The Jacobian determinant det(I + grad u) at every voxel, by central differences (one-sided at the border).

    Args:
      u: (..., D, H, W, 3) displacement in voxels, or (..., H, W, 2).

    Returns:
      (..., D, H, W). The transform expands where the value is above 1, and folds where it is 0 or less.
    """
    dims = u.shape[-1]
    rows = [jnp.moveaxis(difference(u, axis, dims), -1, 0) for axis in range(dims)]
    return determinant([[x + (i == j) for j, x in enumerate(row)] for i, row in enumerate(rows)])


def determinant(rows):
    """The determinant of a square matrix of arrays, given as a list of rows, by cofactors, at every voxel."""
    if len(rows) == 1:
        return rows[0][0]
    minors = (determinant([row[:j] + row[j + 1:] for row in rows[1:]]) for j in range(len(rows)))
    return sum((-1) ** j * x * minor for j, (x, minor) in enumerate(zip(rows[0], minors, strict=True)))
