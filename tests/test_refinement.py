import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from drivenmorph_jax import demons
from drivenmorph_jax.evaluation import metrics
from drivenmorph_jax.fields.inverse import coarse_inverse
from drivenmorph_jax.fields.smooth import gaussian_smooth
from drivenmorph_jax.network.refinement import SIGMA, refined

SHAPE = (2, 16, 20, 16)


def images(seed=0):
    pair = gaussian_filter(np.random.default_rng(seed).random((2, *SHAPE)), (0, 0, 1.5, 1.5, 1.5))
    return jnp.asarray((pair - pair.min()) / np.ptp(pair), jnp.float32)


def by_brightness(fixed, moving, weights):
    """A network that goes along the last axis by what the moving image is brighter, its inverse, and more."""
    u = (moving.mean((1, 2, 3)) - fixed.mean((1, 2, 3)))[:, None, None, None, None] * jnp.array([0, 0, 1.0])
    u = jnp.broadcast_to(u, (*fixed.shape, 3))
    return u, -0.5 * u, fixed, moving


def blind(fixed, moving, weights):
    return jnp.zeros((*fixed.shape, 3)), jnp.zeros((*fixed.shape, 3))


def test_both_ways_are_averaged_and_the_network_looks_at_what_is_left():
    # Sums of these numbers are exact: Demons would lengthen what rounding leaves in a flat image.
    fixed, moving = jnp.full(SHAPE, 0.25), jnp.full(SHAPE, 0.75)
    u, u_inverse, *found = refined(by_brightness, fixed, moving, 3)  # Demons finds nothing in flat images
    # One way .5, and the inverse of the other .25; then .5 again.
    np.testing.assert_allclose(u[..., 2], 0.875, atol=1e-5)
    np.testing.assert_allclose(u_inverse[..., 2], -0.875, atol=1e-5)
    np.testing.assert_array_equal(u[..., :2], 0)
    for x, y in zip(found, (fixed, moving), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("pairs", [1, 2])
def test_of_a_network_that_finds_nothing_demons_is_left(pairs):
    fixed, moving = images()[:, :pairs]
    u, u_inverse = refined(blind, fixed, moving, 4)
    for k in range(pairs):
        expected = demons.refine(fixed[k, ..., None], moving[k, ..., None], jnp.zeros((*SHAPE[1:], 3)), 4)
        assert np.abs(expected).max() > 0.5
        expected = gaussian_smooth(expected, SIGMA)
        np.testing.assert_allclose(u[k], expected, atol=1e-4)
        np.testing.assert_allclose(u_inverse[k], coarse_inverse(expected, steps=8), atol=1e-3)


def test_weights_go_with_their_images():
    def told(fixed, moving, weights):
        """The difference of the weights' means, which swapped ones have with the other sign."""
        u = (weights[..., 0] - weights[..., 1]).mean((1, 2, 3))[:, None, None, None, None] * jnp.array([0, 0, 1.0])
        return jnp.broadcast_to(u, (*fixed.shape, 3)), jnp.broadcast_to(-u, (*fixed.shape, 3))

    flat = jnp.full(SHAPE, 0.5)
    u, _ = refined(told, flat, flat, 2, jnp.stack([jnp.ones(SHAPE), jnp.full(SHAPE, 0.75)], -1))
    np.testing.assert_allclose(u[..., 2], 0.5, atol=1e-5)


def test_nothing_folds_after_a_network_that_folds():
    field = 3 * jnp.asarray(np.random.default_rng(0).normal(size=(*SHAPE, 3)), jnp.float32)

    def wild(fixed, moving, weights):
        return field, field

    u, _ = refined(wild, *images(), 2)
    assert min(metrics.jacobian(np.asarray(x)).min() for x in u) > 0
