"""The cell of the grid in which a sample lies: its corners and their weights."""

import jax
import jax.numpy as jnp


def cell(shape, u, first=0):
    """Of every sample x + u(x): lower corner of its cell, fraction within the cell, whether it is inside the grid.

    Each of the three is a list over the axes of arrays (X, Y, Z). `first` is the coordinate along the second axis at
    which u begins.
    """
    low, fraction, inside = [], [], []
    for axis, n in enumerate(shape):
        x = jax.lax.broadcasted_iota(jnp.float32, u.shape[:-1], axis) + u[..., axis]
        if axis == 1:
            x += first
        clamped = jnp.clip(x, 0, n - 1)
        lower = jnp.clip(jnp.floor(clamped), 0, n - 2)
        low.append(lower.astype(jnp.int32))
        fraction.append(clamped - lower)
        inside.append((x >= 0) & (x <= n - 1))
    return low, fraction, inside


def corner(shape, low, fraction, k):
    """Corner k of the cell: its flat index, its weights along the axes, the signs of their derivatives."""
    sides, index = [k >> axis & 1 for axis in reversed(range(len(shape)))], 0
    for n, x, side in zip(shape, low, sides, strict=True):
        index = index * n + x + side
    weights = [jnp.where(side == 1, f, 1 - f) for f, side in zip(fraction, sides, strict=True)]
    return index, weights, [2.0 * side - 1 for side in sides]
