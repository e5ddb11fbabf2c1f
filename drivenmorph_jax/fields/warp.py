"""Sampling by a displacement, and the composition of displacements.

The whole package uses one convention. A field u lies on the fixed grid, is in voxels, and pulls back:
x_moving = x + u(x). With phi = id + u, the warped moving image is

  (M o phi)(x) = M(x + u(x))
"""

import itertools
import math
from functools import partial

import chex
import jax
import jax.numpy as jnp

from drivenmorph_jax.backends import chosen
from drivenmorph_jax.backends.warp import FORMS
from drivenmorph_jax.fields.grid import identity_grid


def warp(image: chex.Array, u: chex.Array, reach: float | None = None) -> jax.Array:
    """Trilinear samples of `image` at x + u(x), clamped at the edge; bilinear in 2-D.

      out(x) = sum_q image(q) prod_a (1 - |x_a + u_a(x) - q_a|)    over the 8 corners q of the cell around x + u(x)

    `trilinear` is this formula in code. `backends` has an implementation for each kind of device. Each voxel costs at
    least 8 reads of C values and one write.

    Args:
      image: (..., D, H, W, C), with any number of channels. Every side is at least 2.
      u: (..., X, Y, Z, 3) displacement in voxels of the image's grid, or (..., X, Y, 2) for an image (..., H, W, C).
      reach: a bound on |u_a| in voxels along every axis, if the caller knows one. u must then lie on the image's own
        grid.

    Returns:
      (..., X, Y, Z, C). Where a sample lies outside the image along an axis, the derivative with respect to that
      component of u is zero.
    """
    return _sampled(image, u, reach is not None and reach <= 1)


# Compiled because JAX compiles a loop outside a compiled function anew at every call.
@partial(jax.jit, static_argnames="near", inline=True)
def _sampled(image, u, near):
    return _batched(partial(chosen(FORMS, trilinear), near=near), u)(image, u)


def trilinear(image, u, near=False):
    """`warp` of one image (*space, C), written as its formula: the sum over the corners of each sample's cell.

    The derivative with respect to u differs from that of `warp` where a sample lies exactly on the border. `near`
    has no effect here; it selects a faster implementation on some devices.
    """
    *space, _ = image.shape
    x = [jnp.clip(place, 0, n - 1) for place, n in zip(jnp.moveaxis(identity_grid(u.shape[:-1]) + u, -1, 0), space,
                                                       strict=True)]
    low = [jnp.clip(jnp.floor(place), 0, n - 2) for place, n in zip(x, space, strict=True)]
    out = 0
    for sides in itertools.product((0, 1), repeat=len(space)):
        q = [corner + side for corner, side in zip(low, sides, strict=True)]
        weight = math.prod(1 - abs(place - corner) for place, corner in zip(x, q, strict=True))
        out += weight.astype(image.dtype)[..., None] * image[tuple(corner.astype(int) for corner in q)]
    return out


def _batched(f, u):
    """f(image, u) over leading axes. The last axis of `u` gives the number of spatial axes."""
    image, field = ([f"{name}{axis}" for axis in range(u.shape[-1])] for name in "nm")
    return jnp.vectorize(f, signature=f"({','.join(image)},c),({','.join(field)},k)->({','.join(field)},c)")


def warp_nearest(labels: chex.Array, u: chex.Array) -> jax.Array:
    """The value of the voxel nearest to x + u(x), clamped at the edge. Label maps must be warped by this function.

    Arguments and shapes are those of `warp`. The labels keep their type.
    """
    def nearest(labels, u):
        index, space = 0, labels.shape[:-1]
        for axis, n in enumerate(space):
            x = identity_grid(u.shape[:-1])[..., axis] + u[..., axis]
            index = index * n + jnp.clip(jnp.round(x), 0, n - 1).astype(jnp.int32)
        return jnp.take(labels.reshape(-1, labels.shape[-1]), index, axis=0, mode="clip")

    return _batched(nearest, u)(labels, u)


def compose(u: chex.Array, s: chex.Array, reach: float | None = None) -> jax.Array:
    """The displacement w of phi_u o phi_s.

      w(x) = s(x) + u(x + s(x))

    All fields are (..., D, H, W, 3) or (..., H, W, 2), in voxels. `reach` is a bound on |s_a|, as in `warp`.
    """
    return s + warp(u, s, reach)
