import jax.numpy as jnp
import numpy as np
from scipy.ndimage import gaussian_filter

from drivenmorph_jax.images.bias import MEAN_FLOOR, balanced, differential_bias

SHAPE, CELL = (48, 64, 40), 8


def brain(seed=0):
    """A textured ellipsoid in [0, .7] on a background of 0, (1, D, H, W, 1)."""
    texture = gaussian_filter(np.random.default_rng(seed).random(SHAPE), 1.5)
    place = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij"))
    image = np.where((place**2).sum(0) < 0.8, 0.2 + 0.5 * (texture - texture.min()) / np.ptp(texture), 0)
    return jnp.asarray(image, jnp.float32)[None, ..., None]


def gain(strength):
    """exp of a cosine of half a period along the second axis, strength its amplitude."""
    wave = strength * np.cos(np.pi * (np.arange(SHAPE[1]) + 0.5) / SHAPE[1])
    return jnp.asarray(np.exp(wave), jnp.float32)[:, None, None]


def test_a_factor_is_found():
    image = brain()
    inside = image > 0
    r = differential_bias(image, 0.7 * image, CELL)
    # The floor counts where a cell is mostly background.
    mean = 0.45 * np.asarray(inside).reshape(6, 8, 8, 8, 5, 8).mean((1, 3, 5)).max()
    np.testing.assert_allclose(np.median(r[inside]), -np.log(0.7), atol=MEAN_FLOOR / mean)
    a, b = balanced(image, 0.7 * image, CELL)
    np.testing.assert_allclose(a[inside] / b[inside], 1, atol=0.1)
    np.testing.assert_allclose(a[inside], np.sqrt(0.7) * image[inside], rtol=0.05)


def test_a_smooth_field_is_mostly_taken_away():
    image = brain()
    biased, inside = image * gain(0.3), image > 0
    a, b = balanced(image, biased, CELL)
    before, after = (float(jnp.log(x[inside] / y[inside]).std()) for x, y in ((image, biased), (a, b)))
    assert before > 0.15 and after < before / 2.5


def test_swapped_images_are_balanced_alike_and_equal_ones_stay():
    a, b = brain(0), brain(1) * gain(0.2)
    for x, y in zip(balanced(a, b, CELL), balanced(b, a, CELL)[::-1], strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    for x in balanced(a, a, CELL):
        np.testing.assert_array_equal(x, a)


def test_what_does_not_count_says_nothing():
    image = brain()
    lesion = (slice(None), slice(16, 28), slice(24, 36), slice(12, 24))
    weights = jnp.ones((1, *SHAPE, 2)).at[(*lesion, 1)].set(0)
    bright = image.at[lesion].set(1.0)
    assert np.abs(differential_bias(image, bright, CELL)).max() > 0.1
    np.testing.assert_array_equal(differential_bias(image, bright, CELL, weights), 0)


def test_what_is_no_pair_of_brains_stays_as_it_is():
    empty, image = jnp.zeros((1, *SHAPE, 1)), brain()
    for x, y in ((empty, image), (image, empty), (empty, empty)):
        for before, after in zip((x, y), balanced(x, y, CELL), strict=True):
            np.testing.assert_array_equal(before, after)
