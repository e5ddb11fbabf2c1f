"""What XLA may not fuse."""

import jax
import jax.numpy as jnp


def alone(f, *args):
    """f(*args), a computation of its own on CPU: neither made into one with what makes `args` nor with what reads it.

    XLA on CPU computes an array anew for every element that reads it, where it can: eight times for the corners of a
    gather, 27 times for as many shifts. It looks into loops as well, but not into branches. So this is one, taken for a
    reason that the compiler does not see. Elsewhere it is f(*args).
    """
    if jax.default_backend() != "cpu":
        return f(*args)

    f = jax.jit(f, inline=True)  # traced once for both

    def never(*args):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(f, *args))

    return jax.lax.cond(jax.lax.optimization_barrier(True), f, never, *args)
