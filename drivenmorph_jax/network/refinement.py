"""A network's registration carried further: both ways, by Demons, and by the network again on what is left."""

from functools import partial

import jax
import jax.numpy as jnp

from drivenmorph_jax import demons
from drivenmorph_jax.fields.inverse import coarse_inverse
from drivenmorph_jax.fields.smooth import gaussian_smooth
from drivenmorph_jax.fields.unfold import unfolded
from drivenmorph_jax.fields.warp import compose, warp

LEFT = 2  # times that the network is asked for what is left
SIGMA = 0.7  # voxels


def refined(network, fixed, moving, steps, weights=None):
    """phi = G * (psi o D o psi_1 o psi_2): psi by the network both ways, D by Demons after it, psi_1 and psi_2 by the
    network on what is left, G a Gaussian of .7 voxels.

    Both ways: the mean of u(F, M) and of the inverse that comes with u(M, F). On what Demons leaves the network finds
    more than further iterations would (docs/method.md has the numbers).

    Args:
      network: function (fixed, moving, weights) -> (u, u_inverse, what else it found), u (B, D, H, W, 3) in voxels.
      fixed, moving: (B, D, H, W).
      steps: iterations of `demons.refine`.
      weights: (B, D, H, W, 2), 0 where the fixed or the moving image does not count; or None.

    Returns:
      u and u_inverse, J > 0 everywhere, and what else the network found between the images as they came.
    """
    def by_demons(u):
        def one(fixed, moving, u, weights):
            weights = None if weights is None else (weights[..., :1], weights[..., 1:])
            return demons.refine(fixed[..., None], moving[..., None], u, steps, weights)
        return _each(one, fixed, moving, u, weights)

    def look(u, number):
        """Both ways first, numbers 0 and 1, then what is left."""
        along = jnp.where(number < 2, 0, u)
        warped, counted = warp(moving[..., None], along)[..., 0], None
        if weights is not None:
            counted = jnp.concatenate([weights[..., :1], warp(weights[..., 1:], along)], -1)
        swapped = warped, fixed, None if weights is None else counted[..., ::-1]
        way = jax.tree.map(lambda x, y: jnp.where(number == 1, y, x), (fixed, warped, counted), swapped)
        there, back, *found = network(*way)
        return jax.lax.switch(jnp.minimum(number, 2), [
            lambda: there, lambda: by_demons(0.5 * (u + back)), lambda: compose(u, there)]), found

    # A loop: the network is compiled once.
    u, found = jax.lax.scan(look, jnp.zeros((*fixed.shape, 3)), jnp.arange(2 + LEFT))
    u = _each(unfolded, gaussian_smooth(u, SIGMA))
    return u, _each(partial(coarse_inverse, steps=8), u), *jax.tree.map(lambda x: x[0], found)


def _each(function, *arrays):
    """vmap of a function whose loop ends by itself; which would go over its state once more, so one alone is spared."""
    if len(arrays[0]) > 1:
        return jax.vmap(function)(*arrays)
    return function(*(None if x is None else x[0] for x in arrays))[None]
