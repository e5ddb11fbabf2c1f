"""Masks: interpolation of an image inside a mask, from the voxels around it."""

import jax
import jax.numpy as jnp

from drivenmorph_jax.fields.smooth import gaussian_smooth


@jax.jit
def fill(x, inside):
    """x with the voxels inside a mask interpolated from the voxels outside. Outside, x is unchanged.

    The voxels inside first get a Gaussian mean of the voxels outside. Gaussians of falling width then smooth the
    inside, so that the result is continuous at the edge of the mask.

    Args:
      x: (*space, C).
      inside: (*space, 1), bool, the mask.
    """
    dims, outside = inside.ndim - 1, 1.0 - inside
    around = gaussian_smooth(jnp.concatenate([x * outside, outside], -1), 16.0, dims)
    x = jnp.where(inside, around[..., :-1] / jnp.maximum(around[..., -1:], 1e-6), x)
    for sigma in (8.0, 4.0, 4.0, 2.0, 2.0, 1.0, 1.0):
        x = jnp.where(inside, gaussian_smooth(x, sigma, dims), x)
    return x
