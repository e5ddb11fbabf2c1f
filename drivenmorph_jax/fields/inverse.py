"""The inverse of a transform phi = id + u, from its displacement alone."""

import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp

from drivenmorph_jax.fields.grid import resize_field
from drivenmorph_jax.fields.warp import compose, warp
from drivenmorph_jax.runtime.stored import stored


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


@jax.jit
def inverse_at(u: chex.Array, points: chex.Array, start: chex.Array, most: int,
               tolerance: float = 1e-3) -> tuple[jax.Array, jax.Array]:
    """The points v that phi = id + u maps to given points p, by Newton's method.

      v <- v - t (Dphi(v))^-1 (phi(v) - p),    t halved where |phi(v) - p| would not fall, else doubled up to 1

    Dphi is the derivative of the trilinear samples of u, so the method is exact within a cell of the grid.

    Args:
      u: (D, H, W, 3) displacement in voxels. Beyond its grid, the displacement at the edge is used.
      points: p (N, 3), in voxels of the grid of u.
      start: v at the start (N, 3).
      most: the most iterations; it ends earlier where every point has converged.
      tolerance: in voxels.

    Returns:
      v (N, 3) in voxels, and whether each |phi(v) - p| is below `tolerance` along every axis (N,).
    """
    def evaluated(v):
        value, derivative = _sampled_with_derivative(u, v)
        error = v + value - points
        return error, jnp.linalg.norm(error, axis=-1), _solved(jnp.eye(3, dtype=u.dtype) + derivative, error)

    def step(state):
        v, error, size, direction, t, number = state
        trial = v - t[:, None] * direction
        found = evaluated(trial)
        better = found[1] < size
        kept = [jnp.where(better[:, None] if new.ndim > 1 else better, new, old)
                for new, old in zip((trial, *found), (v, error, size, direction), strict=True)]
        return *kept, jnp.where(better, jnp.minimum(1, 2 * t), t / 2), number + 1

    def goes_on(state):
        return (state[-1] < most) & (jnp.abs(state[1]).max(initial=0) > tolerance)

    first = (start, *evaluated(start), jnp.ones(len(start), u.dtype), 0)
    v, error, *_ = jax.lax.while_loop(goes_on, step, first)
    return v, jnp.abs(error).max(-1) <= tolerance


def _sampled_with_derivative(u, v):
    """Trilinear samples u(v) (N, 3), clamped at the edge, and their derivative by v (N, 3, 3), 0 beyond the edge."""
    top = jnp.array(u.shape[:3]) - 1
    low = jnp.clip(jnp.floor(v), 0, top - 1).astype(jnp.int32)
    t = jnp.clip(v, 0, top) - low
    index = (low[:, 0] * u.shape[1] + low[:, 1]) * u.shape[2] + low[:, 2]
    strides = u.shape[1] * u.shape[2], u.shape[2], 1
    values = {side: u.reshape(-1, 3)[index + sum(a * n for a, n in zip(side, strides, strict=True))]
              for side in itertools.product((0, 1), repeat=3)}
    derivative = []
    for axis in reversed(range(3)):  # the samples lose one axis each time, the derivatives by the axes before it, too
        def along(corners, axis=axis):
            return {side: corners[(*side, 0)] + t[:, axis:axis + 1] * (corners[(*side, 1)] - corners[(*side, 0)])
                    for side in itertools.product((0, 1), repeat=axis)}

        change = {side: values[(*side, 1)] - values[(*side, 0)] for side in itertools.product((0, 1), repeat=axis)}
        derivative, values = [change, *map(along, derivative)], along(values)
    inside = (v >= 0) & (v <= top)
    return values[()], jnp.stack([one[()] for one in derivative], -1) * inside[:, None, :]


def _solved(matrices, vectors):
    """x with A x = b for matrices A (N, 3, 3) and vectors b (N, 3), by Cramer's rule. A singular A gives a long x."""
    a, b, c = (matrices[..., axis] for axis in range(3))
    normal = jnp.cross(b, c)
    determinant = (a * normal).sum(-1, keepdims=True)
    x = [(vectors * one).sum(-1) for one in (normal, jnp.cross(c, a), jnp.cross(a, b))]
    return jnp.stack(x, -1) / jnp.where(jnp.abs(determinant) < 1e-3, 1e-3, determinant)


@stored(static_argnames=("stride", "steps"))
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
