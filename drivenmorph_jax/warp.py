"""Sampling by a displacement, and the composition of displacements.

Convention, here and everywhere: a field u lives on the fixed grid, in voxels, and pulls back,
x_moving = x + u(x), so the warped moving image is (M o phi)(x) = M(x + u(x)) with phi = id + u.
"""

from functools import partial

import jax
import jax.numpy as jnp

from drivenmorph_jax.grid import identity_grid


@partial(jnp.vectorize, signature="(d,h,w,c),(x,y,z,k)->(x,y,z,c)")
def warp(image, u):
    """Trilinear samples of `image` at x + u(x), clamped at the edge.

    out(x) = sum over the 8 corners q of the cell around x + u(x):  image(q) prod_a (1 - |x_a + u_a(x) - q_a|)

    Each corner is gathered once for all channels, so the floor is 8 reads of C values and one write a voxel.

    Args:
      image: (..., D, H, W, C), any channel count; every side at least 2.
      u: (..., X, Y, Z, 3) displacement in voxels of the image's grid.

    Returns:
      (..., X, Y, Z, C). Its derivative with respect to u is zero along an axis on which the sample lies outside.
    """
    return _warp(image, u)


def _cell(shape, u):
    """Lower corner, fraction within the cell, and whether the sample is inside: a triple of (X, Y, Z) each."""
    low, fraction, inside = [], [], []
    for axis, n in enumerate(shape):
        x = jax.lax.broadcasted_iota(jnp.float32, u.shape[:3], axis) + u[..., axis]
        clamped = jnp.clip(x, 0, n - 1)
        corner = jnp.clip(jnp.floor(clamped), 0, n - 2)
        low.append(corner.astype(jnp.int32))
        fraction.append(clamped - corner)
        inside.append((x >= 0) & (x <= n - 1))
    return low, fraction, inside


def _corners(shape, low, fraction, i):
    """The four corners on side i of axis 0: flat index, weights along the axes, signs of the weights' derivatives."""
    side = [(1 - f, f) for f in fraction]
    for j in (0, 1):
        for k in (0, 1):
            index = ((low[0] + i) * shape[1] + low[1] + j) * shape[2] + low[2] + k
            weights = jnp.where(i == 1, side[0][1], side[0][0]), side[1][j], side[2][k]
            yield index, weights, (2.0 * i - 1, 2.0 * j - 1, 2.0 * k - 1)


# Both passes are loops over the two sides of axis 0, because a loop is the only thing that XLA on CPU does not fuse its
# inputs into: it would compute whatever made `image` and `u` eight times over, once a corner. The backward pass is
# written out since the transposed one scatters for every corner and reads the image again for every axis.
@jax.custom_vjp
def _warp(image, u):
    flat = image.reshape(-1, image.shape[3])

    def side(i, out):
        low, fraction, _ = _cell(image.shape[:3], u)
        for index, (a, b, c), _ in _corners(image.shape[:3], low, fraction, i):
            out += (a * b * c).astype(image.dtype)[..., None] * jnp.take(flat, index, axis=0, mode="clip")
        return out

    return jax.lax.fori_loop(0, 2, side, jnp.zeros((*u.shape[:3], image.shape[3]), image.dtype))


def _warp_forward(image, u):
    return _warp(image, u), (image, u)


def _warp_backward(residuals, g):
    image, u = residuals
    flat = image.reshape(-1, image.shape[3])

    def side(i, carry):
        g_flat, g_u = carry
        low, fraction, _ = _cell(image.shape[:3], u)
        for index, (a, b, c), (da, db, dc) in _corners(image.shape[:3], low, fraction, i):
            along = (jnp.take(flat, index, axis=0, mode="clip") * g).sum(-1).astype(u.dtype)
            g_u = g_u[0] + da * b * c * along, g_u[1] + a * db * c * along, g_u[2] + a * b * dc * along
            g_flat = g_flat.at[index].add((a * b * c).astype(g.dtype)[..., None] * g, mode="drop")
        return g_flat, g_u

    zero = jnp.zeros(u.shape[:3], u.dtype)
    g_flat, g_u = jax.lax.fori_loop(0, 2, side, (jnp.zeros_like(flat), (zero, zero, zero)))
    _, _, inside = _cell(image.shape[:3], u)
    return g_flat.reshape(image.shape), jnp.stack([jnp.where(m, x, 0) for m, x in zip(inside, g_u, strict=True)], -1)


_warp.defvjp(_warp_forward, _warp_backward)


@partial(jnp.vectorize, signature="(d,h,w,c),(x,y,z,k)->(x,y,z,c)")
def warp_nearest(labels, u):
    """The value of the nearest voxel at x + u(x), clamped at the edge: the one interpolation label maps may have.

    Args and shapes as `warp`; the labels keep their type.
    """
    index = 0
    for axis, n in enumerate(labels.shape[:3]):
        x = identity_grid(u.shape[:3])[..., axis] + u[..., axis]
        index = index * n + jnp.clip(jnp.round(x), 0, n - 1).astype(jnp.int32)
    return jnp.take(labels.reshape(-1, labels.shape[3]), index, axis=0, mode="clip")


def compose(u, s):
    """The displacement of phi_u o phi_s: w(x) = s(x) + u(x + s(x)), all (..., D, H, W, 3) in voxels."""
    return s + warp(u, s)
