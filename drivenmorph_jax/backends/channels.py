"""Sums and maps over the last axis, the channels."""

import jax
import jax.numpy as jnp

from drivenmorph_jax.backends import chosen, current


def summed(products, arrays):
    """[product.sum(-1) for product in products(*arrays)], of arrays (*space, C) -> (*space).

    Floor: the arrays are read once.
    """
    return chosen(FORMS, _in_one_kernel)(products, arrays)


def _in_one_kernel(products, arrays):
    """A few kernels. On GPU those of a loop take longer to start than to run."""
    return [product.sum(-1) for product in products(*arrays)]


def _one_by_one(products, arrays):
    """One channel after the other: short trailing axes do not vectorise on CPU, and the products of all channels are
    many more maps to write and read."""
    def add(sums, channel):
        return [total + product[..., 0] for total, product in zip(sums, products(*channel), strict=True)], None

    channels = tuple(jnp.moveaxis(x, -1, 0)[..., None] for x in arrays)
    count = len(jax.eval_shape(products, *arrays))
    return jax.lax.scan(add, [jnp.zeros_like(arrays[0][..., 0])] * count, channels)[0]


FORMS = {"cpu": _one_by_one, "gpu": _in_one_kernel, "tpu": _one_by_one}


def mapped(f, arrays):
    """f(*arrays), where f treats every channel by itself: on CPU one channel after the other."""
    if current() != "cpu":
        return f(*arrays)
    channels = tuple(jnp.moveaxis(x, -1, 0)[..., None] for x in arrays)
    return tuple(jnp.moveaxis(x[..., 0], 0, -1) for x in jax.lax.map(lambda x: f(*x), channels))
