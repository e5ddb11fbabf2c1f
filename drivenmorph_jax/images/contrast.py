"""Two images of different contrast: the moving one takes the values of the fixed one, as far as it is registered.

Voxel by voxel, m is replaced by E[F | M o phi = m], the mean that the fixed image has where the warped moving one is m;
then the images are registered as two of one contrast, and with the better phi it is done again. Images arrive as
(D, H, W) in [0, 1], their background 0.

Reference: Guimond, Roche, Ayache, Meunier, "Three-dimensional multimodal brain warping using the demons algorithm and
  adaptive intensity corrections", IEEE Transactions on Medical Imaging, 2001.
"""

import jax
import jax.numpy as jnp

from drivenmorph_jax.fields.warp import warp

BINS, WIDTH = 64, 1.5  # values of the curve; their smoothing, in bins
PASSES = 3  # registrations, each with the curve that the one before allows
# 702 pairs of T1 brains, affinely aligned, correlate by .42 and more, one of them inverted by -.45 and less. Images of
# one contrast that are taken as of two cost time and no accuracy.
SAME = 0.35


def _counted(fixed, moved, weight):
    return ((fixed > 0) & (moved > 0)) * (1.0 if weight is None else weight)


@jax.jit
def correlation(fixed, moved, weight=None):
    """Pearson correlation of two images where neither is background; `weight` (D, H, W) counts voxels, 1 if None."""
    w = _counted(fixed, moved, weight)
    w = w / jnp.maximum(w.sum(), 1)
    a, b = (x - (w * x).sum() for x in (fixed, moved))
    return (w * a * b).sum() * jax.lax.rsqrt(jnp.maximum((w * a * a).sum() * (w * b * b).sum(), 1e-12))


@jax.jit
def conditional_mean(fixed, moved, weight=None):
    """E[fixed | moved = m] at the `BINS` values m from 0 to 1, where neither is background; `weight` as above.

    Means of neighbouring values count with (1 + (distance / WIDTH)^2)^-3: a value that hardly occurs gets that of the
    nearest ones that do.
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


@jax.jit
def recoloured(image, curve):
    """curve(image), `curve` as `conditional_mean` returns it; background stays 0."""
    return jnp.where(image > 0, jnp.interp(image, jnp.linspace(0, 1, len(curve)), curve), 0)


@jax.jit
def _curve(fixed, moving, u, weights):
    weight = None
    if weights is not None:
        weight = jnp.minimum(weights[0], warp(weights[1], u))[..., 0]
    return conditional_mean(fixed, warp(moving[..., None], u)[..., 0], weight)


def matched(register, fixed, moving, weights=None):
    """The moving image with the fixed one's values, for a method that registers images of one contrast.

    Args:
      register: function (fixed, moving) -> u (D, H, W, 3) in voxels, called `PASSES` - 1 times: what it returns from
        the image returned here is the last pass.
      fixed, moving: (D, H, W).
      weights: (fixed, moving), (D, H, W, 1) each, 0 where an image does not count.
    """
    seen = recoloured(moving, _curve(fixed, moving, jnp.zeros((*fixed.shape, 3)), weights))
    for _ in range(PASSES - 1):
        seen = recoloured(moving, _curve(fixed, moving, register(fixed, seen), weights))
    return seen
