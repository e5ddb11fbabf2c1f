"""The Demons algorithm as plain functions: force -> smooth -> exponentiate -> update, coarse to fine.

The forces are in `forces.py`. Fields are (..., D, H, W, 3) or (..., H, W, 2), in voxels of their own grid.

References: Thirion, "Image matching as a diffusion process", 1998; Vercauteren et al., "Diffeomorphic demons", 2009.
"""

import jax.numpy as jnp

from drivenmorph_jax.demons.classical import FORCES, PATIENCE, demons
from drivenmorph_jax.demons.forces import masked
from drivenmorph_jax.fields.inverse import coarse_inverse
from drivenmorph_jax.fields.unfold import unfolded

# What 5 more iterations must gain at least for `refine` to have anything to refine: on real brains, what has converged
# gains .1 to .2 % of local correlation's energy, .6 to 1.2 % of a squared difference's, what has not .4 and 20 %.
SETTLED = {"lncc": 3e-3, "intensity": 2e-2, "mind": 2e-2}


def registered(fixed, moving, force="lncc", weights=None):
    """Register two images from nothing by a name of `FORCES`: `demons` with its settings; for "lncc" more than that.

    Local correlation ends in one optimum or another, by where it starts, and their errors differ. So it goes on from
    each of the `FORCES` at a quarter of the resolution, to half of it, both from F to M and from M to F; the mean of
    these six displacements, of the inverse of those from M to F, is carried on to the end.

    Args:
      fixed, moving: (*space, 1), values of about 0 to 1, sides multiples of `MULTIPLE`.
      weights: as in `refine`.

    Returns:
      The displacement (*space, n), in voxels, `unfolded`.
    """
    if force != "lncc":
        return unfolded(_by(force, fixed, moving, weights).u)

    def start(name, fixed, moving, weights):
        u = _by(name, fixed, moving, weights, iterations=(100, 0, 0)).u
        return _by("lncc", fixed, moving, weights, u, iterations=(50, 0)).u

    swapped = moving, fixed, None if weights is None else weights[::-1]
    there = sum(start(name, fixed, moving, weights) for name in FORCES)
    # They are no finer than that, and nor is the mean.
    back = sum(coarse_inverse(start(name, *swapped), stride=4, steps=0) for name in FORCES)
    u = (there + back) / (2 * len(FORCES))
    return unfolded(_by("lncc", fixed, moving, weights, u, iterations=(20, 20)).u)


def refine(fixed, moving, u, steps, weights=None, force="lncc"):
    """Carry a registration further: up to `steps` iterations of `demons` at full resolution, where they find anything.

    A start that has converged is returned: one from which the mean energy e of iterations 6 to 10 lies less than
    SETTLED[force] min(e, 1 - e) below that of the first five. What is left is then noise, which labels follow to the
    worse as often as to the better. (1 - e is the mean local correlation, to which an empty background adds nothing, as
    it adds nothing to a mean squared difference.) With fewer than 10 steps there is nothing to compare, and they are
    taken.

    Args:
      fixed, moving: (*space, 1), values of about 0 to 1, sides even.
      u: (*space, n) displacement to start from, in voxels.
      weights: (fixed, moving), (*space, 1) each, 0 where an image does not count; None where all of both does.
      force: a name of `FORCES`.

    Returns:
      The displacement (*space, n), `unfolded`.
    """
    found = _by(force, fixed, moving, weights, u, iterations=(steps,))
    if steps >= 2 * PATIENCE:
        first, second = (found.energies[0][k:k + PATIENCE].mean() for k in (0, PATIENCE))
        settled = first - second <= SETTLED[force] * jnp.minimum(first, 1 - first)
        return unfolded(jnp.where(settled, u, found.u))
    return unfolded(found.u)


def _by(name, fixed, moving, weights=None, u=None, **changes):
    features, settings = FORCES[name]
    images, driven = weighted((features(fixed), features(moving)), weights, settings["force"])
    return demons(*images, **settings | {"force": driven} | changes, initial=u)


def weighted(features, weights, force):
    """Features (*space, C) of both images and a force, as `demons` takes them, with weights as `refine` takes them."""
    if weights is None:
        return features, force
    return tuple(jnp.concatenate(pair, -1) for pair in zip(features, weights, strict=True)), masked(force)
