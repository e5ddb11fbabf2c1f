"""Integration: the exponential of a stationary velocity field."""

from functools import partial

import chex
import jax

from drivenmorph_jax.fields.warp import compose


def exponential(v: chex.Array, steps: int = 7, reach: float | None = None) -> jax.Array:
    """Displacement of exp(v), the flow of the stationary velocity v at time one, by scaling and squaring.

      s_0 = v / 2^N,    s_(n+1) = s_n o s_n,    exp(v) = id + s_N

    The inverse is exponential(-v).

    Args:
      v: (..., D, H, W, 3) velocity in voxels per unit of time.
      steps: number of squarings N. The first step should move less than half a voxel: N >= 1 + log2 max|v|.
      reach: a bound on |v| in voxels, if the caller knows one. The displacements of the flow obey the same bound, and
        `warp` uses it.

    Returns:
      (..., D, H, W, 3) displacement in voxels.

    Reference: Arsigny, Commowick, Pennec, Ayache, "A Log-Euclidean framework for statistics on diffeomorphisms", 2006.
    """
    return _exponential(v, steps, reach)


# Compiled because JAX compiles a loop outside a compiled function anew at every call.
@partial(jax.jit, static_argnames=("steps", "reach"), inline=True)
def _exponential(v, steps, reach):
    # A loop instead of an unrolled chain: XLA on CPU would fuse each squaring into the eight gathers of the next and
    # compute it eight times.
    return jax.lax.fori_loop(0, steps, lambda _, s: compose(s, s, reach), v / 2**steps)
