"""From a velocity field to the diffeomorphism it generates."""

from functools import partial

import jax
import jax.numpy as jnp

from drivenmorph_jax.fields.grid import resize_field
from drivenmorph_jax.fields.warp import compose, warp


def inverse(u, iterations=40, start=None):
    """Displacement w of the inverse of id + u, by the damped fixed point w(x) <- w(x) - (w(x) + u(x + w(x))) / 2.

    Without the damping it converges only where u is a contraction; with it, wherever phi stretches less than fourfold.
    Each iteration halves the error where phi neither stretches nor shrinks. `start` is a guess, zero where left out.
    For a field that came from velocities, exponentials of the negative ones are exact and cheaper.

    Reference: Chen, Lu, Chen, Ruan, "A simple fixed-point approach to invert a deformation field", 2008.
    """
    return _inverse(u, iterations, jnp.zeros_like(u) if start is None else start)


@partial(jax.jit, static_argnames=("iterations"), inline=True)
def _inverse(u, iterations, w):
    return jax.lax.fori_loop(0, iterations, lambda _, w: w - 0.5 * compose(u, w), w)


@partial(jax.jit, static_argnames=("stride", "steps"))
def coarse_inverse(u, stride=2, steps=4):
    """Displacement of the inverse of id + u, found on the coarser grid of `demons`' fields and finished on u's own.

    There it is not made exact at its voxels, which would leave all of the error of linear sampling to the points
    between them, where phi goes: `steps` times, more for a rougher u, w <- w - ((phi^-1 o phi - id) o phi^-1) / 2 takes
    the mean of that error away, until phi^-1 o phi and phi o phi^-1 come back about as well.
    """
    space = u.shape[:-1]
    coarse = inverse(resize_field(u, [n // stride for n in space]))
    return jax.lax.fori_loop(0, steps, lambda _, w: w - 0.5 * warp(compose(w, u), w), resize_field(coarse, space))
