"""Registration of images as people have them: a file is used rightly, or refused with the remedy."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.files import NEW, new_files
from drivenmorph_jax.registration.apply import apply_files
from drivenmorph_jax.registration.cohort import register_cohort
from drivenmorph_jax.registration.register import register
from drivenmorph_jax.registration.result import check_out, transform_names
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
    for refused in (lambda: check_out(tmp_path, ()), lambda: plain.save(tmp_path)):
        with pytest.raises(InputError, match="does not say which files belong to it: empty the folder"):
            refused()
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_files_of_another_origin_are_not_replaced(plain, tmp_path):
    (tmp_path / "warped.nii.gz").write_text("mine")
    with pytest.raises(InputError, match=r"warped.nii.gz is no file of an earlier result .* another --out"):
        plain.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["warped.nii.gz"]
    (tmp_path / NEW).mkdir()  # a run was stopped while its files moved, so that the file is its own
    plain.save(tmp_path)
    assert nib.load(tmp_path / "warped.nii.gz").shape == plain.warped.shape and not (tmp_path / NEW).exists()


def test_the_result_of_another_program_is_not_replaced(plain, files, tmp_path):
    for name, summary in (("label", {"ids": [], "files": []}), ("template", {"subjects": {}, "files": []})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
        with pytest.raises(InputError, match="is of another program"):
            plain.save(tmp_path / name)
        with pytest.raises(InputError, match="holds a result that is no cohort"):
            register_cohort({"one": {"fixed": str(files["fixed"]), "moving": str(files["moving"])}}, tmp_path / name)


def test_files_that_move_and_stop_halfway_are_those_of_a_stopped_run(tmp_path):
    with pytest.raises(InputError, match="no space"), new_files(tmp_path, []) as new:
        (new / "one").write_text("1")
        raise InputError("no space")
    assert not list(tmp_path.iterdir())
    with new_files(tmp_path, ["two"]) as new:
        for name in ("summary.json", "zebra", "one"):
            (new / name).write_text("1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "summary.json", "zebra"]


def test_no_result_replaces_an_input(plain, files, tmp_path):
    plain.save(tmp_path)
    moving = tmp_path / "warped.nii.gz"
    before = moving.read_bytes()
    with pytest.raises(InputError, match="warped.nii.gz would be replaced by the result: give another --out"):
        check_out(tmp_path, [files["fixed"], moving])
    with pytest.raises(InputError, match="would be replaced"):
        registered({"fixed": files["fixed"], "moving": moving}, affine=False).save(tmp_path)
    field = tmp_path / "displacement.nii.gz"
    for out, inputs in ((moving, {"images": [moving]}), (field, {"images": [files["moving"]]}),
                        (files["fixed"], {"images": [moving], "reference": files["fixed"]})):
        with pytest.raises(InputError, match="would be replaced"):
            list(apply_files(f"{field}:inverse", out, **inputs))
    assert moving.read_bytes() == before


def test_several_images_need_a_folder(plain, files, tmp_path):
    plain.save(tmp_path / "result")
    with pytest.raises(InputError, match=r"several images need a folder"):
        list(apply_files(tmp_path / "result" / "displacement.nii.gz", tmp_path / "both.nii.gz",
                         [files["moving"], files["moving_labels"]]))


@pytest.mark.parametrize("names", [("../x", "T1w", "MNI"), ("sub 01", "T1w", "MNI"), ("sub-01", "T1w", "MNI 152"),
                                   ("sub-01", "T1w", "T1w"), ("", "T1w", "MNI")])
def test_names_that_bids_does_not_have_are_refused(names):
    with pytest.raises(InputError, match="--bids"):
        transform_names(names)


@pytest.mark.parametrize("settings", [{"refine_steps": -1}, {"refine_steps": 1.5}, {"memory": "4GB"}, {"memory": -1},
                                      {"guide_labels": 47}, {"affine": None}])
def test_settings_of_no_use_are_refused(files, settings):
    name, = settings
    with pytest.raises(InputError, match=f"{name} is .*: (set|give)"):
        registered(files, **settings)


def test_a_transform_in_memory_is_no_file(plain, files):
    with pytest.raises(InputError, match="save it, and give the file"):
        registered(files, initial_transform=plain.transform)


def test_points_have_three_coordinates(plain):
    many = plain.transform.points([[1.0, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(plain.transform.points([1.0, 2, 3]), many[0])
    assert plain.transform.points([]).shape == (0, 3)
    with pytest.raises(InputError, match=r"shape \(1, 2\): give \(N, 3\)"):
        plain.transform.points([[1, 2]])


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
