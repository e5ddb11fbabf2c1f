"""Demons from several starting points, and the refinement of a given displacement by Demons."""

import chex
import jax
import jax.numpy as jnp

from drivenmorph_jax.demons.classical import FORCES, PATIENCE, STIFF, demons
from drivenmorph_jax.demons.forces import Force, masked
from drivenmorph_jax.fields.grid import padded_pool, resize, resize_field
from drivenmorph_jax.fields.inverse import coarse_inverse, inverse
from drivenmorph_jax.fields.unfold import unfolded
from drivenmorph_jax.runtime.stored import stored

# `refine` counts a start as converged where 5 more iterations lower the energy by no more than this fraction. On real
# brains, a converged start gains .1 to .2 % of the energy of local correlation and .6 to 1.2 % of that of a squared
# difference. A start that has not converged gains .4 % and 20 %.
SETTLED = {"lncc": 3e-3, "intensity": 2e-2, "mind": 2e-2}


def registered(fixed: chex.Array, moving: chex.Array, force: str = "lncc",
               weights: tuple[chex.Array, chex.Array] | None = None) -> jax.Array:
    """Register two images by Demons with the settings of a name of `FORCES`; "lncc" uses several starting points.

    Local correlation converges to different optima from different starting points, and these optima have different
    errors. "lncc" therefore averages over starting points, in three steps:

    1. At a quarter of the resolution, each of the `FORCES` registers the images forward and backward.
    2. Local correlation continues from each of the six results at half the resolution. The displacements of the
       backward registrations are inverted.
    3. Local correlation continues from the mean of the six displacements to the full resolution.

    Args:
      fixed, moving: (*space, 1), with values of about 0 to 1. The sides are multiples of `MULTIPLE`.
      force: a name of `FORCES`.
      weights: as in `refine`.

    Returns:
      The displacement (*space, n), in voxels, after `unfolded`.
    """
    if force != "lncc":
        return unfolded(_by(force, fixed, moving, weights).u)

    def halves(pair):
        return None if pair is None else tuple(_pooled(x, 2, 1) for x in pair)

    half = {name: halves(_features(name, fixed, moving)) for name in FORCES}
    half_weights = halves(weights)

    def start(name, way):  # 1: forward, -1: backward; at half the resolution, as its result
        driven = None if weights is None else half_weights[::way]
        u = _run(name, half[name][::way], driven, iterations=(100, 0)).u
        return _run("lncc", half["lncc"][::way], driven, u, iterations=(50,)).u

    there = sum(start(name, 1) for name in FORCES)
    # The grid of these fields and of their mean is 4 times coarser than the images, so no finer inverse is needed.
    back = sum(coarse_inverse(start(name, -1), steps=0) for name in FORCES)
    u = _unpooled((there + back) / (2 * len(FORCES)), 2, fixed.shape[:-1])
    return unfolded(_by("lncc", fixed, moving, weights, u, iterations=(20, 20)).u)


def refine(fixed: chex.Array, moving: chex.Array, u: chex.Array, steps: int,
           weights: tuple[chex.Array, chex.Array] | None = None, force: str = "lncc") -> jax.Array:
    """Refine a displacement by up to `steps` iterations of `demons` at full resolution.

    A start that has converged is not changed. The test compares the mean energy e of the first five iterations with the
    mean energy e' of iterations 6 to 10. The start has converged where

      e - e' <= SETTLED[force] min(e, 1 - e)

    The remaining changes are then noise, and the overlap of labels falls as often as it rises. For local correlation,
    1 - e is the mean correlation. An empty background adds nothing to it, and nothing to a mean squared difference.
    With fewer than 10 steps there is nothing to compare, and all of them are kept.

    Args:
      fixed, moving: (*space, 1), with values of about 0 to 1. The sides are even.
      u: (*space, n) displacement to start from, in voxels.
      steps: largest number of iterations.
      weights: (fixed, moving), (*space, 1) each, 0 where an image does not count. None if every voxel of both counts.
      force: a name of `FORCES`.

    Returns:
      The displacement (*space, n), in voxels, after `unfolded`.
    """
    found = _by(force, fixed, moving, weights, u, iterations=(steps,))
    if steps >= 2 * PATIENCE:
        first, second = (found.energies[0][k:k + PATIENCE].mean() for k in (0, PATIENCE))
        settled = first - second <= SETTLED[force] * jnp.minimum(first, 1 - first)
        return unfolded(jnp.where(settled, u, found.u))
    return unfolded(found.u)


def registered_stiffly(fixed: chex.Array, moving: chex.Array, factor: int = 2,
                       weights: tuple[chex.Array, chex.Array] | None = None, quick: bool = False) -> jax.Array:
    """Register two images by local correlation with a stiff field, for images that have little in common.

    Such images, for example a clinical scan of a patient and an atlas, correlate weakly. What a softer field finds in
    them is mostly noise. The images are pooled, and the field lies on their grid (`STIFF`). The result is the mean of
    the forward registration and of the inverse of the backward one, whose errors differ.

    Args:
      fixed, moving: (*space, 1), with values of about 0 to 1.
      factor: of the pooling. A grid of 2 mm suits human brains.
      weights: as in `refine`.
      quick: forward only, and without the finest level.

    Returns:
      The displacement (*space, n), in voxels, after `unfolded`.
    """
    multiple = 2 ** (len(STIFF["iterations"]) - 1)

    images, weights = (None if pair is None else tuple(_pooled(x, factor, multiple) for x in pair)
                       for pair in ((fixed, moving), weights))

    def one_way(images, weights, **changes):
        images, driven = weighted(images, weights, STIFF["force"])
        return demons(*images, **STIFF | {"force": driven} | changes).u

    if quick:
        u = one_way(images, weights, iterations=(*STIFF["iterations"][:-1], 0))
    else:
        back = one_way(images[::-1], None if weights is None else weights[::-1])
        u = (one_way(images, weights) + inverse(back)) / 2
    return unfolded(_unpooled(u, factor, fixed.shape[:-1]))


@stored(static_argnames=("factor", "multiple"))
def _pooled(x, factor, multiple):
    return padded_pool(x, factor, multiple, x.ndim - 1)


@stored(static_argnames=("factor", "space"))
def _unpooled(u, factor, space):
    return resize_field(u, [n * factor for n in u.shape[:-1]])[tuple(map(slice, space))]


@stored(static_argnames="force")
def force_between(fixed: chex.Array, moving: chex.Array, force: str = "lncc",
                  weights: tuple[chex.Array, chex.Array] | None = None) -> jax.Array:
    """The force (*space, n) by which Demons would begin, in voxels: that of a name of `FORCES`, on the images' grid.

    The arguments are those of `registered`.
    """
    _, settings = FORCES[force]
    images, driven = weighted(_features(force, fixed, moving), weights, settings["force"])
    return resize(driven(*images, settings["max_step"])[0], fixed.shape[:-1])


def _by(name, fixed, moving, weights, u=None, **changes):
    return _run(name, _features(name, fixed, moving), weights, u, **changes)


def _features(name, fixed, moving):
    features, _ = FORCES[name]
    return features(fixed), features(moving)


def _run(name, features, weights, u=None, **changes):
    _, settings = FORCES[name]
    images, driven = weighted(features, weights, settings["force"])
    return demons(*images, **settings | {"force": driven} | changes, initial=u)


def weighted(features: tuple[chex.Array, chex.Array], weights: tuple[chex.Array, chex.Array] | None,
             force: Force) -> tuple[tuple[chex.Array, chex.Array], Force]:
    """The images and the force that `demons` takes, from features (*space, C) of both images and their weights.

    The weights, in the form that `refine` takes, become the last channel of each image, and the force is `masked`.
    Without weights, the features and the force are returned unchanged.
    """
    if weights is None:
        return features, force
    return tuple(jnp.concatenate(pair, -1) for pair in zip(features, weights, strict=True)), masked(force)
