"""Smoothing of images and fields: a Gaussian and the mean over a box."""

import chex
import jax
import jax.numpy as jnp

from drivenmorph_jax.fields.grid import along_axes, box_sum


def gaussian_smooth(x: chex.Array, sigma: chex.Array | float, dims: int = 3) -> jax.Array:
    """Gaussian smoothing of (..., D, H, W, C) along each of its `dims` spatial axes.

    The weights are renormalised at the border. Every output is therefore a weighted mean of inputs, and a bound on |x|
    still holds. sigma = 0 is the identity.

    Args:
      x: (..., D, H, W, C).
      sigma: standard deviation in voxels, a number or a traced value.
      dims: number of spatial axes.
    """
    def matrix(n):
        distance = jnp.arange(n)[:, None] - jnp.arange(n)[None, :]
        kernel = jnp.exp(-0.5 * (distance / jnp.maximum(sigma, 1e-3)) ** 2)
        return kernel / kernel.sum(1, keepdims=True)

    return along_axes([matrix(n) for n in x.shape[-1 - dims:-1]], x)


def box_mean(x, radius):
    """Mean of x (*space) over the (2 radius + 1)^n voxels around each voxel. Voxels beyond the border count as zero."""
    return box_sum(x, radius, range(x.ndim)) / (2 * radius + 1) ** x.ndim
