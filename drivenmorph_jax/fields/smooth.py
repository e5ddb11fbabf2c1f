"""The Demons algorithm as plain functions: force -> smooth -> exponentiate -> update, coarse to fine.

The forces are in `forces.py`. Fields are (..., D, H, W, 3) or (..., H, W, 2), in voxels of their own grid.

References: Thirion, "Image matching as a diffusion process", 1998; Vercauteren et al., "Diffeomorphic demons", 2009.
"""

import jax.numpy as jnp

from drivenmorph_jax.fields.grid import along_axes, box_sum


def gaussian_smooth(x, sigma, dims=3):
    """Separable Gaussian of standard deviation `sigma` voxels (a number or traced) over (..., D, H, W, C).

    The weights are renormalised at the border, so every output is a weighted mean of inputs and no bound on |x| is
    lost. sigma = 0 is the identity.
    """
    def matrix(n):
        distance = jnp.arange(n)[:, None] - jnp.arange(n)[None, :]
        kernel = jnp.exp(-0.5 * (distance / jnp.maximum(sigma, 1e-3)) ** 2)
        return kernel / kernel.sum(1, keepdims=True)

    return along_axes([matrix(n) for n in x.shape[-1 - dims:-1]], x)


def box_mean(x, radius):
    """Sum of x (*space) over (2 radius + 1)^n voxels around each, zero beyond the border, over their number."""
    return box_sum(x, radius, range(x.ndim)) / (2 * radius + 1) ** x.ndim
