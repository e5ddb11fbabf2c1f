import numpy as np
import pytest
from scipy import ndimage

from drivenmorph_jax.images.contrast import agreement, local_agreement
from drivenmorph_jax.registration.confidence import CONFIDENCE, WITHIN, confidence, uncertainty


def brains(shape=(42, 37, 40)):
    """An image with background 0, and its places as (*shape, 3)."""
    rng, places = np.random.default_rng(0), np.moveaxis(np.indices(shape), 0, -1)
    image = 0.5 + 4 * ndimage.gaussian_filter(rng.normal(size=shape), 2).clip(-0.1, 0.1)
    inside = np.linalg.norm(places - (np.array(shape) - 1) / 2, axis=-1) < 16
    return np.where(inside, image, 0).astype(np.float32), places


def test_local_agreement_is_the_squared_correlation_of_the_voxels_around():
    rng = np.random.default_rng(1)
    a, b = rng.uniform(0.1, 1, (2, 12, 12, 12)).astype(np.float32)
    b = (a + b) / 2
    place = 5, 6, 7
    around = tuple(slice(x - 2, x + 3) for x in place)
    r = np.corrcoef(a[around].ravel(), b[around].ravel())[0, 1]
    assert np.asarray(local_agreement(a, b))[place] == pytest.approx(r**2, abs=1e-3)
    assert 0.1 < agreement(a, b) < 1


def test_confidence_is_one_where_one_scale_relates_the_images_and_low_where_nothing_does():
    image, places = brains()
    lesion = np.linalg.norm(places - [28, 18, 20], axis=-1) < 7
    other = np.where(lesion & (image > 0), np.random.default_rng(2).uniform(0.2, 0.8, image.shape), 0.6 * image)
    other = np.where(image > 0, other, 0).astype(np.float32)
    found = confidence(image, other, spacing=1.0)
    depth = ndimage.distance_transform_edt(image > 0)
    assert found.shape == image.shape and found.min() >= 0 and found.max() <= 1
    away = np.linalg.norm(places - [28, 18, 20], axis=-1)
    assert found[(away > 15) & (depth > 2)].min() > 0.9 and found[away < 3].max() < 0.5
    assert not found[ndimage.distance_transform_edt(image == 0) > 4].any()
    # Mirrored images give the mirrored map: the coarse voxels lie where they should. The sides are even here.
    half = [x[:, :36] for x in (image, other)]
    np.testing.assert_allclose(confidence(*(x[::-1] for x in half), 1.0)[::-1], confidence(*half, 1.0), atol=1e-5)


def test_what_a_mask_leaves_out_has_no_confidence():
    image, places = brains()
    weight = (places[..., 0] < 20).astype(np.float32)
    found = confidence(image, image, 1.0, weight)
    assert found[16, 18, 20] > 0.9 and not found[24:].any()


def test_uncertainty_falls_with_confidence_in_millimetres():
    found = uncertainty(np.linspace(0, 1, 50).reshape(2, 25))
    assert found.shape == (2, 25) and (np.diff(found.ravel()) <= 0).all()
    np.testing.assert_allclose(uncertainty(np.array(CONFIDENCE)), WITHIN)
