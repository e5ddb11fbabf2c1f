"""Foreground and scaling do not depend on the offset and the sign of the intensities."""

import numpy as np
import pytest
from scipy import ndimage

from drivenmorph_jax.images.intensity import anchored, background, foreground, normalise


def brain(shape=(30, 32, 28)):
    """(image with background 0 and tissue from .15 to 1, its tissue)."""
    x = np.moveaxis(np.indices(shape), 0, -1) - np.array(shape) / 2
    inside = np.linalg.norm(x / np.array(shape), axis=-1) < 0.4
    texture = ndimage.gaussian_filter(np.random.default_rng(0).random(shape), 2)
    texture = (texture - texture.min()) / np.ptp(texture)
    return np.where(inside, 0.15 + 0.85 * texture, 0).astype(np.float32), inside


IMAGE, INSIDE = brain()
MEAN, STD = IMAGE[INSIDE].mean(), IMAGE[INSIDE].std()
CHANGES = {
    "z-scored, background 0": lambda x, inside: np.where(inside, (x - MEAN) / STD, 0),
    "z-scored, background too": lambda x, inside: (x - MEAN) / STD,
    "offset 1000": lambda x, inside: 1000 + 500 * x,
    "offset -1024": lambda x, inside: 500 * x - 1024,
    "negative": lambda x, inside: np.where(inside, x - 2, 0),
    "white background": lambda x, inside: np.where(inside, 200 * x, 255),
    "near the largest number": lambda x, inside: np.where(inside, 6e38 * (x.astype(float) - 0.5), 0),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_foreground_is_the_tissue_whatever_the_offset_and_sign(kind):
    data = CHANGES[kind](IMAGE, INSIDE).astype(np.float32)
    shifted = anchored(data)
    assert not shifted[~INSIDE].any() and shifted.min() == 0 and np.isfinite(shifted).all()
    assert np.mean(foreground(shifted) == INSIDE) > 0.99
    scaled = normalise(shifted)
    assert scaled.dtype == np.float32 and scaled.max() == 1
    order = np.corrcoef(scaled[INSIDE], IMAGE[INSIDE])[0, 1]
    assert order > 0.99  # shifted, never inverted
    np.testing.assert_array_equal(anchored(shifted), shifted)


def test_what_has_tissue_above_and_background_at_or_below_0_is_unchanged():
    ringing = IMAGE.copy()
    ringing[INSIDE ^ ndimage.binary_dilation(INSIDE)] = -0.05
    noise = np.abs(np.random.default_rng(0).normal(size=IMAGE.shape)).astype(np.float32)
    padded = np.where(INSIDE, 500 * IMAGE, -1024).astype(np.float32)
    for data in (IMAGE, ringing, noise, noise - 0.02, padded):
        assert anchored(data) is data


def test_a_head_without_a_constant_background_begins_at_its_darkest_voxels():
    head = np.where(INSIDE, 3 + IMAGE, 0.1 * np.random.default_rng(0).random(IMAGE.shape)).astype(np.float32) - 2
    assert background(head) is None
    assert np.mean(foreground(anchored(head)) == INSIDE) > 0.99
