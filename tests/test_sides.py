import numpy as np
import pytest
from scipy import ndimage

from drivenmorph_jax.registration.sides import SHAPE, _mean, alike, asymmetry


def brain(strength, seed):
    """A box with the mean asymmetry, `strength` times, and an asymmetry of its own."""
    own = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=SHAPE), 2)
    own = own / np.linalg.norm(own)
    image = np.clip(0.5 + 4 * (strength * _mean().reshape(SHAPE) + own), 0.1, 1)
    return np.pad(np.repeat(np.repeat(np.repeat(image, 3, 0), 3, 1), 3, 2), 8).astype(np.float32)


def test_the_mean_is_the_difference_of_the_two_halves():
    mean = _mean().reshape(SHAPE)
    np.testing.assert_allclose(mean, -mean[::-1], atol=1e-5)
    assert asymmetry(brain(3, 0)) @ _mean() > 0.7


@pytest.mark.parametrize("fixed, moving, sign", [(2, 1, 1), (2, -1, -1), (-2, 1, -1), (-1, -1, 1)])
def test_a_mirrored_brain_and_one_that_is_not_are_told_apart(fixed, moving, sign):
    fixed, moving = brain(fixed, 1), brain(moving, 2)
    assert sign * alike(fixed, moving) > 0.05
    assert sign * alike(fixed, moving[::-1]) < -0.05
    assert alike(fixed, moving) == pytest.approx(alike(moving, fixed))


def test_a_symmetric_brain_raises_no_alarm():
    image = brain(0, 1)
    assert alike(image + image[::-1], brain(1, 2)) == pytest.approx(0, abs=1e-3)
