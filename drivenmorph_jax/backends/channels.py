"""Sums and maps over the channels, the last axis."""

import jax
import jax.numpy as jnp

from drivenmorph_jax.backends import chosen, current


def summed(products, arrays):
    """[product.sum(-1) for product in products(*arrays)], for arrays (*space, C): a list of (*space).

    Lower bound of its memory traffic: every array is read once.
    """
    return chosen(FORMS, _in_one_kernel)(products, arrays)


def _in_one_kernel(products, arrays):
    """All channels at once, in a few kernels. On GPU, the kernels of a loop take longer to start than to run."""
    return [product.sum(-1) for product in products(*arrays)]


def _one_by_one(products, arrays):
    """One channel after the other.

    On CPU, short trailing axes do not vectorise. The products of all channels at once would also be many more maps to
    write and to read.
    """
    def add(sums, channel):
        return [total + product[..., 0] for total, product in zip(sums, products(*channel), strict=True)], None

    channels = tuple(jnp.moveaxis(x, -1, 0)[..., None] for x in arrays)
    count = len(jax.eval_shape(products, *arrays))
    return jax.lax.scan(add, [jnp.zeros_like(arrays[0][..., 0])] * count, channels)[0]


FORMS = {"cpu": _one_by_one, "gpu": _in_one_kernel, "tpu": _one_by_one}


def mapped(f, arrays):
    """f(*arrays), where f treats every channel separately. On CPU, f runs on one channel after the other."""
    if current() != "cpu":
        return f(*arrays)
    channels = tuple(jnp.moveaxis(x, -1, 0)[..., None] for x in arrays)
    return tuple(jnp.moveaxis(x[..., 0], 0, -1) for x in jax.lax.map(lambda x: f(*x), channels))
