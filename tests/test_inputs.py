"""Registration of images as people have them: a file is used rightly, or refused with the remedy."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.registration.register import register
from drivenmorph_jax.registration.result import former_files
from drivenmorph_jax.transforms.transform import Transform

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def files(brains):
    """{"fixed", "moving", "fixed_labels", "moving_labels": path}."""
    return {f"{role}{kind}": brains / f"sub-00{k}_{ending}.nii.gz" for k, role in enumerate(("fixed", "moving"))
            for kind, ending in (("", "t1"), ("_labels", "seg"))}


def registered(files, **changes):
    return register(**{**files, "method": "demons", "quiet": True, **changes})


@pytest.fixture(scope="module")
def plain(files):
    return registered(files)


def changed(path, out, change=None, affine=None, code=None):
    """A copy of an image with other voxels, affine or code of sform and qform."""
    image = nib.load(path)
    data = np.asarray(image.dataobj) if change is None else change(np.asarray(image.dataobj))
    affine = image.affine if affine is None else affine
    copy = nib.Nifti1Image(data, affine)
    copy.header.set_xyzt_units("mm")
    if code is not None:
        copy.set_sform(affine, code)
        copy.set_qform(affine, code)
    nib.save(copy, out)
    return out


def z_scored(x):
    brain = x[x > 0]
    return np.where(x > 0, (x - brain.mean()) / brain.std(), 0).astype(np.float32)


@pytest.mark.parametrize("change", [z_scored, lambda x: x - 1024, lambda x: np.where(x > 0, x, -1024).astype(np.int16),
                                    lambda x: np.where(x > 0, x - 3000, 0).astype(np.int16)])
def test_the_offset_and_the_sign_of_intensities_do_not_matter(change, files, plain, tmp_path):
    found = registered(files, moving=changed(files["moving"], tmp_path / "moving.nii", change))
    assert found.summary["dice_after"] > plain.summary["dice_after"] - 0.02
    values = change(np.asarray(nib.load(files["moving"]).dataobj))
    warped = found.warped.get_fdata()
    assert values.min() - 1e-3 <= warped.min() and warped.max() <= values.max() + 1e-3
    assert warped[0, 0, 0] == values[0, 0, 0]  # the background, also outside the field of view


def test_sides_that_a_file_does_not_tell_are_refused_or_said_by_the_user(files, plain, tmp_path):
    moving, labels = (changed(files[name], tmp_path / f"{name}.nii", code=0) for name in ("moving", "moving_labels"))
    with pytest.raises(InputError, match="moving.nii does not say which side is left"):
        registered(files, moving=moving)
    with pytest.raises(InputError, match="moving_labels.nii does not say which side is left"):
        registered(files, moving_labels=labels)
    right, wrong = (registered(files, moving=moving, moving_labels=labels, geometry=geometry, affine=False).summary[
        "dice_after"] for geometry in ("LAS", "RAS"))
    assert right > plain.summary["dice_after"] - 0.03 and wrong < right - 0.1


def test_a_mask_in_the_other_sense_is_refused_and_an_empty_one_is_none(files, plain, tmp_path):
    brain, nothing = (changed(files["moving"], tmp_path / f"{name}.nii", change) for name, change in (
        ("brain", lambda x: (x > 0).astype(np.uint8)), ("nothing", lambda x: np.zeros(x.shape, np.uint8))))
    with pytest.raises(InputError, match="brain.nii leaves out 100% of the brain .* give --mask_sense use"):
        registered(files, moving_mask=brain)
    with pytest.raises(InputError, match="nothing.nii leaves out 100% of the brain .* give --mask_sense ignore"):
        changed(files["moving"], tmp_path / "nothing.nii",
                lambda x: (np.arange(x.size) == 0).reshape(x.shape).astype(np.uint8))
        registered(files, moving_mask=nothing, mask_sense="use")
    changed(files["moving"], nothing, lambda x: np.zeros(x.shape, np.uint8))
    for settings in ({"moving_mask": nothing}, {"moving_mask": brain, "mask_sense": "use"}):
        found = registered(files, **settings)
        np.testing.assert_array_equal(found.transform.displacement, plain.transform.displacement)


@pytest.mark.parametrize("affine", [True, False])
def test_a_small_brain_is_registered_as_a_large_one(affine, files, tmp_path):
    shrink = np.diag([0.08, 0.08, 0.08, 1])
    small = {name: changed(path, tmp_path / f"{name}.nii", affine=shrink @ nib.load(path).affine)
             for name, path in files.items()}
    large, found = (registered(x, affine=affine) for x in (files, small))
    assert found.summary["scale"] > 5 and large.summary["scale"] == 1
    for name in ("dice_before", "dice_after"):
        assert found.summary[name] == pytest.approx(large.summary[name], abs=0.03)
    moved = [np.linalg.norm(x.transform.displacement, axis=-1).mean() for x in (found, large)]
    assert moved[0] == pytest.approx(0.08 * moved[1], rel=0.2)
    assert found.summary["inverse_mm"] == pytest.approx(0.08 * large.summary["inverse_mm"], rel=0.5)
    assert found.transform.grid.affine == pytest.approx(nib.load(small["fixed"]).affine)
    np.testing.assert_allclose(found.transform.apply(small["moving"]).get_fdata(), found.warped.get_fdata(), atol=1e-2)


def test_a_run_replaces_the_files_of_the_one_before_as_a_whole(files, plain, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    plain.save(tmp_path, ("itk", "ras"))
    assert (tmp_path / "warped_labels.nii.gz").exists() and (tmp_path / "displacement.nii.gz").exists()
    other = registered({"fixed": files["moving"], "moving": files["fixed"]}, affine=False)
    other.save(tmp_path, ("h5",))
    summary = json.loads((tmp_path / "summary.json").read_text())
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*summary["files"], "summary.json", "notes.txt"}
    assert "displacement.h5" in left and "warped_labels.nii.gz" not in left and "displacement.nii.gz" not in left


def test_a_run_that_cannot_write_leaves_the_one_before(plain, tmp_path, monkeypatch):
    plain.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_, **__):
        raise InputError("no space")

    monkeypatch.setattr(type(plain), "_page", full)
    with pytest.raises(InputError, match="no space"):
        plain.save(tmp_path, ("itk", "ras"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_whose_summary_does_not_list_its_files_is_refused(plain, tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    for refused in (lambda: former_files(tmp_path), lambda: plain.save(tmp_path)):
        with pytest.raises(InputError, match="does not say which files belong to it: empty the folder"):
            refused()
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_a_sidecar_is_believed_only_beside_its_own_field(plain, tmp_path):
    plain.save(tmp_path)
    np.testing.assert_allclose(Transform.load(tmp_path / "displacement.nii.gz").linear, plain.transform.linear)
    shutil.copy(tmp_path / "inverse_displacement.nii.gz", tmp_path / "displacement.nii.gz")
    with pytest.raises(InputError, match="displacement.json was written for another field .* delete it"):
        Transform.load(tmp_path / "displacement.nii.gz")
    (tmp_path / "displacement.json").unlink()
    assert Transform.load(tmp_path / "displacement.nii.gz").other is None
    with pytest.raises(InputError, match="force.nii.gz is no displacement: .* calls it a force of Demons"):
        Transform.load(tmp_path / "force.nii.gz")
