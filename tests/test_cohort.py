import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy.ndimage import map_coordinates

from drivenmorph_jax.data import embedded_cohort, load, ordered_pairs, true_displacement
from drivenmorph_jax.data.subject import Subject
from drivenmorph_jax.errors import InputError


def config(**changes):
    return ConfigDict(dict(name="embedded", seed=0, shape=(32, 40, 32), spacing=5.0, num_train=3, num_val=2,
                           num_test=2, strength=3.5, smoothness=(16.0, 8.0)) | changes)


@pytest.fixture(scope="module")
def cohort():
    return load(config())


def sample(volume, u, order):
    """SciPy's value of a volume at x + u(x): another's interpolation, to check the convention with."""
    at = np.moveaxis(np.stack(np.indices(volume.shape), -1) + u, -1, 0)
    return map_coordinates(volume, at, order=order, mode="nearest")


def mean_dice(fixed, moving, labels):
    return np.mean([2 * np.sum((fixed == n) & (moving == n)) / (np.sum(fixed == n) + np.sum(moving == n))
                    for n in labels])


def determinant(u):
    gradient = np.stack([np.stack(np.gradient(u[..., a]), -1) for a in range(3)], -2)
    return np.linalg.det(np.eye(3) + gradient)


def test_subjects_are_images_with_labels_on_the_working_grid(cohort):
    for subject in cohort.train + cohort.val + cohort.test:
        assert subject.image.shape == subject.labels.shape == (32, 40, 32)
        assert subject.image.dtype == np.float32 and subject.labels.dtype == np.int32
        assert subject.image.min() == 0 and subject.image.max() <= 1
        np.testing.assert_allclose(np.diag(subject.affine), [5, 5, 5, 1])
        # Image and labels come from different packages: that they show the same brain is not a given.
        brain, labelled = subject.image > 0.1, subject.labels > 0
        assert np.mean(brain[labelled]) > 0.99 and np.mean(labelled[brain]) > 0.75


def test_white_matter_is_brighter_than_grey_and_on_its_own_side(cohort):
    by_name = {name: number for number, name in cohort.label_names.items()}
    right, left = by_name["Right_Cerebral_White_Matter"], by_name["Left_Cerebral_White_Matter"]
    for subject in cohort.train:
        white = np.isin(subject.labels, [right, left])
        caudate = np.isin(subject.labels, [by_name["Right_Caudate"], by_name["Left_Caudate"]])
        assert subject.image[white].mean() > subject.image[caudate].mean() + 0.03
        # RAS: the first axis grows to the right.
        centre = {side: np.argwhere(subject.labels == side).mean(0) for side in (right, left)}
        assert centre[right][0] > centre[left][0] + 5


def test_every_deformation_is_a_diffeomorphism_with_its_inverse(cohort):
    for subject in cohort.train + cohort.test:
        assert determinant(subject.to_template).min() > 0
        assert determinant(subject.from_template).min() > 0
        back = sample_field(subject.from_template, subject.to_template) + subject.to_template
        assert np.linalg.norm(back, axis=-1)[subject.labels > 0].mean() < 0.05  # voxels


def sample_field(field, u):
    return np.stack([sample(field[..., a], u, 1) for a in range(3)], -1)


def test_strength_is_the_displacement_in_mm():
    weak, strong = (embedded_cohort(config(strength=s, num_train=0, num_val=0)).test[0] for s in (1.0, 4.0))
    for subject, strength in ((weak, 1.0), (strong, 4.0)):
        rms = 5.0 * np.sqrt((subject.to_template**2).sum(-1).mean())
        assert rms == pytest.approx(strength, rel=0.15)  # exp(v) is not v, but near it


def test_true_displacement_aligns_two_subjects():
    cohort = embedded_cohort(config(shape=(64, 80, 64), spacing=2.5, num_train=0, num_val=0))
    for fixed, moving in ordered_pairs(cohort.test):
        u = true_displacement(fixed, moving)
        warped = sample(moving.labels, u, 0)
        numbers, sizes = np.unique(fixed.labels, return_counts=True)
        scored = [n for n in numbers if n not in cohort.exclude]
        initial = mean_dice(fixed.labels, moving.labels, scored)
        aligned = mean_dice(fixed.labels, warped, scored)
        # Rounding a label map to 2.5 mm voxels twice costs .17; a wrong direction scores below initial.
        assert 0.45 < initial < 0.6 and aligned > 0.8
        assert mean_dice(fixed.labels, warped, [n for n in scored if sizes[numbers == n][0] > 2000]) > 0.9
        brain = fixed.labels > 0
        before, after = (np.corrcoef(fixed.image[brain], image[brain])[0, 1]
                         for image in (moving.image, sample(moving.image, u, 1)))
        assert after > 0.85 and before < 0.6  # bias, contrast and noise remain


def test_true_displacement_needs_a_known_deformation(cohort):
    real = Subject("real", cohort.train[0].image, None, np.eye(4))
    with pytest.raises(InputError, match="real"):
        true_displacement(cohort.train[0], real)


def test_subject_depends_on_seed_and_number_only(cohort):
    again = embedded_cohort(config(num_train=1), splits=("train", "test"))
    assert again.val == () and len(again.train) == 1
    for a, b in zip(again.train + again.test, cohort.train[:1] + cohort.test, strict=True):
        assert a.id == b.id
        for name in ("image", "labels", "to_template", "from_template", "affine"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    other = embedded_cohort(config(seed=1, num_train=1), splits=("train",))
    assert np.abs(other.train[0].to_template - again.train[0].to_template).max() > 0.1


def test_splits_are_disjoint_and_subjects_differ(cohort):
    subjects = cohort.train + cohort.val + cohort.test
    assert [len(cohort.train), len(cohort.val), len(cohort.test)] == [3, 2, 2]
    assert len({s.id for s in subjects}) == 7
    for a, b in ordered_pairs(subjects):
        assert np.abs(a.to_template - b.to_template).max() > 0.1


def test_tiny_labels_and_background_are_excluded(cohort):
    assert 0 in cohort.exclude
    scored = set(cohort.label_names) - set(cohort.exclude)
    assert 60 < len(scored) < 100  # at 5 mm; all but a handful of 136 at 2.5 mm
    mean_size = {n: np.mean([np.sum(s.labels == n) for s in cohort.train]) for n in cohort.label_names}
    assert min(mean_size[n] for n in scored) > 20
    assert max(mean_size[n] for n in set(cohort.exclude) - {0}) < 80


def test_load_names_what_it_knows():
    with pytest.raises(InputError, match="data.name is 'oasis'"):
        load(ConfigDict(dict(name="oasis")))


def test_ordered_pairs():
    assert ordered_pairs("abc") == [("a", "b"), ("a", "c"), ("b", "a"), ("b", "c"), ("c", "a"), ("c", "b")]
