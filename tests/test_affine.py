from dataclasses import replace

import nibabel
import numpy as np
import pytest
from nibabel.affines import apply_affine
from nilearn.datasets import load_mni152_template
from scipy.spatial.transform import Rotation

from benchmarks.affine import cut, inside
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.images.intensity import foreground
from drivenmorph_jax.images.volume import Volume, resample
from drivenmorph_jax.transforms import affine


@pytest.fixture(scope="module")
def template():
    image = load_mni152_template(resolution=3)
    return Volume(np.ascontiguousarray(image.get_fdata(dtype=np.float32)), image.affine, image.header, "mni")


def moved(template, angles, shift, scales=(1.0, 1.0, 1.0)):
    """(moving, T) with moving(T x) = template(x), on a larger grid that holds all of it."""
    transform = np.eye(4)
    transform[:3, :3] = nibabel.eulerangles.euler2mat(*np.deg2rad(angles)) @ np.diag(scales)
    transform[0, 1] += 0.04
    transform[:3, 3] = shift
    shape = tuple(int(1.5 * n) for n in template.data.shape)
    grid = template.affine.copy()
    grid[:3, 3] = -grid[:3, :3] @ (np.array(shape) - 1) / 2
    data = resample(template, shape, grid, np.linalg.inv(transform))
    return Volume(data, grid, template.header, "moved"), transform


def error(template, found, true, there=lambda x: slice(None)):
    """Mean distance in mm over the brain, at the points x (N, 3) that are `there`."""
    x = apply_affine(template.affine, np.argwhere(foreground(template.data)))
    x = x[there(x)]
    return np.linalg.norm(apply_affine(found, x) - apply_affine(true, x), axis=1).mean()


@pytest.mark.parametrize("angles, shift, scales", [
    ((5, -8, 6), (5, -7, 3), (1.08, 0.95, 1.03)),
    ((30, 0, 0), (40, 0, 0), (1, 1, 1)),
    ((0, 30, 0), (20, -20, -28), (1, 1, 1)),
])
def test_a_known_affine_is_recovered(template, angles, shift, scales):
    moving, true = moved(template, angles, shift, scales)
    assert error(template, np.eye(4), true) > 5
    found = affine.register_affine(template, moving)
    assert error(template, found, true) < 1
    assert found[3].tolist() == [0, 0, 0, 1]


def test_the_same_input_gives_the_same_affine_and_contrast_does_not_matter(template):
    moving, true = moved(template, (8, 0, -5), (-10, 4, 6))
    brain = moving.data > 0.1
    inverted = Volume(np.where(brain, 1.2 - moving.data, 0).astype(np.float32), moving.affine, None, "inverted")
    first, second = (affine.register_affine(template, inverted) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert error(template, first, true) < 1


def test_failure_names_both_files_and_the_remedy(template, monkeypatch):
    def fail(*_):
        raise RuntimeError("All samples map outside moving image buffer")

    monkeypatch.setattr(affine, "_optimise", fail)
    with pytest.raises(InputError, match="mni could not be aligned to mni .*--affine none"):
        affine.register_affine(template, template)


SMALL = (5, -8, 6), (5, -7, 3), (1.08, 0.95, 1.03)


@pytest.mark.parametrize("side, axis, shares", [("moving", 2, (0.5, 0)), ("fixed", 0, (0.25, 0)),
                                                ("fixed", 2, (0.35, 0.3))])
def test_a_cut_image_is_aligned_by_what_it_shows(template, side, axis, shares):
    moving, true = moved(template, *SMALL)
    if side == "fixed":
        part = cut(template, axis, *shares)
        found, there = affine.register_affine(part, moving), lambda x: inside(part, x)
    else:
        part = cut(moving, axis, *shares)
        found, there = affine.register_affine(template, part), lambda x: inside(part, apply_affine(true, x))
    assert error(template, found, true, there) < 1
    scales = (np.linalg.svd(x[:3, :3], compute_uv=False) for x in (found, true))
    np.testing.assert_allclose(*scales, rtol=0.05)


@pytest.mark.parametrize("degrees, axis, size", [(180, (0, 1, 0), 0.6), (170, (0, 0, 1), 1.6), (75, (1, -2, 0.5), 1)])
def test_a_header_that_is_turned_and_far_away_changes_nothing(template, degrees, axis, size):
    moving, true = moved(template, *SMALL)
    change = np.eye(4)
    turn = np.deg2rad(degrees) * np.divide(axis, np.linalg.norm(axis))
    change[:3, :3] = size * Rotation.from_rotvec(turn).as_matrix()
    change[:3, 3] = 400, -300, 330
    found = affine.register_affine(template, replace(moving, affine=change @ moving.affine))
    assert error(template, np.linalg.inv(change) @ found, true) < 1


def test_rigid_is_rigid_and_a_similarity_has_one_scale(template):
    moving, _ = moved(template, (12, -9, 15), (8, 3, -6), (1.1, 1.1, 1.1))
    grown = moving.affine.copy()
    grown[:3] /= 1.1
    for kind, other, scale in (("rigid", replace(moving, affine=grown), 1.0), ("similarity", moving, 1.1)):
        linear = affine.register_affine(template, other, kind=kind)[:3, :3]
        np.testing.assert_allclose(linear.T @ linear, np.linalg.det(linear) ** (2 / 3) * np.eye(3), atol=1e-6)
        np.testing.assert_allclose(np.linalg.det(linear), scale**3, atol=1e-6 if kind == "rigid" else 0.03)


def test_the_result_is_no_worse_than_the_world_coordinates(template):
    noise = np.random.default_rng(0).normal(size=template.data.shape).astype(np.float32)
    other = replace(template, data=np.maximum(template.data[::-1] + 0.1 * noise * (template.data > 0), 0))
    found, world = affine.metric_between(template, other, [affine.register_affine(template, other), np.eye(4)])
    assert found > world - 1e-3


def test_metric_leaves_out_what_is_beyond_a_cut_face(template):
    part = cut(template, 2, 0.5)
    whole, half, far = affine.metric_between(template, part, [np.eye(4), np.diag([1, 1, 0.5, 1]),
                                                             np.array([[1, 0, 0, 500], *np.eye(4)[1:]])])
    assert whole > half > 0.0 and far == 0.0


@pytest.mark.parametrize("size", [24, 25])
def test_a_coarser_image_stays_where_it_is(size):
    import SimpleITK as sitk
    ramp = sitk.GetImageFromArray(np.broadcast_to(np.arange(size, dtype=np.float32) * affine.SPACING, (24, 24, size)))
    ramp.SetSpacing([affine.SPACING] * 3)
    for factor in (2, 4):
        small = affine._coarser(ramp, factor)
        middle = small.GetSize()[0] // 2
        place = small.TransformIndexToPhysicalPoint((middle, 3, 3))[0]
        assert small.GetPixel(middle, 3, 3) == pytest.approx(place, abs=0.05)
