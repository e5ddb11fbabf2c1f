"""`fields.warp.trilinear` on CPU and GPU: one gather for each corner, of all channels at once."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp

from drivenmorph_jax.backends import kernels, warp_tpu
from drivenmorph_jax.backends.cell import cell, flat
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
    *shape, channels = image.shape
    rows = image.reshape(-1) if channels == 1 and scalar_rows else image.reshape(-1, channels)
    low, fraction, _ = cell(shape, u)
    lowest, weights, out = flat(shape, low), [(1 - f, f) for f in fraction], 0
    for sides in itertools.product((0, 1), repeat=len(shape)):
        weight = math.prod(pair[side] for pair, side in zip(weights, sides, strict=True)).astype(image.dtype)
        out += weight.reshape(*weight.shape, *(1,) * (rows.ndim - 1)) * jnp.take(
            rows, lowest + flat(shape, sides), axis=0, mode="clip")
    return out.reshape(*u.shape[:-1], channels)


def _scattered_corners(image, u, g, loop):
    *shape, channels = image.shape
    rows = image.reshape(-1, channels)
    low, fraction, inside = cell(shape, u)
    lowest = flat(shape, low)

    def add(k, state):
        g_rows, g_u = state
        sides = [k >> axis & 1 for axis in reversed(range(len(shape)))]
        index, signs = lowest + flat(shape, sides), [2.0 * side - 1 for side in sides]
        weights = [jnp.where(side == 1, f, 1 - f) for f, side in zip(fraction, sides, strict=True)]
        along = (jnp.take(rows, index, axis=0, mode="clip") * g).sum(-1).astype(u.dtype)
        g_u = tuple(total + sign * math.prod(weights[:axis] + weights[axis + 1:]) * along
                    for axis, (total, sign) in enumerate(zip(g_u, signs, strict=True)))
        return g_rows.at[index].add(math.prod(weights)[..., None] * g, mode="drop"), g_u

    # The sum runs in float32: bfloat16 would lose small values, and GPUs add bfloat16 at half the rate.
    state = jnp.zeros(rows.shape, jnp.float32), (jnp.zeros(u.shape[:-1], u.dtype),) * u.shape[-1]
    if loop:
        state = jax.lax.fori_loop(0, 2**u.shape[-1], add, state)
    else:
        for k in range(2**u.shape[-1]):
            state = add(k, state)
    g_rows, g_u = state
    g_u = jnp.stack([jnp.where(m, x, 0) for m, x in zip(inside, g_u, strict=True)], -1)
    return g_rows.reshape(image.shape).astype(image.dtype), g_u


_gathered_on_cpu = _gathering(scalar_rows=True, loop=True)


@jax.custom_vjp
def _by_kernel(image, u):
    return kernels.call("warp", [(*u.shape[:-1], image.shape[-1])], image, u)[0]


_by_kernel.defvjp(lambda image, u: (_by_kernel(image, u), (image, u)),
                  lambda residuals, g: tuple(kernels.call("warp_adjoint", [x.shape for x in residuals], *residuals, g)))


def _on_cpu(image, u, near=False):
    in_space = u.shape[-1] == 3
    return _by_kernel(image, u) if in_space and kernels.usable(image, u) else _gathered_on_cpu(image, u)


FORMS = {"cpu": _on_cpu, "gpu": _gathering(scalar_rows=False, loop=False),
         "tpu": warp_tpu.warped}
