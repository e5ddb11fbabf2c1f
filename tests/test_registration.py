import json
import re

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from drivenmorph_jax import metrics, nifti
from drivenmorph_jax.registration import register

FILES = {"warped.nii.gz", "displacement.nii.gz", "displacement.json", "inverse_displacement.nii.gz",
         "inverse_displacement.json", "jacobian.nii.gz", "force.nii.gz", "force.json", "warped_labels.nii.gz",
         "overview.png", "report.html", "summary.json"}


@pytest.fixture(scope="module")
def pair(brains, tmp_path_factory):
    """(fixed, moving, fixed labels, moving labels): the moving ones turned by 8 degrees and on a larger grid."""
    folder = tmp_path_factory.mktemp("turned")
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.14), -np.sin(0.14)], [np.sin(0.14), np.cos(0.14)]]
    turn[:3, 3] = 6, -4, 9
    for ending in ("t1", "seg"):
        image = nib.load(brains / f"sub-001_{ending}.nii.gz")
        data = np.pad(np.asarray(image.dataobj), ((2, 1), (0, 3), (1, 1)))
        affine = turn @ image.affine @ np.array([[1, 0, 0, -2], [0, 1, 0, 0], [0, 0, 1, -1], [0, 0, 0, 1.0]])
        nib.save(nib.Nifti1Image(data, affine), folder / f"moving_{ending}.nii.gz")
    return tuple(str(path) for path in (
        brains / "sub-000_t1.nii.gz", folder / "moving_t1.nii.gz", brains / "sub-000_seg.nii.gz",
        folder / "moving_seg.nii.gz"))


@pytest.fixture(scope="module", params=["drivenmorph", "demons", "refined"])
def result(request, smoke, pair, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "new" / "folder"
    method = "demons" if request.param == "demons" else "drivenmorph"
    summary = register(*pair[:2], out, checkpoint=smoke[0] if method == "drivenmorph" else None, method=method,
                       refine_steps=5 if request.param == "refined" else 0,
                       fixed_labels=pair[2], moving_labels=pair[3])
    return out, summary


def test_everything_promised_is_written_and_nothing_else(result):
    out, summary = result
    assert {path.name for path in out.iterdir()} == FILES
    assert json.loads((out / "summary.json").read_text()) == summary
    assert {"read", "affine", "resample", "transform", "score", "write", "total"} < set(summary["seconds"])
    assert summary["similarity_after"] > summary["similarity_before"]
    assert summary["dice_after"] > summary["dice_before"]
    assert summary["fold_pct"] < 0.01


def test_outputs_lie_on_the_fixed_grid_with_its_header(result, pair):
    out, _ = result
    fixed, moving = (nib.load(path) for path in pair[:2])
    for name in ("warped", "displacement", "jacobian", "force", "warped_labels"):
        image = nib.load(out / f"{name}.nii.gz")
        assert image.shape[:3] == fixed.shape
        np.testing.assert_allclose(image.affine, fixed.affine, atol=1e-4)
        assert image.header["sform_code"] == fixed.header["sform_code"]
    inverse = nib.load(out / "inverse_displacement.nii.gz")
    assert inverse.shape == (*moving.shape, 1, 3)
    labels = nib.load(out / "warped_labels.nii.gz")
    assert labels.get_data_dtype() == np.int16
    assert set(np.unique(labels.dataobj)) <= set(np.unique(nib.load(pair[3]).dataobj))


def test_simpleitk_makes_the_same_warped_image_from_the_displacement_file(result, pair):
    out, _ = result
    field = sitk.ReadImage(str(out / "displacement.nii.gz"), sitk.sitkVectorFloat64)
    transform = sitk.DisplacementFieldTransform(field)
    fixed, moving = (sitk.ReadImage(path, sitk.sitkFloat32) for path in pair[:2])
    theirs = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, transform, sitk.sitkLinear, 0.0))
    ours = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "warped.nii.gz")))
    brain = ndimage.binary_erosion(sitk.GetArrayFromImage(fixed) > 0, iterations=2)
    assert np.abs(theirs - ours)[brain].mean() < 0.002 * np.ptp(ours)


def test_dice_in_the_summary_is_that_of_the_files(result, pair):
    out, summary = result
    fixed, warped = (np.asarray(nib.load(path).dataobj).astype(int) for path in (pair[2], out / "warped_labels.nii.gz"))
    labels = np.intersect1d(fixed[fixed > 0], warped)
    dice = [2 * ((fixed == k) & (warped == k)).sum() / ((fixed == k).sum() + (warped == k).sum()) for k in labels]
    assert summary["dice_after"] == pytest.approx(np.mean(dice), abs=1e-6)


def test_forward_then_inverse_returns(result):
    out, summary = result
    there = sitk.DisplacementFieldTransform(sitk.ReadImage(str(out / "displacement.nii.gz"), sitk.sitkVectorFloat64))
    back = sitk.DisplacementFieldTransform(
        sitk.ReadImage(str(out / "inverse_displacement.nii.gz"), sitk.sitkVectorFloat64))
    image = nib.load(out / "warped.nii.gz")
    inside = ndimage.binary_erosion(image.get_fdata() > 100, iterations=4)
    points = nib.affines.apply_affine(image.affine, np.argwhere(inside)[::97]) * [-1, -1, 1]
    returned = np.array([back.TransformPoint(there.TransformPoint(p)) for p in points.tolist()])
    assert np.linalg.norm(returned - points, axis=1).mean() < 0.7  # mm, on 5 mm voxels
    assert summary["inverse_mm"] < 0.7


def test_a_labelled_pair_that_shares_its_grid_needs_no_affine(brains, smoke, tmp_path):
    names = [str(brains / f"sub-00{i}_{kind}.nii.gz") for kind in ("t1", "seg") for i in (0, 1)]
    summary = register(*names[:2], tmp_path, checkpoint=smoke[0], affine=False, fixed_labels=names[2],
                       moving_labels=names[3])
    fixed, moving = (nifti.load_labels(name).data for name in names[2:])
    assert summary["dice_before"] == pytest.approx(metrics.mean_dice(fixed, moving), abs=1e-6)
    assert "affine" in summary["seconds"] and summary["affine"] is False


@pytest.mark.parametrize("force", ["intensity", "mind"])
def test_every_force_of_demons_registers(force, brains, tmp_path):
    names = [str(brains / f"sub-00{i}_{kind}.nii.gz") for kind in ("t1", "seg") for i in (0, 1)]
    summary = register(*names[:2], tmp_path, method="demons", force=force, affine=False, fixed_labels=names[2],
                       moving_labels=names[3])
    assert summary["dice_after"] > summary["dice_before"] + 0.05 and summary["fold_pct"] < 0.01


def test_progress_is_told_by_stage(brains, tmp_path, capsys):
    register(*(str(brains / f"sub-00{i}_t1.nii.gz") for i in (0, 1)), tmp_path, method="demons", affine=False)
    told = capsys.readouterr().out
    for stage in ("read", "affine", "resample", "demons", "transform", "score", "write"):
        assert re.search(rf"{stage} \.\.\. \d+\.\d s", told)
    assert not (tmp_path / "warped_labels.nii.gz").exists()
