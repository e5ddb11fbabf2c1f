"""The inverse of a transform phi = id + u, from its displacement alone."""

from functools import partial

import chex
import jax
import jax.numpy as jnp

from drivenmorph_jax.fields.grid import identity_grid, resize_field
from drivenmorph_jax.fields.warp import compose, warp


def inverse(u: chex.Array, iterations: int = 40, start: chex.Array | None = None) -> jax.Array:
    """Displacement w of the inverse of id + u, by a damped fixed-point iteration.

      w(x) <- w(x) - (w(x) + u(x + w(x))) / 2

    Without the damping, the iteration converges only where u is a contraction. With it, the iteration converges
    wherever phi = id + u stretches less than fourfold. Where phi neither stretches nor shrinks, each iteration halves
    the error. If u was integrated from velocities, the exponentials of the negative velocities give the inverse exactly
    and at a lower cost.

    Args:
      u: (..., D, H, W, 3) displacement in voxels.
      iterations: number of iterations.
      start: initial w, with the shape of u; zero if left out.

    Returns:
      w, with the shape of u, in voxels.

    Reference: Chen, Lu, Chen, Ruan, "A simple fixed-point approach to invert a deformation field", 2008.
    """
    return _inverse(u, iterations, jnp.zeros_like(u) if start is None else start)


@partial(jax.jit, static_argnames=("iterations"), inline=True)
def _inverse(u, iterations, w):
    return jax.lax.fori_loop(0, iterations, lambda _, w: w - 0.5 * compose(u, w), w)


@partial(jax.jit, static_argnames="most")
def inverse_at(u: chex.Array, points: chex.Array, closest: chex.Array, tolerance: float = 1e-3,
               most: int = 200) -> jax.Array:
    """The points v that phi = id + u maps to given points p, by a damped fixed-point iteration.

      v <- v - A^-1 (v + u(v) - p) / 2,    v = A^-1 p at the start

    A is an affine map close to phi. The iteration converges where A^-1 phi stretches less than fourfold. It ends when
    no v + u(v) is further than `tolerance` from its p.

    Args:
      u: (D, H, W, 3) displacement in voxels. Beyond its grid, the displacement at the edge is used.
      points: p (..., 3) with four axes, in voxels of the grid of u.
      closest: A (4, 4), in voxels.
      tolerance: in voxels.
      most: the most iterations.

    Returns:
      v, with the shape of p, in voxels.
    """
    back = jnp.linalg.inv(jnp.asarray(closest, u.dtype))
    points = points.astype(u.dtype)

    def off(v):
        return v + warp(u, v - identity_grid(v.shape[:-1])) - points

    def step(state):
        v, error, number = state
        v = v - 0.5 * error @ back[:3, :3].T
        return v, off(v), number + 1

    def goes_on(state):
        _, error, number = state
        return (number < most) & (jnp.abs(error).max() > tolerance)

    start = points @ back[:3, :3].T + back[:3, 3]
    return jax.lax.while_loop(goes_on, step, (start, off(start), 0))[0]


@partial(jax.jit, static_argnames=("stride", "steps"))
def coarse_inverse(u: chex.Array, stride: int = 2, steps: int = 4) -> jax.Array:
    """Displacement w of the inverse of id + u, computed on a coarser grid and corrected on the grid of u.

    `inverse` runs on a grid `stride` times coarser. The fields of `demons.demons` lie on such a grid. Its result is
    resampled to the grid of u. There it is corrected `steps` times:

      w <- w - ((phi^-1 o phi - id) o phi^-1) / 2

    An inverse that is exact at its own voxels leaves the whole error of linear sampling to the points between the
    voxels, and phi maps to such points. The correction removes the mean of this error. Afterwards phi^-1 o phi and
    phi o phi^-1 are about equally close to the identity. A rougher u needs more steps.

    Args:
      u: (*space, n) displacement in voxels.
      stride: how many times coarser the grid of the first inverse is.
      steps: number of corrections.

    Returns:
      w (*space, n), in voxels.
    """
    space = u.shape[:-1]
    coarse = inverse(resize_field(u, [n // stride for n in space]))
    return jax.lax.fori_loop(0, steps, lambda _, w: w - 0.5 * warp(compose(w, u), w), resize_field(coarse, space))
