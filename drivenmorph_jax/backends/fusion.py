"""What XLA may and may not fuse."""

import jax
import jax.numpy as jnp

from drivenmorph_jax.backends import current


def alone(f, *args):
    """f(*args), on CPU a computation of its own: XLA fuses it neither with what makes `args` nor with what reads it.

    XLA on CPU computes an array anew for every element that reads it, where it can: eight times for the corners of a
    gather, 27 times for as many shifts. It looks into loops as well, but not into branches. So this is a branch, taken
    for a reason that the compiler does not see. Elsewhere it is f(*args).
    """
    if current() != "cpu":
        return f(*args)

    f = jax.jit(f, inline=True)  # traced once for both branches

    def never(*args):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(f, *args))

    return jax.lax.cond(jax.lax.optimization_barrier(True), f, never, *args)


def apart(x):
    """x; on GPU x and its cotangent are written to memory. XLA on GPU would compute what leads to them within the
    transposes around a convolution, three times for its slices, or within the sum for a bias; each of these is fast
    only by itself."""
    return jax.lax.optimization_barrier(x) if current() == "gpu" else x
