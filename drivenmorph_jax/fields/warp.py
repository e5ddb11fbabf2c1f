"""Sampling by a displacement, and the composition of displacements.

Convention, here and everywhere: a field u lives on the fixed grid, in voxels, and pulls back,
x_moving = x + u(x), so the warped moving image is (M o phi)(x) = M(x + u(x)) with phi = id + u.
"""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp

from drivenmorph_jax.backends import chosen
from drivenmorph_jax.backends.warp import FORMS
from drivenmorph_jax.fields.grid import identity_grid


def warp(image, u, reach=None):
    """Trilinear samples of `image` at x + u(x), clamped at the edge; bilinear in 2-D.

    out(x) = sum over the 8 corners q of the cell around x + u(x):  image(q) prod_a (1 - |x_a + u_a(x) - q_a|)

    `trilinear` is the formula in code; each device has a form of it in `backends`. The floor is 8 reads of C values and
    one write a voxel.

    Args:
      image: (..., D, H, W, C), any channel count; every side at least 2.
      u: (..., X, Y, Z, 3) displacement in voxels of the image's grid; (..., X, Y, 2) of an image (..., H, W, C).
      reach: a bound on |u_a| in voxels along every axis, where the caller knows one; u on the image's own grid.

    Returns:
      (..., X, Y, Z, C). Its derivative with respect to u is zero along an axis on which the sample lies outside.
    """
    return _sampled(image, u, reach is not None and reach <= 1)


# Compiled, since JAX compiles a loop that stands outside a compiled function anew at every call.
@partial(jax.jit, static_argnames="near", inline=True)
def _sampled(image, u, near):
    return _batched(partial(chosen(FORMS, trilinear), near=near), u)(image, u)


def trilinear(image, u, near=False):
    """`warp` of one image (*space, C) as its formula: the sum over the corners of each sample's cell.

    The derivative with respect to u is not zero where the sample lies outside; `near` changes nothing.
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
    """f(image, u) over leading axes: the last axis of `u` says how many others are spatial."""
    image, field = ([f"{name}{axis}" for axis in range(u.shape[-1])] for name in "nm")
    return jnp.vectorize(f, signature=f"({','.join(image)},c),({','.join(field)},k)->({','.join(field)},c)")


def warp_nearest(labels, u):
    """The value of the nearest voxel at x + u(x), clamped at the edge: the one interpolation label maps may have.

    Args and shapes as `warp`; the labels keep their type.
    """
    def nearest(labels, u):
        index, space = 0, labels.shape[:-1]
        for axis, n in enumerate(space):
            x = identity_grid(u.shape[:-1])[..., axis] + u[..., axis]
            index = index * n + jnp.clip(jnp.round(x), 0, n - 1).astype(jnp.int32)
        return jnp.take(labels.reshape(-1, labels.shape[-1]), index, axis=0, mode="clip")

    return _batched(nearest, u)(labels, u)


def compose(u, s, reach=None):
    """The displacement of phi_u o phi_s: w(x) = s(x) + u(x + s(x)), all (..., D, H, W, 3) or (..., H, W, 2).

    `reach` is a bound on |s_a|, as in `warp`.
    """
    return s + warp(u, s, reach)
