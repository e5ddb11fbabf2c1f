import numpy as np
import pytest
from scipy import ndimage

from drivenmorph_jax.data import augmentation

CHANGES = [augmentation.change_contrast, augmentation.add_bias, augmentation.add_noise]


def brain(shape=(20, 24, 18)):
    image = ndimage.gaussian_filter(np.random.default_rng(0).random(shape), 2)
    image = ((image - image.min()) / np.ptp(image)).astype(np.float32)
    image[:4] = 0
    return image


@pytest.mark.parametrize("change", CHANGES)
def test_changes_keep_range_background_and_type_and_draw_as_much_at_any_strength(change):
    image, places = brain(), []
    for strength in (0.0, 0.1, 1.0):
        rng = np.random.default_rng(3)
        changed = change(image, rng, strength)
        assert changed.dtype == np.float32 and changed.min() >= 0 and changed.max() <= 1
        assert not changed[:4].any()
        assert np.array_equal(changed, image) == (strength == 0)
        places.append(rng.random())
    assert len(set(places)) == 1


def test_bias_is_smooth_and_of_the_stated_strength():
    image = np.full((20, 24, 18), 0.1, np.float32)
    log = np.log(augmentation.add_bias(image, np.random.default_rng(1), 0.2) / image)
    assert log.std() == pytest.approx(0.2, rel=1e-3)
    for axis, n in enumerate(image.shape):
        # A cosine of one period along the axis has the slope 2 pi / n; the sum over the others is no steeper.
        assert np.gradient(log, axis=axis).std() < 0.2 * 2 * np.pi / n


def test_noise_is_rician():
    image = np.full((40, 40, 40), 0.3, np.float32)
    noisy = augmentation.add_noise(image, np.random.default_rng(1), 0.05)
    # The second moment of a Rician variable is nu^2 + 2 sigma^2.
    assert (noisy**2).mean() == pytest.approx(0.3**2 + 2 * 0.05**2, rel=5e-3)
    assert noisy.std() == pytest.approx(0.05, rel=0.03)


def test_an_affine_moves_images_and_labels_alike_and_its_mean_is_the_identity():
    image = brain()
    affine = augmentation.random_affine(np.random.default_rng(1), 0.05)
    labels = (image > 0.5).astype(np.int32)
    moved = augmentation.apply_affine(labels, affine, 0)
    assert moved.dtype == np.int32 and set(np.unique(moved)) == {0, 1}
    soft = augmentation.apply_affine(labels.astype(np.float32), affine, 1)
    assert 0 < np.mean((soft > 0.5) != moved) + np.mean(labels != moved) and np.mean((soft > 0.5) != moved) < 0.02
    np.testing.assert_array_equal(augmentation.apply_affine(image, np.eye(3, 4), 1), image)
    shifted = augmentation.apply_affine(image, np.eye(3, 4) + [[0, 0, 0, 2 / 9.5], [0] * 4, [0] * 4], 1)
    np.testing.assert_allclose(shifted[4:-4], image[6:-2], atol=1e-5)
    draws = [augmentation.random_affine(np.random.default_rng(k), 0.05) for k in range(400)]
    np.testing.assert_allclose(np.mean(draws, 0), np.eye(3, 4), atol=0.012)
    np.testing.assert_allclose(np.std(draws, 0), 0.05, rtol=0.15)
