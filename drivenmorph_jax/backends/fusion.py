"""Limits on what XLA fuses."""

import jax
import jax.numpy as jnp

from drivenmorph_jax.backends import current


def alone(f, *args):
    """f(*args). On CPU, XLA fuses f neither with the computation of `args` nor with the use of its result.

    Where it can, XLA on CPU recomputes an array for every element that reads it: eight times for the corners of a
    gather, 27 times for as many shifts. It fuses across loops as well, but not across branches. So on CPU, f is one
    branch of a condition whose value is hidden from the compiler. On other devices this is plain f(*args).
    """
    if current() != "cpu":
        return f(*args)

    f = jax.jit(f)  # traced once for both branches, and for all calls with arguments of these shapes

    def never(*args):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(f, *args))

    return jax.lax.cond(jax.lax.optimization_barrier(True), f, never, *args)


def apart(x):
    """x; on GPU, x and its cotangent are written to memory.

    Without this, XLA on GPU fuses the computation of x into the transposes around a convolution, three times for its
    three slices, or into the sum for a bias. Each of these operations is fast only when it is not fused.
    """
    return jax.lax.optimization_barrier(x) if current() == "gpu" else x
