from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from drivenmorph_jax.data import augmentation


def augmented(batch, **settings):
    return jax.jit(partial(augmentation.augmented, **settings))(batch)


CHANGES = [augmentation.change_contrast, augmentation.add_bias, augmentation.add_noise]


def brain(shape=(20, 24, 18)):
    image = ndimage.gaussian_filter(np.random.default_rng(0).random(shape), 2)
    image = ((image - image.min()) / np.ptp(image)).astype(np.float32)
    image[:4] = 0
    return image


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("strength", [0.1, 1.0])
def test_changes_keep_range_background_and_type(change, strength):
    image = brain()
    changed, again = (np.asarray(change(image, jax.random.key(3), strength)) for _ in range(2))
    assert changed.dtype == np.float32 and changed.min() >= 0 and changed.max() <= 1
    assert not changed[:4].any() and not np.array_equal(changed, image)
    np.testing.assert_array_equal(changed, again)
    assert not np.array_equal(changed, change(image, jax.random.key(4), strength))


def test_bias_is_smooth_and_of_the_stated_strength():
    image = np.full((20, 24, 18), 0.1, np.float32)
    log = np.log(augmentation.add_bias(image, jax.random.key(1), 0.2) / image)
    assert log.std() == pytest.approx(0.2, rel=1e-3)
    for axis, n in enumerate(image.shape):
        # A cosine of one period along the axis has the slope 2 pi / n; the sum over the others is no steeper.
        assert np.gradient(log, axis=axis).std() < 0.2 * 2 * np.pi / n


def test_noise_is_rician():
    image = np.full((40, 40, 40), 0.3, np.float32)
    noisy = augmentation.add_noise(image, jax.random.key(1), 0.05)
    # The second moment of a Rician variable is nu^2 + 2 sigma^2.
    assert (noisy**2).mean() == pytest.approx(0.3**2 + 2 * 0.05**2, rel=5e-3)
    assert noisy.std() == pytest.approx(0.05, rel=0.03)


def test_an_affine_is_scipys_and_moves_labels_alike_and_its_mean_is_the_identity():
    image = brain()
    affine = np.asarray(augmentation.random_affine(jax.random.key(1), 0.05))
    labels = (image > 0.5).astype(np.int32)
    centre = (np.array(image.shape) - 1) / 2
    offset = centre + affine[:, 3] * centre - affine[:, :3] @ centre
    corner, box = (2, 3, 1), (9, 10, 12)
    for volume, order in ((image, 1), (labels, 0)):
        expected = ndimage.affine_transform(volume, affine[:, :3], offset, order=order)
        moved = jax.jit(augmentation.apply_affine)(volume, affine)
        assert moved.dtype == volume.dtype
        # Without the voxels that lie on the border to within rounding, and labels half way between two of them.
        assert np.mean(np.abs(moved - expected) > 1e-4) < 2e-3
        part = jax.jit(augmentation.apply_affine, static_argnums=3)(volume, affine, corner, box)
        np.testing.assert_allclose(part, moved[tuple(slice(i, i + n) for i, n in zip(corner, box, strict=True))],
                                   atol=1e-5)
    np.testing.assert_allclose(jax.jit(augmentation.apply_affine)(image, np.eye(3, 4)), image, atol=1e-6)
    draw = jax.jit(lambda seed: augmentation.random_affine(jax.random.key(seed), 0.05))
    draws = [draw(seed) for seed in range(400)]
    np.testing.assert_allclose(np.mean(draws, 0), np.eye(3, 4), atol=0.012)
    np.testing.assert_allclose(np.std(draws, 0), 0.05, rtol=0.15)


def batch(image, labels=None, count=40):
    """`count` pairs of the same image."""
    made = {role: np.repeat(image[None, ..., None], count, 0) for role in ("fixed", "moving")}
    if labels is not None:
        made |= {f"{role}_labels": np.repeat(labels[None], count, 0) for role in ("fixed", "moving")}
    return made | {"key": np.random.default_rng(0).integers(2**32, size=(count, 2), dtype=np.uint32)}


def test_nothing_asked_for_is_nothing_changed():
    image = brain()
    found = augmented(batch(image, count=2))
    assert set(found) == {"fixed", "moving"}
    np.testing.assert_array_equal(found["moving"][1, ..., 0], image)


def test_flip_mirrors_both_images_and_their_labels():
    half = np.zeros((4, 6, 4), np.int32)
    half[0] = 1
    found = augmented(batch(half.astype(np.float32), half, 60), flip=True)
    mirrored = np.asarray(found["fixed"][:, -1, 0, 0, 0]) > 0
    np.testing.assert_array_equal(mirrored, found["moving"][:, -1, 0, 0, 0] > 0)
    assert 15 < mirrored.sum() < 45
    for role in ("fixed", "moving"):
        np.testing.assert_array_equal(found[role][..., 0] > 0, found[f"{role}_labels"] == 1)


def test_intensity_changes_are_monotone_and_differ_between_images():
    ramp = np.broadcast_to(np.linspace(0, 0.5, 4, dtype=np.float32)[:, None, None], (4, 6, 4))
    found = augmented(batch(ramp, count=8), intensity=0.1)
    for role in ("fixed", "moving"):
        line = found[role][:, :, 0, 0, 0]
        assert (np.diff(line, axis=1) > 0).all() and line.min() == 0 and line.max() <= 1
    change = np.stack([found["fixed"][:, -1, 0, 0, 0], found["moving"][:, -1, 0, 0, 0]])
    assert len(np.unique(change)) == 16 and 0.02 < change.std() < 0.15  # about .1 * .5 * sqrt(1 + log(2)^2)


def test_a_change_that_is_left_out_leaves_the_others_as_they_are():
    image = brain()
    one, both = (augmented(batch(image, count=3), **settings)["moving"] for settings in (
        {"intensity": 0.2}, {"intensity": 0.2, "bias": 1e-9, "affine": 1e-9}))
    inside = (slice(None), *(slice(1, -1),) * 3)
    np.testing.assert_allclose(one[inside], both[inside], atol=1e-5)


@pytest.mark.parametrize("affine", [0.0, 1e-9])
def test_crop_takes_the_same_box_of_both_images_and_their_labels(affine):
    labels = np.arange(6 * 8 * 4, dtype=np.int32).reshape(6, 8, 4)
    found = jax.device_get(augmented(batch(labels.astype(np.float32) / labels.size, labels, 60), crop=(4, 3, 0),
                                     affine=affine))
    assert found["fixed"].shape == (60, 4, 3, 4, 1)
    corners = set()
    # Without the faces: of those of the whole image an affine makes zeros.
    inner = (slice(1, -1),) * 3
    for k in range(60):
        corner = np.array(np.unravel_index(found["fixed_labels"][k, 1, 1, 1], labels.shape)) - 1
        corners.add(tuple(corner.tolist()))
        box = tuple(slice(start + 1, start + n - 1) for start, n in zip(corner, (4, 3, 4), strict=True))
        for role in ("fixed", "moving"):
            np.testing.assert_array_equal(found[f"{role}_labels"][k][inner], labels[box])
            np.testing.assert_allclose(found[role][k][inner][..., 0], labels[box] / labels.size, atol=1e-6)
    assert {corner[0] for corner in corners} == {0, 1, 2} and {corner[1] for corner in corners} == set(range(6))
    assert {corner[2] for corner in corners} == {0}


def test_a_pair_is_changed_the_same_in_any_batch():
    whole = batch(brain(), count=4)
    settings = {"crop": (8, 8, 8), "flip": True, "affine": 0.05, "intensity": 0.2, "bias": 0.2, "noise": 0.05}
    together = augmented(whole, **settings)
    alone = augmented(jax.tree.map(lambda x: jnp.asarray(x[2:3]), whole), **settings)
    np.testing.assert_allclose(alone["moving"][0], together["moving"][2], atol=1e-6)
