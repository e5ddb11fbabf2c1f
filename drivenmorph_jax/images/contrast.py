"""Matching of contrast: the values of the moving image are replaced by values of the fixed image.

Each value m of the moving image becomes E[F | M o phi = m], the mean of the fixed image where the warped moving image
is m. The images are then registered as images of one contrast, and the values are matched again with the better phi.
Images are (D, H, W) in [0, 1], with background 0.

Reference: Guimond, Roche, Ayache, Meunier, "Three-dimensional multimodal brain warping using the demons algorithm and
  adaptive intensity corrections", IEEE Transactions on Medical Imaging, 2001.
"""

import jax
import jax.numpy as jnp

from drivenmorph_jax.fields.smooth import box_mean, gaussian_smooth
from drivenmorph_jax.fields.warp import warp
from drivenmorph_jax.runtime.stored import stored

BINS, WIDTH = 64, 1.5  # number of values of the curve; width of their smoothing, in bins
PASSES = 3  # registrations; each takes its curve from the result of the one before
# Images whose correlation is below SAME count as images of two contrasts. The correlations of 702 affinely aligned
# pairs of T1 brains are .42 and more. With one image of each pair inverted they are -.45 and less. Where images of one
# contrast are taken for two, matching costs time but no accuracy.
SAME = 0.35
# Images of an `agreement` below LITTLE after a quick stiff registration have too little in common for a soft field.
# Pairs of T1 brains have .36 to .47, with noise, thick slices or another contrast of one scanner, too. A patient with a
# tumour and two brains have .28 and .31 (T1), and .14 to .20 (FLAIR, T1 with a contrast agent, T2).
LITTLE = 0.33
RADIUS, REACH = 2, 4.0  # of the windows and of the Gaussian of `agreement`, voxels


def _counted(fixed, moved, weight):
    return ((fixed > 0) & (moved > 0)) * (1.0 if weight is None else weight)


@stored
def correlation(fixed, moved, weight=None):
    """Pearson correlation of two images over the voxels where neither is background.

    `weight` (D, H, W) weights the voxels; None gives each the weight 1.
    """
    w = _counted(fixed, moved, weight)
    w = w / jnp.maximum(w.sum(), 1)
    a, b = (x - (w * x).sum() for x in (fixed, moved))
    return (w * a * b).sum() * jax.lax.rsqrt(jnp.maximum((w * a * a).sum() * (w * b * b).sum(), 1e-12))


@stored
def local_agreement(fixed, moved, weight=None):
    """How much two images have in common around each voxel, in [0, 1]: (D, H, W).

    It is the squared correlation over the 5^3 voxels around a voxel, and 0 where the correlation is negative. Only
    voxels where neither image is background count, times `weight`; elsewhere it is 0. The images are on a grid of about
    2 mm.
    """
    w = _counted(fixed, moved, weight)
    number = jnp.maximum(box_mean(w, RADIUS), 1e-3)
    f, m, ff, mm, fm = (box_mean(w * x, RADIUS) / number
                        for x in (fixed, moved, fixed * fixed, moved * moved, fixed * moved))
    variances = jnp.maximum(ff - f * f, 0) * jnp.maximum(mm - m * m, 0)
    return jnp.clip(w * jnp.maximum(fm - f * m, 0) ** 2 / (variances + 1e-6), 0, 1)


@stored
def agreement(fixed, moved, weight=None):
    """How much two images have in common, in [0, 1]: the median of `local_agreement` over the brain.

      G * cc / (G * w)    cc the local agreement, G a Gaussian of 4 voxels

    w is 1 where neither image is background, times `weight`, and the median is over these voxels. The images are on a
    grid of about 2 mm.
    """
    w, cc = _counted(fixed, moved, weight), local_agreement(fixed, moved, weight)
    near, weights = (gaussian_smooth(x[..., None], REACH)[..., 0] for x in (cc, w))
    return jnp.nanmedian(jnp.where(w > 0, near / jnp.maximum(weights, 1e-3), jnp.nan))


@stored
def conditional_mean(fixed, moved, weight=None):
    """E[fixed | moved = m] at the `BINS` values m from 0 to 1, over the voxels where neither image is background.

    Voxels of neighbouring values count with the weight (1 + (distance / WIDTH)^2)^-3, distance in bins. A value that
    hardly occurs thus gets the mean of the nearest values that do. `weight` is as in `correlation`.
    """
    w = _counted(fixed, moved, weight)
    place = moved * (BINS - 1)
    below = jnp.clip(place.astype(int), 0, BINS - 2)
    part = place - below

    def summed(x):
        return jnp.zeros(BINS).at[below.ravel()].add((x * (1 - part)).ravel()).at[below.ravel() + 1].add(
            (x * part).ravel())

    distance = jnp.arange(BINS)[:, None] - jnp.arange(BINS)
    kernel = (1 + (distance / WIDTH) ** 2) ** -3.0
    return (kernel @ summed(w * fixed)) / jnp.maximum(kernel @ summed(w), 1e-12)


@stored
def recoloured(image, curve):
    """curve(image), with `curve` (BINS,) as `conditional_mean` returns it. Background stays 0."""
    return jnp.where(image > 0, jnp.interp(image, jnp.linspace(0, 1, len(curve)), curve), 0)


@stored
def _curve(fixed, moving, u, weights):
    weight = None
    if weights is not None:
        weight = jnp.minimum(weights[0], warp(weights[1], u))[..., 0]
    return conditional_mean(fixed, warp(moving[..., None], u)[..., 0], weight)


def matched(register, fixed, moving, weights=None):
    """The moving image with the values of the fixed image, for a method that registers images of one contrast.

    Args:
      register: function (fixed, moving) -> u (D, H, W, 3) in voxels. It is called `PASSES` - 1 times. The caller runs
        the last pass, with the image that is returned here.
      fixed, moving: (D, H, W) in [0, 1], with background 0.
      weights: (fixed, moving), (D, H, W, 1) each, 0 where an image does not count.

    Returns:
      The moving image (D, H, W) with new values, on its own grid.
    """
    seen = recoloured(moving, _curve(fixed, moving, jnp.zeros((*fixed.shape, 3)), weights))
    for _ in range(PASSES - 1):
        seen = recoloured(moving, _curve(fixed, moving, register(fixed, seen), weights))
    return seen
