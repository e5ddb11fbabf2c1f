"""From a velocity field to the diffeomorphism it generates."""

from functools import partial

import jax
import jax.numpy as jnp

from drivenmorph_jax.warp import compose


def exponential(v, steps=7, reach=None):
    """Displacement of exp(v), the flow of the stationary velocity v at time one, by scaling and squaring.

    s_0 = v / 2^N;  s_(n+1) = s_n o s_n;  exp(v) = id + s_N. The inverse is exponential(-v).

    Args:
      v: (..., D, H, W, 3) velocity in voxels per unit of time.
      steps: number of squarings N. The first step should move less than half a voxel: N >= 1 + log2 max|v|.
      reach: a bound on |v| in voxels, where the caller knows one, as in `warp`: no flow goes further.

    Returns:
      (..., D, H, W, 3) displacement in voxels.

    Reference: Arsigny, Commowick, Pennec, Ayache, "A Log-Euclidean framework for statistics on diffeomorphisms", 2006.
    """
    return _exponential(v, steps, reach, jax.default_backend())


# Compiled for the same reason as `warp`, which differs between backends.
@partial(jax.jit, static_argnames=("steps", "reach", "backend"), inline=True)
def _exponential(v, steps, reach, backend):
    # A loop, not an unrolled chain: XLA on CPU would fuse each squaring into the eight gathers of the next and compute
    # it eight times over.
    return jax.lax.fori_loop(0, steps, lambda _, s: compose(s, s, reach), v / 2**steps)


def inverse(u, iterations=40, start=None):
    """Displacement w of the inverse of id + u, by the damped fixed point w(x) <- w(x) - (w(x) + u(x + w(x))) / 2.

    Without the damping it converges only where u is a contraction; with it, wherever phi stretches less than fourfold.
    Each iteration halves the error where phi neither stretches nor shrinks. `start` is a guess, zero where left out.
    For a field that came from velocities, exponentials of the negative ones are exact and cheaper.

    Reference: Chen, Lu, Chen, Ruan, "A simple fixed-point approach to invert a deformation field", 2008.
    """
    return _inverse(u, iterations, jnp.zeros_like(u) if start is None else start, jax.default_backend())


@partial(jax.jit, static_argnames=("iterations", "backend"), inline=True)
def _inverse(u, iterations, w, backend):
    return jax.lax.fori_loop(0, iterations, lambda _, w: w - 0.5 * compose(u, w), w)
