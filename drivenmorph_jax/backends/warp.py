"""`fields.warp.trilinear` on CPU and GPU: one gather for each corner, of all channels at once."""

import math
from functools import partial

import jax
import jax.numpy as jnp

from drivenmorph_jax.backends import warp_tpu
from drivenmorph_jax.backends.cell import cell, corner
from drivenmorph_jax.backends.fusion import alone


def _gathering(scalar_rows, loop):
    """The implementation (image, u, near) -> samples for one device.

    Args:
      scalar_rows: gather an image of one channel as scalars, since XLA on CPU is slow to gather rows of one value.
      loop: add the corners one after the other in a loop in the backward pass, since on CPU the contribution of a
        corner takes as much memory as the result. Otherwise every corner is a kernel of its own.
    """
    gather = partial(_gathered_corners, scalar_rows=scalar_rows)
    scatter = partial(_scattered_corners, loop=loop)

    # The backward pass is written out. Automatic differentiation would scatter into an array of its own for every
    # corner, and read the image again for every axis.
    @jax.custom_vjp
    def gathered(image, u):
        return alone(gather, image, u)

    gathered.defvjp(lambda image, u: (gathered(image, u), (image, u)),
                    lambda residuals, g: alone(scatter, *residuals, g))
    return lambda image, u, near=False: gathered(image, u)


def _gathered_corners(image, u, scalar_rows):
    flat, out = image.reshape(-1, image.shape[-1]), 0
    if image.shape[-1] == 1 and scalar_rows:
        flat = flat[:, 0]
    low, fraction, _ = cell(image.shape[:-1], u)
    for k in range(2**u.shape[-1]):
        index, weights, _ = corner(image.shape[:-1], low, fraction, k)
        weight = math.prod(weights).astype(image.dtype)
        out += weight.reshape(*weight.shape, *(1,) * (flat.ndim - 1)) * jnp.take(flat, index, axis=0, mode="clip")
    return out.reshape(*u.shape[:-1], image.shape[-1])


def _scattered_corners(image, u, g, loop):
    flat = image.reshape(-1, image.shape[-1])
    low, fraction, inside = cell(image.shape[:-1], u)

    def add(k, state):
        g_flat, g_u = state
        index, weights, signs = corner(image.shape[:-1], low, fraction, k)
        along = (jnp.take(flat, index, axis=0, mode="clip") * g).sum(-1).astype(u.dtype)
        g_u = tuple(total + sign * math.prod(weights[:axis] + weights[axis + 1:]) * along
                    for axis, (total, sign) in enumerate(zip(g_u, signs, strict=True)))
        return g_flat.at[index].add(math.prod(weights)[..., None] * g, mode="drop"), g_u

    # The sum runs in float32: bfloat16 would lose small values, and GPUs add bfloat16 at half the rate.
    state = jnp.zeros(flat.shape, jnp.float32), (jnp.zeros(u.shape[:-1], u.dtype),) * u.shape[-1]
    if loop:
        state = jax.lax.fori_loop(0, 2**u.shape[-1], add, state)
    else:
        for k in range(2**u.shape[-1]):
            state = add(k, state)
    g_flat, g_u = state
    g_u = jnp.stack([jnp.where(m, x, 0) for m, x in zip(inside, g_u, strict=True)], -1)
    return g_flat.reshape(image.shape).astype(image.dtype), g_u


FORMS = {"cpu": _gathering(scalar_rows=True, loop=True), "gpu": _gathering(scalar_rows=False, loop=False),
         "tpu": warp_tpu.warped}
