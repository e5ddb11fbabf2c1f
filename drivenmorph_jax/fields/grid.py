"""Voxel grids: coordinates, differences, and changes of resolution.

A grid of shape (D, H, W) has its voxel centres at the integers. Two grids over the same box share its *edges*, not
its outer voxel centres: fine coordinate f and coarse coordinate c of a grid r times coarser obey
f + 1/2 = r (c + 1/2), which is what average pooling does and `jax.image.resize` assumes.

Functions of a field know the number of axes from its last one; where nothing tells it, `dims` does.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np


def identity_grid(shape):
    """Coordinates x of every voxel: (*shape, n) float32, in voxels, last axis in the order of the n axes of `shape`."""
    return jnp.stack(jnp.meshgrid(*(jnp.arange(n, dtype=jnp.float32) for n in shape), indexing="ij"), axis=-1)


def spatial_shape(u):
    """(D, H, W) of a field (..., D, H, W, 3), (H, W) of (..., H, W, 2)."""
    return u.shape[-1 - u.shape[-1]:-1]


def resize(x, shape):
    """Resample (..., D, H, W, C) linearly to the spatial `shape`, without smoothing before it is made smaller."""
    dims = len(shape)
    if all(new == 2 * old for new, old in zip(shape, x.shape[-1 - dims:-1], strict=True)):
        for axis in range(-1 - dims, -1):
            x = _double(x, axis + x.ndim)
        return x
    return jax.image.resize(x, (*x.shape[:-1 - dims], *shape, x.shape[-1]), "linear", antialias=False)


def _double(x, axis):
    """Twice as many points along one axis: 3/4 of the nearest and 1/4 of the next nearest, five times as fast."""
    n = x.shape[axis]
    part = partial(jax.lax.slice_in_dim, x, axis=axis)
    before = jnp.concatenate([part(0, 1), part(0, n - 1)], axis)
    after = jnp.concatenate([part(1, n), part(n - 1, n)], axis)
    both = jnp.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis + 1)
    return both.reshape(*x.shape[:axis], 2 * n, *x.shape[axis + 1:])


def resize_field(u, shape):
    """Resample a field (..., D, H, W, 3) in voxels of its own grid to `shape`, in voxels of the new grid.

    u'(x') = (n'/n) u(x), per axis: the same motion in millimetres.
    """
    scale = jnp.array([new / old for new, old in zip(shape, spatial_shape(u), strict=True)], u.dtype)
    return resize(u, shape) * scale


def coarsen_field(u, shape):
    """The field on the coarser grid `shape` whose `resize_field` to u's grid is nearest to u, in least squares.

    It is that of which u was made, where there is one. `resize_field` itself would smooth: at half the resolution by
    (1/8, 3/4, 1/8) along every axis, a voxel and more where u is rough.

    Args:
      u: (..., D, H, W, 3) displacement in voxels of its own grid; the result is in voxels of the other.
    """
    fine = spatial_shape(u)

    def matrix(fine, coarse):
        x = np.clip((np.arange(fine) + 0.5) * coarse / fine - 0.5, 0, coarse - 1)
        return jnp.asarray(np.linalg.pinv(np.maximum(0, 1 - np.abs(x[:, None] - np.arange(coarse)))))

    # The pseudoinverse of linear resampling, which goes along one axis after the other, does so too.
    scale = jnp.array([new / old for new, old in zip(shape, fine, strict=True)], u.dtype)
    return along_axes([matrix(*sides) for sides in zip(fine, shape, strict=True)], u) * scale


def average_pool(x, factor=2, dims=3):
    """Mean over blocks of factor^3 voxels: (..., D, H, W, C) -> (..., D/f, H/f, W/f, C).

    Raises ValueError where a side is no multiple of the factor.
    """
    space = x.shape[-1 - dims:-1]
    if any(n % factor for n in space):
        raise ValueError(f"average_pool by {factor} needs sides that are multiples of it, got {space}")
    # Sums of strided slices, not a reduction of blocks: ten times faster in XLA on CPU.
    for axis in range(-1 - dims, -1):
        n = x.shape[axis]
        x = sum(jax.lax.slice_in_dim(x, k, n, factor, axis) for k in range(factor)) / factor if factor > 1 else x
    return x


def difference(x, axis, dims=3):
    """Derivative of (..., D, H, W, C) along spatial `axis` (0, 1, 2), per voxel: central, one-sided at the border.

    (x(p + e) - x(p - e)) / 2 inside, as `numpy.gradient`.
    """
    ends, scale = _border(x, axis - dims - 1)
    return (_between(x, axis - dims - 1) + ends * x) * scale


def difference_adjoint(y, axis, dims=3):
    """The transpose of `difference` as a linear map: what a cotangent (..., D, H, W, C) of its result is for x."""
    ends, scale = _border(y, axis - dims - 1)
    return ends * (scale * y) - _between(scale * y, axis - dims - 1)


def _between(x, axis):
    """x(p + e) - x(p - e), zero beyond the border: minus its own transpose. By shifts that fill with zeros, since XLA
    can make these one with what reads them, which it cannot the parts of a border."""
    def shifted(step):
        step = [step * (k == axis % x.ndim) for k in range(x.ndim)]
        return jax.lax.pad(x, jnp.zeros((), x.dtype), [(k, -k, 0) for k in step])

    return shifted(-1) - shifted(1)


def _border(x, axis):
    """Along one axis: -1 at the first voxel and 1 at the last, which stand in for neighbours that they lack; and what
    makes a derivative of the difference, 1 there and 1/2 between."""
    n = x.shape[axis]
    ends = np.zeros([n if k == axis % x.ndim else 1 for k in range(x.ndim)], x.dtype)
    ends.flat[0], ends.flat[-1] = -1, 1
    return ends, 0.5 + 0.5 * abs(ends)


def box_sum(x, radius, axes):
    """Sums of x over 2 radius + 1 voxels along each of `axes`, zero beyond the border.

    One axis after the other by `reduce_window`, which XLA on CPU does in a fifth of the time of a product with a banded
    matrix, and which devices that share a volume do with a halo.
    """
    for axis in axes:
        window = [2 * radius + 1 if k == axis else 1 for k in range(x.ndim)]
        x = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, [1] * x.ndim, "SAME")
    return x


def along_axes(matrices, x):
    """Apply one (n, n) matrix along each spatial axis of (..., D, H, W, C): a separable linear filter.

    As a matrix product it has no kernel radius, treats the border exactly, and runs at the rate of a matrix unit; in
    full precision, since GPU and TPU would round a displacement of 10 voxels to hundredths of one.
    """
    first = x.ndim - 1 - len(matrices)
    for axis, matrix in enumerate(matrices, first):
        x = jnp.moveaxis(jnp.tensordot(matrix.astype(x.dtype), x, (1, axis), precision="highest"), 0, axis)
    return x
