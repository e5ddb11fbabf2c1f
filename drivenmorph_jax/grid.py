"""Voxel grids: coordinates, differences, and changes of resolution.

A grid of shape (D, H, W) has its voxel centres at the integers. Two grids over the same box share its *edges*, not
its outer voxel centres: fine coordinate f and coarse coordinate c of a grid r times coarser obey
f + 1/2 = r (c + 1/2), which is what average pooling does and `jax.image.resize` assumes.
"""

from functools import partial

import jax
import jax.numpy as jnp


def identity_grid(shape):
    """Coordinates x of every voxel: (D, H, W, 3) float32, in voxels, last axis in the order of the array's axes."""
    return jnp.stack(jnp.meshgrid(*(jnp.arange(n, dtype=jnp.float32) for n in shape), indexing="ij"), axis=-1)


def resize(x, shape):
    """Resample (..., D, H, W, C) linearly to the spatial `shape`, without smoothing before it is made smaller."""
    return jax.image.resize(x, (*x.shape[:-4], *shape, x.shape[-1]), "linear", antialias=False)


def resize_field(u, shape):
    """Resample a field (..., D, H, W, 3) in voxels of its own grid to `shape`, in voxels of the new grid.

    u'(x') = (n'/n) u(x), per axis: the same motion in millimetres.
    """
    scale = jnp.array([new / old for new, old in zip(shape, u.shape[-4:-1], strict=True)], u.dtype)
    return resize(u, shape) * scale


def average_pool(x, factor=2):
    """Mean over blocks of factor^3 voxels: (..., D, H, W, C) -> (..., D/f, H/f, W/f, C).

    Raises ValueError where a side is no multiple of the factor.
    """
    *batch, d, h, w, c = x.shape
    if d % factor or h % factor or w % factor:
        raise ValueError(f"average_pool by {factor} needs sides that are multiples of it, got {(d, h, w)}")
    n = len(batch)
    blocks = x.reshape(*batch, d // factor, factor, h // factor, factor, w // factor, factor, c)
    return blocks.mean(axis=(n + 1, n + 3, n + 5))


def difference(x, axis):
    """Derivative of (..., D, H, W, C) along spatial `axis` (0, 1, 2), per voxel: central, one-sided at the border.

    (x(p + e) - x(p - e)) / 2 inside, as `numpy.gradient`.
    """
    axis -= 4
    n = x.shape[axis]
    part = partial(jax.lax.slice_in_dim, x, axis=axis)
    inside = 0.5 * (part(2, n) - part(0, n - 2))
    return jnp.concatenate([part(1, 2) - part(0, 1), inside, part(n - 1, n) - part(n - 2, n - 1)], axis=axis)


def along_axes(matrices, x):
    """Apply one (n, n) matrix along each spatial axis of (..., D, H, W, C): a separable linear filter.

    As a matrix product it has no kernel radius, treats the border exactly, and runs at the rate of a matrix unit.
    """
    for axis, matrix in enumerate(matrices):
        x = jnp.moveaxis(jnp.tensordot(matrix.astype(x.dtype), x, (1, x.ndim - 4 + axis)), 0, x.ndim - 4 + axis)
    return x
