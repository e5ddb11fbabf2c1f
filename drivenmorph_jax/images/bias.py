"""Bias: the smooth difference in brightness between two images. It is estimated, and half is removed from each image.

The coils of the scanners cause this difference.

Reference: Lewis and Fox, "Correction of differential intensity inhomogeneity in longitudinal MR images", NeuroImage,
  2004. They estimate the same quotient by a median filter.
"""

import jax.numpy as jnp

from drivenmorph_jax.fields.grid import average_pool, resize
from drivenmorph_jax.fields.smooth import gaussian_smooth

SIGMA = 1.25  # cells
MEAN_FLOOR = 0.01  # added to every mean, so that r is 0 in cells that neither brain reaches


def differential_bias(fixed, moving, cell, weights=None):
    """The logarithm r of the smooth quotient of two images.

      r = log (G * w F) / (G * w M)

    w is 1 where neither image is background, else 0. G takes means over cells of `cell`^3 voxels, smooths them by a
    Gaussian of `SIGMA` cells, and interpolates r linearly between the centres of the cells.

    Args:
      fixed, moving: (B, D, H, W, 1) in [0, 1], with background 0, roughly aligned.
      cell: side of a cell in voxels. Every side of the images is a multiple of it.
      weights: (B, D, H, W, 2), 0 where the fixed or the moving image does not count.

    Returns:
      r (B, D, H, W, 1).
    """
    w = (fixed > 0) & (moving > 0)
    if weights is not None:
        w = w * weights.min(-1, keepdims=True)
    means = gaussian_smooth(average_pool(jnp.concatenate([w * fixed, w * moving], axis=-1), cell), SIGMA)
    log = jnp.log(means + MEAN_FLOOR)
    return resize(log[..., :1] - log[..., 1:], fixed.shape[1:4])


def balanced(fixed, moving, cell, weights=None):
    """F exp(-r/2) and M exp(r/2), clipped to at most 1, with r and the arguments of `differential_bias`.

    The two results have the same local brightness.
    """
    r = differential_bias(fixed, moving, cell, weights)
    return jnp.minimum(fixed * jnp.exp(-r / 2), 1), jnp.minimum(moving * jnp.exp(r / 2), 1)
