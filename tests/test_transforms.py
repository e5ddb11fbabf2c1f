import json

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.affines import apply_affine
from scipy import ndimage

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.images.reading import load_image
from drivenmorph_jax.images.volume import Volume, resample
from drivenmorph_jax.transforms.files import write_displacement
from drivenmorph_jax.transforms.itk import read_affine, write_affine
from drivenmorph_jax.transforms.maps import faded
from drivenmorph_jax.transforms.reading import read_transform
from drivenmorph_jax.transforms.world import (
    jacobian_determinant_of_displacement,
    pull_back,
    total_displacement,
    total_inverse_displacement,
    unfolded_in_world,
)

TURN = nibabel.eulerangles.euler2mat


def grid(shape, spacing, angles=(0.0, 0.0, 0.0), flip=(1, 1, 1)):
    """A grid centred on the world's origin."""
    affine = np.eye(4)
    affine[:3, :3] = TURN(*angles) * np.multiply(spacing, flip)
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2
    return shape, affine


GRIDS = {
    "isotropic": grid((40, 44, 42), (1, 1, 1)),
    "anisotropic": grid((40, 44, 16), (1, 0.9, 3)),
    "flipped": grid((40, 44, 42), (1, 1, 1), flip=(-1, 1, 1)),
    "oblique": grid((40, 36, 44), (1, 1.2, 0.9), (0.2, -0.3, 0.25), (-1, 1, 1)),
}
WORK = grid((24, 24, 24), (2, 2, 2), (0.1, 0, -0.05))
T = np.eye(4)
T[:3, :3] = TURN(0.1, -0.15, 0.05) @ np.diag([1.05, 0.95, 1.0])
T[:3, 3] = 2, -3, 1


def blobs(points):
    """A smooth image of the world without symmetry."""
    x, y, z = np.moveaxis(points, -1, 0)
    return (100 * np.exp(-(x**2 + y**2 + z**2) / 150) * (1.5 + np.sin(0.3 * x + 0.1 * y) + 0.3 * np.cos(0.4 * z))
            ).astype(np.float32)


def points_of(shape, affine):
    return apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))


def volume_on(path, shape, affine):
    nibabel.save(nibabel.Nifti1Image(blobs(points_of(shape, affine)), affine), path)
    return load_image(path)


def smooth_field(shape, largest, seed=0):
    noise = np.random.default_rng(seed).normal(size=(*shape, 3))
    field = ndimage.gaussian_filter(noise, (4, 4, 4, 0))
    return (field / np.abs(field).max() * largest).astype(np.float32)


def refused(call, path, *words):
    with pytest.raises(InputError) as caught:
        call()
    assert str(path) in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("frame", ["LPS", "RAS"])
@pytest.mark.parametrize("fixed_grid, moving_grid", [
    ("isotropic", "isotropic"), ("anisotropic", "flipped"), ("flipped", "oblique"), ("oblique", "anisotropic")])
def test_simpleitk_resamples_with_our_file_to_our_image(tmp_path, fixed_grid, moving_grid, frame):
    fixed = volume_on(tmp_path / "fixed.nii.gz", *GRIDS[fixed_grid])
    moving = volume_on(tmp_path / "moving.nii.gz", *GRIDS[moving_grid])
    displacement = total_displacement(fixed.data.shape, fixed.affine, smooth_field(WORK[0], 1.5),
                                                 WORK[1], T)
    ours = pull_back(moving, displacement, fixed.affine)
    path = tmp_path / "displacement.nii.gz"
    write_displacement(path, displacement, fixed, "fixed to moving", frame)

    field = sitk.DisplacementFieldTransform(sitk.Cast(sitk.ReadImage(path), sitk.sitkVectorFloat64))
    theirs = sitk.Resample(sitk.ReadImage(moving.path), sitk.ReadImage(fixed.path), field, sitk.sitkLinear)
    theirs = sitk.GetArrayFromImage(theirs).transpose(2, 1, 0)
    ones = Volume(np.ones_like(moving.data), moving.affine, None, "")
    inside = pull_back(ones, displacement, fixed.affine) > 0.999
    assert inside.mean() > 0.3
    assert np.abs(ours - theirs)[inside].mean() < 0.002 * np.ptp(ours)
    unmoved = resample(moving, fixed.data.shape, fixed.affine)
    assert np.abs(unmoved - ours)[inside].mean() > 0.02 * np.ptp(ours)  # the comparison sees the motion


@pytest.mark.parametrize("name", GRIDS)
def test_constant_field_and_affine_in_closed_form(name):
    shape, affine = GRIDS[name]
    u = np.broadcast_to(np.float32([1.0, -0.5, 2.0]), (*WORK[0], 3))
    x = points_of(shape, affine)
    expected = apply_affine(T, x + WORK[1][:3, :3] @ [1.0, -0.5, 2.0]) - x
    got = total_displacement(shape, affine, u, WORK[1], T)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("fixed_grid, moving_grid", [("anisotropic", "oblique"), ("oblique", "flipped")])
def test_forward_then_inverse_returns(fixed_grid, moving_grid):
    # a linear field, which linear sampling reproduces exactly, with its exact inverse
    matrix = np.eye(3) + np.random.default_rng(1).normal(0, 0.05, (3, 3))
    w = np.moveaxis(np.indices(WORK[0]), 0, -1) - 11.5
    u, u_inverse = w @ matrix.T - w, w @ np.linalg.inv(matrix).T - w
    forward = total_displacement(*GRIDS[fixed_grid], u, WORK[1], T)
    inverse = total_inverse_displacement(*GRIDS[moving_grid], u_inverse, WORK[1], T)
    points = np.random.default_rng(2).uniform(-10, 10, (200, 3))
    there = faded(forward, GRIDS[fixed_grid][1], T)(points)
    back = faded(inverse, GRIDS[moving_grid][1], np.linalg.inv(T))(there)
    assert np.linalg.norm(there - points, axis=1).mean() > 1
    np.testing.assert_allclose(back, points, atol=1e-4)


def test_field_is_clamped_beyond_the_working_grid():
    u = np.zeros((4, 4, 4, 3), np.float32)
    u[-1, :, :, 1] = 3
    got = total_displacement((10, 2, 2), np.eye(4), u, np.eye(4), np.eye(4))
    np.testing.assert_allclose(got[:, 0, 0, 1], [0, 0, 0, 3, 3, 3, 3, 3, 3, 3])


def test_blob_moves_as_its_point_does():
    """Moving = fixed shifted by s: pulling back by s restores it, and fixed points go to moving by s."""
    shift = np.array([4.0, -2.0, 3.0])
    shape, affine = GRIDS["oblique"]
    peak = lambda data: apply_affine(affine, ndimage.center_of_mass(data**4))  # noqa: E731
    narrow = lambda x: np.exp(-(x**2).sum(-1) / 10).astype(np.float32)  # noqa: E731
    fixed = narrow(points_of(shape, affine))
    moving = Volume(narrow(points_of(shape, affine) - shift), affine, None, "")
    displacement = np.broadcast_to(shift.astype(np.float32), (*shape, 3))
    warped = pull_back(moving, displacement, affine)
    np.testing.assert_allclose(peak(moving.data) - peak(fixed), shift, atol=0.05)
    np.testing.assert_allclose(peak(warped), peak(fixed), atol=0.05)
    np.testing.assert_allclose(faded(displacement, affine, np.eye(4))(peak(fixed)[None])[0],
                               peak(moving.data), atol=0.05)


def test_apply_keeps_labels_whole_and_is_zero_outside():
    labels = np.random.default_rng(0).integers(1, 9, (6, 7, 8)).astype(np.int32)
    shift = np.broadcast_to(np.float32([2.4, 0, 0]), (6, 7, 8, 3))
    out = pull_back(Volume(labels, np.eye(4), None, ""), shift, np.eye(4), "nearest")
    assert out.dtype == np.int32
    np.testing.assert_array_equal(out[:-2], labels[2:])
    assert not out[-2:].any()


@pytest.mark.parametrize("name", GRIDS)
def test_jacobian_of_a_linear_map_is_its_determinant(name):
    shape, affine = GRIDS[name]
    x = points_of(shape, affine)
    displacement = (apply_affine(T, x) - x).astype(np.float32)
    got = jacobian_determinant_of_displacement(displacement, affine)
    np.testing.assert_allclose(got, np.linalg.det(T[:3, :3]), atol=1e-4)


def test_jacobian_as_simpleitk(tmp_path):
    # ITK's filter ignores the direction cosines, so it is right where they are the identity: on an LPS grid
    fixed = volume_on(tmp_path / "fixed.nii.gz", *grid((40, 36, 20), (1, 1.2, 2), flip=(-1, -1, 1)))
    displacement = smooth_field(fixed.data.shape, 3)
    write_displacement(tmp_path / "d.nii", displacement, fixed, "fixed to moving")
    theirs = sitk.DisplacementFieldJacobianDeterminant(sitk.ReadImage(tmp_path / "d.nii"))
    theirs = sitk.GetArrayFromImage(theirs).transpose(2, 1, 0)[1:-1, 1:-1, 1:-1]
    ours = jacobian_determinant_of_displacement(displacement, fixed.affine)[1:-1, 1:-1, 1:-1]
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.ptp(ours) > 0.5


@pytest.mark.parametrize("frame, intent, signs", [("LPS", 1007, (-1, -1, 1)), ("RAS", 1006, (1, 1, 1))])
def test_displacement_file_and_sidecar(tmp_path, frame, intent, signs):
    fixed = volume_on(tmp_path / "fixed.nii", *GRIDS["oblique"])
    displacement = smooth_field(fixed.data.shape, 3)
    path = tmp_path / "sub-01_xfm.nii.gz"
    write_displacement(path, displacement, fixed, "fixed to moving", frame)
    image = nibabel.load(path)
    assert image.shape == (*fixed.data.shape, 1, 3) and image.get_data_dtype() == np.float32
    assert int(image.header["intent_code"]) == intent
    np.testing.assert_array_equal(image.dataobj[..., 0, :], displacement * np.float32(signs))
    sidecar = json.loads((tmp_path / "sub-01_xfm.json").read_text())
    assert (sidecar["Frame"], sidecar["Unit"], sidecar["Direction"]) == (frame, "mm", "fixed to moving")
    assert sidecar["GridShape"] == list(fixed.data.shape)
    np.testing.assert_allclose(sidecar["GridAffineRAS"], fixed.affine)
    back = read_transform(path)
    np.testing.assert_array_equal(back.displacement, displacement)
    np.testing.assert_allclose(back.grid.affine, fixed.affine, atol=1e-5)


def test_files_that_are_no_displacement(tmp_path):
    fixed = volume_on(tmp_path / "fixed.nii", *GRIDS["isotropic"])
    refused(lambda: read_transform(fixed.path), fixed.path, "(X, Y, Z, 1, 3)")
    displacement = np.full((*fixed.data.shape, 3), np.nan, np.float32)
    path = tmp_path / "nan.nii"
    write_displacement(path, displacement, fixed, "fixed to moving")
    refused(lambda: read_transform(path), path, "NaN")


@pytest.mark.parametrize("ending", [".tfm", ".txt", ".mat"])
def test_affine_round_trip_and_meaning(tmp_path, ending):
    path = tmp_path / f"affine{ending}"
    write_affine(path, T)
    np.testing.assert_allclose(read_affine(path), T, atol=1e-12)
    point = np.array([10.0, -20.0, 30.0])
    lps = np.array([-1, -1, 1])
    moved = np.array(sitk.ReadTransform(path).TransformPoint((point * lps).tolist())) * lps
    np.testing.assert_allclose(moved, apply_affine(T, point), atol=1e-9)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_affine_of_another_itk_type_and_centre(tmp_path):
    rigid = sitk.Euler3DTransform((10, 20, 30), 0.1, 0.2, 0.3, (4, 5, 6))
    sitk.WriteTransform(rigid, tmp_path / "rigid.tfm")
    got = apply_affine(read_affine(tmp_path / "rigid.tfm"), (1.0, 2.0, 3.0))
    np.testing.assert_allclose(got * [-1, -1, 1], rigid.TransformPoint((-1.0, -2.0, 3.0)), atol=1e-9)


def test_files_that_are_no_affine(tmp_path):
    refused(lambda: read_affine(tmp_path / "no.tfm"), "no.tfm", "does not exist")
    (tmp_path / "text.tfm").write_text("hello")
    refused(lambda: read_affine(tmp_path / "text.tfm"), "text.tfm", "ITK")
    sitk.WriteTransform(sitk.BSplineTransform(3), tmp_path / "spline.tfm")
    refused(lambda: read_affine(tmp_path / "spline.tfm"), "spline.tfm", "linear")
    sitk.WriteTransform(sitk.Euler2DTransform(), tmp_path / "flat.tfm")
    refused(lambda: read_affine(tmp_path / "flat.tfm"), "flat.tfm", "3-D")
    text = "#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
    (tmp_path / "singular.tfm").write_text(text + "Parameters: 1 0 0 0 1 0 0 0 0 0 0 0\nFixedParameters: 0 0 0\n")
    refused(lambda: read_affine(tmp_path / "singular.tfm"), "singular.tfm")
    refused(lambda: write_affine(tmp_path / "a.nii", T), "a.nii", ".tfm")
    refused(lambda: write_affine(tmp_path / "none" / "a.tfm", T), "a.tfm", "cannot be written")


def test_a_coarse_grids_samples_of_a_field_that_folds_nowhere_do_not_fold_either():
    # two shears, one after the other: J = 1 everywhere
    x, y, _ = np.indices((60, 60, 60))
    wave = 2 * np.pi / 20
    u = np.stack([5 * np.sin(wave * y), 5 * np.sin(wave * (x + 5 * np.sin(wave * y))), 0 * x], -1).astype(np.float32)
    assert jacobian_determinant_of_displacement(u, np.eye(4)).min() > 0.4
    shape, affine = (15, 15, 15), np.diag([4.0, 4, 4, 1])
    turned = np.diag([-1.0, 1, 1, 1])
    for total in (total_displacement, total_inverse_displacement):
        got = total(shape, affine, u, np.eye(4), np.eye(4))
        assert jacobian_determinant_of_displacement(u[::4, ::4, ::4], affine).min() < -0.3
        assert jacobian_determinant_of_displacement(got, affine).min() > 0
        np.testing.assert_array_equal(unfolded_in_world(u, np.eye(4), np.eye(4)), u)
        assert jacobian_determinant_of_displacement(
            total(shape, affine, 0 * u, np.eye(4), turned), affine).max() == pytest.approx(-1)
