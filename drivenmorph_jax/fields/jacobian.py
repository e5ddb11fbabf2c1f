"""The Jacobian determinant of a transform phi = id + u."""

import os
from concurrent.futures import ThreadPoolExecutor

import chex
import jax
import jax.numpy as jnp
import numpy as np

from drivenmorph_jax.fields.grid import difference

SLAB = 16  # planes


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


def determinant_on_host(u, to_voxel=None):
    """`jacobian_determinant` of an array in the memory of the host.

    Args:
      u: (*space, n) displacement.
      to_voxel: (n, n), takes vectors u to voxels. None where they are in voxels.

    Returns:
      (*space,), a NumPy array, float32.
    """
    gradient = np.gradient(u if to_voxel is None else u @ to_voxel.T.astype(np.float32), axis=range(u.ndim - 1))
    return determinant([[g[..., j] + (i == j) for j in range(u.shape[-1])] for i, g in enumerate(gradient)])


def determinant_by_slabs(u, to_voxel=None):
    """`determinant_on_host`, some planes at a time: all derivatives of a whole head at once would fill memory."""
    depth, out = len(u), np.empty(u.shape[:-1], np.float32)

    def slab(start):
        stop, first = min(start + SLAB, depth), max(start - 1, 0)
        out[start:stop] = determinant_on_host(u[first:stop + 1], to_voxel)[start - first:stop - first]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(slab, range(0, depth, SLAB)))
    return out


def determinant(rows):
    """The determinant of a square matrix of arrays, given as a list of rows, by cofactors, at every voxel."""
    if len(rows) == 1:
        return rows[0][0]
    minors = (determinant([row[:j] + row[j + 1:] for row in rows[1:]]) for j in range(len(rows)))
    return sum((-1) ** j * x * minor for j, (x, minor) in enumerate(zip(rows[0], minors, strict=True)))
