"""Voxel grids: coordinates, differences, and changes of resolution.

A grid of shape (D, H, W) has its voxel centres at the integers. Two grids over the same box share the edges of the
box, not their outer voxel centres. The fine coordinate f and the coordinate c of a grid r times coarser obey

  f + 1/2 = r (c + 1/2)

Average pooling follows this rule, and `jax.image.resize` assumes it.

The last axis of a field gives the number of spatial axes. Functions of other arrays take this number as `dims`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np


def identity_grid(shape):
    """Coordinates of every voxel: (*shape, n) float32, in voxels. The last axis follows the n axes of `shape`."""
    return jnp.stack(jnp.meshgrid(*(jnp.arange(n, dtype=jnp.float32) for n in shape), indexing="ij"), axis=-1)


def spatial_shape(u):
    """The spatial shape of a field: (D, H, W) of (..., D, H, W, 3), (H, W) of (..., H, W, 2)."""
    return u.shape[-1 - u.shape[-1]:-1]


def resize(x, shape):
    """Resample (..., D, H, W, C) linearly to the spatial `shape`. Nothing is smoothed before a reduction."""
    dims = len(shape)
    if all(new == 2 * old for new, old in zip(shape, x.shape[-1 - dims:-1], strict=True)):
        for axis in range(-1 - dims, -1):
            x = _double(x, axis + x.ndim)
        return x
    return jax.image.resize(x, (*x.shape[:-1 - dims], *shape, x.shape[-1]), "linear", antialias=False)


def _double(x, axis):
    """Linear resampling to twice as many points along one axis: 3/4 of the nearest point and 1/4 of the next nearest.

    It is five times as fast as `jax.image.resize`.
    """
    n = x.shape[axis]
    part = partial(jax.lax.slice_in_dim, x, axis=axis)
    before = jnp.concatenate([part(0, 1), part(0, n - 1)], axis)
    after = jnp.concatenate([part(1, n), part(n - 1, n)], axis)
    both = jnp.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis + 1)
    return both.reshape(*x.shape[:axis], 2 * n, *x.shape[axis + 1:])


def resize_field(u, shape):
    """Resample a field (..., D, H, W, 3) in voxels of its own grid to `shape`, in voxels of the new grid.

      u'(x') = (n' / n) u(x)    along each axis, n and n' the old and the new side

    The motion in millimetres stays the same.
    """
    scale = jnp.array([new / old for new, old in zip(shape, spatial_shape(u), strict=True)], u.dtype)
    return resize(u, shape) * scale


def coarsen_field(u, shape):
    """The field on the coarser grid `shape` that `resize_field` maps closest to u, in the sense of least squares.

    If u was made from a coarse field by `resize_field`, the result is that coarse field. `resize_field` in both
    directions would smooth it instead. At half the resolution its weights are (1/8, 3/4, 1/8) along every axis, which
    changes a rough field by a voxel and more.

    Args:
      u: (..., D, H, W, 3) displacement in voxels of its own grid.
      shape: the sides of the coarser grid.

    Returns:
      The displacement on the coarser grid, in voxels of that grid.
    """
    fine = spatial_shape(u)

    def matrix(fine, coarse):
        x = np.clip((np.arange(fine) + 0.5) * coarse / fine - 0.5, 0, coarse - 1)
        return jnp.asarray(np.linalg.pinv(np.maximum(0, 1 - np.abs(x[:, None] - np.arange(coarse)))))

    # Linear resampling goes along one axis after the other, so its pseudoinverse does too.
    scale = jnp.array([new / old for new, old in zip(shape, fine, strict=True)], u.dtype)
    return along_axes([matrix(*sides) for sides in zip(fine, shape, strict=True)], u) * scale


def average_pool(x, factor=2, dims=3):
    """Mean over blocks of factor^3 voxels: (..., D, H, W, C) -> (..., D/f, H/f, W/f, C).

    Raises ValueError where a side is not a multiple of `factor`.
    """
    space = x.shape[-1 - dims:-1]
    if any(n % factor for n in space):
        raise ValueError(f"average_pool by {factor} needs sides that are multiples of it, got {space}")
    # In XLA on CPU, sums of strided slices are ten times faster than a reduction of blocks.
    for axis in range(-1 - dims, -1):
        n = x.shape[axis]
        x = sum(jax.lax.slice_in_dim(x, k, n, factor, axis) for k in range(factor)) / factor if factor > 1 else x
    return x


def padded_pool(x, factor, multiple=1, dims=3):
    """`average_pool` of x (*space, C), first padded at its ends with zeros, so that the pooled sides are multiples of
    `multiple`."""
    return average_pool(jnp.pad(x, [(0, -n % (factor * multiple)) for n in x.shape[:dims]] + [(0, 0)]), factor, dims)


def difference(x, axis, dims=3):
    """Derivative of (..., D, H, W, C) along the spatial `axis` (0, 1 or 2), per voxel.

      (x(p + e) - x(p - e)) / 2    inside, e one voxel along the axis

    It is one-sided at the border, as `numpy.gradient`.
    """
    ends, scale = _border(x, axis - dims - 1)
    return (_between(x, axis - dims - 1) + ends * x) * scale


def difference_adjoint(y, axis, dims=3):
    """The transpose of the linear map `difference`.

    It takes the cotangent (..., D, H, W, C) of the result of `difference` and returns the cotangent of x.
    """
    ends, scale = _border(y, axis - dims - 1)
    return ends * (scale * y) - _between(scale * y, axis - dims - 1)


def _between(x, axis):
    """x(p + e) - x(p - e), with x zero beyond the border. The transpose of this map is minus the map.

    The shifts fill with zeros, because XLA fuses such a shift with the operations that read it. It does not fuse
    borders that are computed apart from the inside.
    """
    def shifted(step):
        step = [step * (k == axis % x.ndim) for k in range(x.ndim)]
        return jax.lax.pad(x, jnp.zeros((), x.dtype), [(k, -k, 0) for k in step])

    return shifted(-1) - shifted(1)


def _border(x, axis):
    """Two arrays of coefficients along one axis.

    The first is -1 at the first voxel, 1 at the last and 0 between. It replaces the neighbours that these two lack.
    The second turns a difference into a derivative: 1 at the two ends and 1/2 between.
    """
    n = x.shape[axis]
    ends = np.zeros([n if k == axis % x.ndim else 1 for k in range(x.ndim)], x.dtype)
    ends.flat[0], ends.flat[-1] = -1, 1
    return ends, 0.5 + 0.5 * abs(ends)


def box_sum(x, radius, axes):
    """Sums of x over 2 radius + 1 voxels along each of `axes`. Voxels beyond the border count as zero.

    `reduce_window` sums along one axis after the other. XLA on CPU does this in a fifth of the time of a product with a
    banded matrix. Devices that share a volume exchange only a halo for it.
    """
    for axis in axes:
        window = [2 * radius + 1 if k == axis else 1 for k in range(x.ndim)]
        x = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, [1] * x.ndim, "SAME")
    return x


def widened(part, shape, by):
    """The slices of a part of a grid of `shape`, wider by `by` voxels on each side where there are so many."""
    return tuple(slice(max(one.start - by, 0), min(one.stop + by, n)) for one, n in zip(part, shape, strict=True))


def inside(inner, outer):
    """The slices of the part `inner` of a grid, counted from the beginning of the part `outer`."""
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(inner, outer, strict=True))


def along_axes(matrices, x):
    """Apply one (n, n) matrix along each spatial axis of (..., D, H, W, C): a separable linear filter.

    A matrix product has no kernel radius, treats the border exactly, and runs at the rate of a matrix unit. It is
    computed in full precision, because GPU and TPU would otherwise round a displacement of 10 voxels to hundredths of a
    voxel.
    """
    first = x.ndim - 1 - len(matrices)
    for axis, matrix in enumerate(matrices, first):
        x = jnp.moveaxis(jnp.tensordot(matrix.astype(x.dtype), x, (1, axis), precision="highest"), 0, axis)
    return x
