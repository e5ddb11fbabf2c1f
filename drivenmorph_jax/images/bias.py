"""What one image is smoothly brighter than the other, by their scanners' coils, taken from both in equal parts.

Reference: Lewis and Fox, "Correction of differential intensity inhomogeneity in longitudinal MR images", NeuroImage,
  2004, who estimate the same quotient by a median filter.
"""

import jax.numpy as jnp

from drivenmorph_jax.fields.grid import average_pool, resize
from drivenmorph_jax.fields.smooth import gaussian_smooth

SIGMA = 1.25  # cells
MEAN_FLOOR = 0.01  # of a mean: a cell that neither brain reaches says nothing


def differential_bias(fixed, moving, cell, weights=None):
    """r = log (G * w F) / (G * w M), w = 1 where neither image is background: (B, D, H, W, 1).

    Args:
      fixed, moving: (B, D, H, W, 1) in [0, 1], background 0, roughly aligned.
      cell: voxels; G is a mean over cells of `cell`^3 voxels and a Gaussian of `SIGMA` cells, linear between their
        centres. Every side is a multiple of it.
      weights: (B, D, H, W, 2), 0 where the fixed or the moving image does not count.
    """
    w = (fixed > 0) & (moving > 0)
    if weights is not None:
        w = w * weights.min(-1, keepdims=True)
    means = gaussian_smooth(average_pool(jnp.concatenate([w * fixed, w * moving], axis=-1), cell), SIGMA)
    log = jnp.log(means + MEAN_FLOOR)
    return resize(log[..., :1] - log[..., 1:], fixed.shape[1:4])


def balanced(fixed, moving, cell, weights=None):
    """F exp(-r/2) and M exp(r/2), at most 1, of the r of `differential_bias`: equally bright wherever one looks."""
    r = differential_bias(fixed, moving, cell, weights)
    return jnp.minimum(fixed * jnp.exp(-r / 2), 1), jnp.minimum(moving * jnp.exp(r / 2), 1)
