"""The cell of the grid in which a sample lies: its corners and their weights.

Registrations warp so often that the time to trace and compile this shows. So it is written with few operations.
"""

import jax
import jax.numpy as jnp


def cell(shape, u, first=None):
    """Of every sample x + u(x): lower corner of its cell, fraction within the cell, whether it is inside the grid.

    Each of the three is a list over the axes of arrays (X, Y, Z). `first` is the coordinate along the second axis at
    which u begins, by default 0.
    """
    low, fraction, inside = [], [], []
    for axis, n in enumerate(shape):
        x = jax.lax.broadcasted_iota(jnp.float32, u.shape[:-1], axis) + u[..., axis]
        if axis == 1 and first is not None:
            x += first
        zero, last, before = map(x.dtype.type, (0, n - 1, n - 2))
        clamped = jax.lax.clamp(zero, x, last)
        lower = jax.lax.clamp(zero, jnp.floor(clamped), before)
        low.append(lower.astype(jnp.int32))
        fraction.append(clamped - lower)
        inside.append((x >= 0) & (x <= n - 1))
    return low, fraction, inside


def flat(shape, place):
    """The index of a voxel, given by its places along the axes, in the flattened volume."""
    index = 0
    for n, x in zip(shape, place, strict=True):
        index = index * n + x
    return index
