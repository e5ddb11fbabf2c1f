"""The Demons algorithm as plain functions: force -> smooth -> exponentiate -> update, coarse to fine.

The forces are in `forces.py`. Fields are (..., D, H, W, 3) or (..., H, W, 2), in voxels of their own grid.

References: Thirion, "Image matching as a diffusion process", 1998; Vercauteren et al., "Diffeomorphic demons", 2009.
"""

import jax
import jax.numpy as jnp

from drivenmorph_jax.fields.smooth import gaussian_smooth


@jax.jit
def fill(x, inside):
    """x (*space, C) with what lies in the mask `inside` (*space, 1) interpolated from what lies around it.

    A Gaussian mean of the surroundings, then Gaussians of falling width within the mask, so that the result is
    continuous at its edge. Elsewhere x is unchanged.
    """
    dims, outside = inside.ndim - 1, 1.0 - inside
    around = gaussian_smooth(jnp.concatenate([x * outside, outside], -1), 16.0, dims)
    x = jnp.where(inside, around[..., :-1] / jnp.maximum(around[..., -1:], 1e-6), x)
    for sigma in (8.0, 4.0, 4.0, 2.0, 2.0, 1.0, 1.0):
        x = jnp.where(inside, gaussian_smooth(x, sigma, dims), x)
    return x
