import json
import re

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.evaluation import metrics
from drivenmorph_jax.files import stem
from drivenmorph_jax.images.reading import load_labels
from drivenmorph_jax.registration.register import register
from drivenmorph_jax.runtime import sharding
from drivenmorph_jax.transforms.itk import write_affine

FILES = {"warped.nii.gz", "displacement.nii.gz", "displacement.json", "inverse_displacement.nii.gz",
         "inverse_displacement.json", "jacobian.nii.gz", "confidence.nii.gz", "uncertainty.nii.gz",
         "force.nii.gz", "force.json", "warped_labels.nii.gz",
         "overview.png", "report.html", "summary.json", "affine.tfm"}


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
    found = register(*pair[:2], checkpoint=smoke[0] if method == "drivenmorph" else None, method=method,
                     refine_steps=5 if request.param == "refined" else 0,
                     fixed_labels=pair[2], moving_labels=pair[3])
    found.save(out)
    return out, found.summary


def test_images_of_one_size_are_compiled_for_once(smoke, pair, monkeypatch):
    def refused(*_):
        raise AssertionError("compiled again")
    first = register(*pair[:2], checkpoint=smoke[0], affine=False, refine_steps=0, quiet=True)
    monkeypatch.setattr(sharding, "compiled_and_memory", refused)
    again = register(*pair[:2], checkpoint=smoke[0], affine=False, refine_steps=0, quiet=True)
    np.testing.assert_array_equal(again.warped.dataobj, first.warped.dataobj)


def test_everything_promised_is_written_and_nothing_else(result):
    out, summary = result
    assert {path.name for path in out.iterdir()} == FILES
    assert json.loads((out / "summary.json").read_text()) == summary
    assert {"read", "affine", "resample", "transform", "score", "total"} < set(summary["seconds"])
    assert summary["similarity_after"] > summary["similarity_before"]
    assert summary["dice_after"] > summary["dice_before"]
    assert summary["fold_pct"] < 0.01


def test_outputs_lie_on_the_fixed_grid_with_its_header(result, pair):
    out, _ = result
    fixed, moving = (nib.load(path) for path in pair[:2])
    for name in ("warped", "jacobian", "force", "warped_labels"):
        image = nib.load(out / f"{name}.nii.gz")
        assert image.shape[:3] == fixed.shape
        np.testing.assert_allclose(image.affine, fixed.affine, atol=1e-4)
        assert image.header["sform_code"] == fixed.header["sform_code"]
    for name, image in (("displacement", fixed), ("inverse_displacement", moving)):  # with a margin on all sides
        field = nib.load(out / f"{name}.nii.gz")
        start = np.linalg.solve(field.affine, image.affine[:, 3])[:3]
        np.testing.assert_allclose(start, np.rint(start), atol=1e-3)
        assert (start > -0.5).all() and (start + image.shape <= np.array(field.shape[:3]) + 0.5).all()
        np.testing.assert_allclose(field.affine[:3, :3], image.affine[:3, :3], atol=1e-4)
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
    fixed, moving, warped = (np.asarray(nib.load(path).dataobj).astype(int)
                             for path in (*pair[2:], out / "warped_labels.nii.gz"))
    labels = np.intersect1d(fixed[fixed > 0], moving)
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


def test_a_labelled_pair_that_shares_its_grid_needs_no_affine(brains, smoke):
    names = [str(brains / f"sub-00{i}_{kind}.nii.gz") for kind in ("t1", "seg") for i in (0, 1)]
    summary = register(*names[:2], checkpoint=smoke[0], affine=False, fixed_labels=names[2],
                       moving_labels=names[3]).summary
    fixed, moving = (load_labels(name).data for name in names[2:])
    assert summary["dice_before"] == pytest.approx(metrics.mean_dice(fixed, moving), abs=1e-6)
    assert "affine" in summary["seconds"] and summary["affine"] is False


@pytest.mark.parametrize("force", ["intensity", "mind"])
def test_every_force_of_demons_registers(force, brains):
    names = [str(brains / f"sub-00{i}_{kind}.nii.gz") for kind in ("t1", "seg") for i in (0, 1)]
    summary = register(*names[:2], method="demons", force=force, affine=False, fixed_labels=names[2],
                       moving_labels=names[3]).summary
    assert summary["dice_after"] > summary["dice_before"] + 0.05 and summary["fold_pct"] < 0.01


def test_progress_is_told_by_stage(brains, tmp_path, capsys):
    found = register(*(str(brains / f"sub-00{i}_t1.nii.gz") for i in (0, 1)), method="demons", affine=False)
    found.save(tmp_path)
    told = capsys.readouterr().out
    for stage in ("read", "affine", "resample", "demons", "transform", "score"):
        assert re.search(rf"{stage} \.\.\. \d+\.\d s", told)
    assert not (tmp_path / "warped_labels.nii.gz").exists()


def test_from_python_with_images_and_arrays(brains, tmp_path, capsys):
    import drivenmorph_jax

    fixed, moving = (nib.load(brains / f"sub-00{i}_t1.nii.gz") for i in (0, 1))
    found = drivenmorph_jax.register(fixed, moving, method="demons", affine=False, quiet=True)
    assert capsys.readouterr().out == ""
    assert found.warped.shape == fixed.shape and found.force.shape == (*fixed.shape, 3)
    np.testing.assert_allclose(found.transform.apply(moving).get_fdata(), found.warped.get_fdata(), atol=1e-3)
    assert found.report(tmp_path / "page.html").stat().st_size > 100_000
    arrays = drivenmorph_jax.register(np.asarray(fixed.dataobj), np.asarray(moving.dataobj), method="demons",
                                      affine=False, quiet=True)
    assert arrays.warped.shape == fixed.shape and arrays.summary["fold_pct"] == 0
    assert arrays.summary["similarity_after"] > arrays.summary["similarity_before"] + 0.05


def test_other_forms_of_the_transform_are_written_by_bids_names(brains, tmp_path):
    found = register(*(str(brains / f"sub-00{i}_t1.nii.gz") for i in (0, 1)), method="demons", quiet=True)
    found.save(tmp_path, ("itk", "ras", "h5", "l2r", "freesurfer", "fsl", "spm", "afni"), ("sub-01", "T1w", "MNI"))
    there, back = "sub-01_from-T1w_to-MNI_mode-image_xfm", "sub-01_from-MNI_to-T1w_mode-image_xfm"
    assert {path.name for path in tmp_path.iterdir()} >= {"affine.tfm", "affine.lta"} | {
        f"{start}{stem}{ending}" for stem in (there, back) for start, ending in (
            ("", ".nii.gz"), ("", ".json"), ("", "_ras.nii.gz"), ("", ".h5"), ("", ".mgz"), ("", "_fsl.nii.gz"),
            ("", "_afni.nii.gz"), ("y_", ".nii"))}
    assert (tmp_path / "disp_sub-000_t1_sub-001_t1.nii.gz").exists()
    composite = sitk.ReadTransform(str(tmp_path / f"{there}.h5"))
    fixed, moving = (sitk.ReadImage(str(brains / f"sub-00{i}_t1.nii.gz"), sitk.sitkFloat32) for i in (0, 1))
    theirs = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, composite, sitk.sitkLinear, 0.0))
    ours = found.warped.get_fdata().transpose(2, 1, 0)
    brain = ndimage.binary_erosion(sitk.GetArrayFromImage(fixed) > 0, iterations=2)
    assert np.abs(theirs - ours)[brain].mean() < 0.002 * np.ptp(ours)


@pytest.mark.parametrize(("name", "whole"), [
    ("a.b.nii.gz", "a.b"), ("a.c.nii", "a.c"), ("x.y.NII.GZ", "x.y"), ("1.2.mgz", "1.2"), ("p.img", "p"),
    ("the array", "the array"), ("sub-01_T1w.nii.gz", "sub-01_T1w")])
def test_a_name_ends_where_the_ending_of_an_image_begins(name, whole):
    assert stem(f"some.folder/{name}") == whole


def test_memory_is_told_and_kept_to(brains, smoke, capsys):
    names = [str(brains / f"sub-00{i}_t1.nii.gz") for i in (0, 1)]
    # Without refinement, whose memory does not depend on the resolution of the network.
    whole = register(*names, checkpoint=smoke[0], affine=False, refine_steps=0)
    told = re.search(r"memory (\d+\.\d) GB", capsys.readouterr().out)
    assert float(told[1]) == pytest.approx(whole.summary["memory_gb"], abs=0.05)
    less = register(*names, checkpoint=smoke[0], affine=False, refine_steps=0, quiet=True,
                    memory=1e9 * whole.summary["memory_gb"] - 1e3)
    assert less.summary["memory_gb"] < whole.summary["memory_gb"]
    assert less.summary["similarity_after"] > less.summary["similarity_before"]
    with pytest.raises(InputError, match=r"sub-000_t1.* need about .* GB of memory, more than 0.1 GB"):
        register(*names, checkpoint=smoke[0], affine=False, memory=1e8, quiet=True)


def test_an_affine_of_ones_own_is_taken_as_it_is(brains, tmp_path):
    names = [str(brains / f"sub-00{i}_t1.nii.gz") for i in (0, 1)]
    shift = np.eye(4)
    shift[:3, 3] = 3, -2, 1
    write_affine(tmp_path / "a.tfm", shift)
    found = register(*names, method="demons", affine=str(tmp_path / "a.tfm"), quiet=True)
    np.testing.assert_allclose(found.transform.linear, shift)
    assert found.summary["affine"] == shift.tolist()


@pytest.mark.parametrize("affine", [False, True])
def test_a_registration_starts_from_a_transform_and_its_result_includes_it(brains, tmp_path, affine):
    names = [str(brains / f"sub-00{i}_t1.nii.gz") for i in (0, 1)]
    labels = {f"{role}_labels": brains / f"sub-00{i}_seg.nii.gz" for i, role in enumerate(("fixed", "moving"))}
    first = register(*names, method="demons", affine=affine, quiet=True, **labels)
    first.transform.save(tmp_path / "first.nii.gz")
    again = register(*names, method="demons", initial_transform=tmp_path / "first.nii.gz", quiet=True, **labels)
    assert again.summary["dice_before"] == pytest.approx(first.summary["dice_after"], abs=0.01)
    gain = first.summary["dice_after"] - first.summary["dice_before"]
    assert again.summary["dice_after"] > first.summary["dice_before"] + 0.8 * gain and again.summary["fold_pct"] == 0
    np.testing.assert_allclose(again.transform.linear, first.transform.linear)
    apart = np.linalg.norm(again.transform.displacement - first.transform.displacement, axis=-1)
    assert apart.mean() < 0.4 * np.linalg.norm(first.transform.displacement, axis=-1).mean()
    points = nib.affines.apply_affine(again.transform.grid.affine, np.argwhere(first.warped.get_fdata() > 300)[::97])
    assert np.linalg.norm(again.transform.inverse.points(again.transform.points(points)) - points, axis=1).mean() < 0.7
    assert again.summary["initial_transform"] == [str(tmp_path / "first.nii.gz")]


@pytest.fixture(scope="module", params=["demons", "drivenmorph"])
def healthy(request, brains, smoke):
    """(paths of two images, settings of their registration, its result)."""
    paths = {role: brains / f"sub-00{i}_t1.nii.gz" for i, role in enumerate(("fixed", "moving"))}
    labels = {f"{role}_labels": str(brains / f"sub-00{i}_seg.nii.gz") for i, role in enumerate(("fixed", "moving"))}
    settings = {"method": request.param, "checkpoint": smoke[0], "affine": False, "quiet": True, "refine_steps": 5,
                **labels}
    return paths, settings, register(paths["fixed"], paths["moving"], **settings)


@pytest.mark.parametrize("side", ["fixed", "moving"])
def test_a_lesion_in_a_mask_changes_little_outside_and_has_no_force(side, healthy, tmp_path):
    """A bright ball is pasted into one brain, where it would pull at everything around it."""
    paths, settings, whole = healthy
    image = nib.load(paths[side])
    data = np.asarray(image.dataobj).copy()
    centre = ndimage.center_of_mass(data > 100) + np.array([4, 3, 2])
    lesion = np.linalg.norm(np.moveaxis(np.indices(data.shape), 0, -1) - centre, axis=-1) < 3.5
    data[lesion] = 2500
    nib.save(nib.Nifti1Image(data, image.affine), tmp_path / "sick.nii.gz")
    nib.save(nib.Nifti1Image(lesion.astype(np.uint8), image.affine), tmp_path / "mask.nii.gz")
    sick = paths | {side: tmp_path / "sick.nii.gz"}
    masked = register(sick["fixed"], sick["moving"], **{f"{side}_mask": tmp_path / "mask.nii.gz"}, **settings)
    unmasked = register(sick["fixed"], sick["moving"], **settings)
    assert abs(masked.summary["dice_after"] - whole.summary["dice_after"]) < 0.02
    far = {name: np.linalg.norm(found.transform.displacement - whole.transform.displacement, axis=-1)[
        np.asarray(nib.load(paths["fixed"]).dataobj) > 100].mean()
           for name, found in (("masked", masked), ("unmasked", unmasked))}
    assert far["masked"] < far["unmasked"]
    if side == "fixed":
        assert not masked.force[lesion].any() and whole.force[lesion].any()
    assert masked.summary["fold_pct"] == 0


@pytest.mark.parametrize(("settings", "sentence"), [
    ({"method": "syn"}, "method is 'syn': set it to 'drivenmorph' or 'demons'"),
    ({"method": "syn", "refine_steps": 0}, "method is 'syn'"),
    ({"method": "demons", "force": "ncc"}, "force is 'ncc': set it to 'lncc', 'intensity' or 'mind'"),
    ({"contrast": "t2"}, "contrast is 't2': set it to 'auto', 'same' or 'other'"),
])
def test_an_unknown_name_is_refused_before_anything_is_read(settings, sentence):
    with pytest.raises(InputError, match=sentence):
        register("nowhere.nii.gz", "nowhere.nii.gz", **settings)


def test_labels_that_do_not_overlap_leave_a_summary_that_is_json(brains, tmp_path):
    names = [str(brains / f"sub-00{i}_{kind}.nii.gz") for kind in ("t1", "seg") for i in (0, 1)]
    for k, name in enumerate(names[2:]):
        image = nib.load(name)
        nib.save(nib.Nifti1Image(((np.asarray(image.dataobj) > 0) * (k + 1)).astype(np.int16), image.affine),
                 tmp_path / f"{k}.nii.gz")
    found = register(*names[:2], method="demons", affine=False, quiet=True, fixed_labels=tmp_path / "0.nii.gz",
                     moving_labels=tmp_path / "1.nii.gz")
    found.save(tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["dice_after"] is None and summary["dice_before"] is None


def test_stages_can_be_called_one_by_one(brains):
    from drivenmorph_jax import registration as r
    request = r.Request(fixed=str(brains / "sub-000_t1.nii.gz"), moving=str(brains / "sub-001_t1.nii.gz"),
                        method="demons", affine=False)
    prepared = r.prepare(r.plan(r.align(r.strip(r.read(request)))))
    assert prepared.fixed_on_grid.shape == prepared.moving_on_grid.shape == prepared.shape
    result = r.result_of(r.score(r.transfer(r.deform(prepared))))
    whole = register(request.fixed, request.moving, method="demons", affine=False, quiet=True)
    np.testing.assert_array_equal(result.transform.displacement, whole.transform.displacement)
    assert result.summary["similarity_after"] == whole.summary["similarity_after"]


def test_beyond_a_cut_the_deformation_has_no_force_and_fades(brains, tmp_path):
    from drivenmorph_jax import registration as r
    names = [str(brains / f"sub-00{i}_{kind}.nii.gz") for kind in ("t1", "seg") for i in (0, 1)]
    whole = register(*names[:2], method="demons", affine=False, quiet=True)
    fixed, image = nib.load(names[0]), nib.load(names[1])
    first = np.flatnonzero((np.asarray(image.dataobj) > 100).any((0, 1)))[0]
    gone = first + 8  # slices below
    for path in names[1::2]:
        part = nib.load(path).slicer[:, :, gone:]
        nib.save(part, tmp_path / path.rsplit("/", 1)[-1])
    moving = tmp_path / "sub-001_t1.nii.gz"
    request = r.Request(fixed=names[0], moving=str(moving), method="demons", affine=False)
    assert r.align(r.strip(r.read(request))).masked
    request = r.Request(fixed=names[0], moving=names[1], method="demons", affine=False)
    assert not r.align(r.strip(r.read(request))).masked
    found = register(names[0], moving, method="demons", affine=False, quiet=True)
    z = nib.affines.apply_affine(fixed.affine, np.moveaxis(np.indices(fixed.shape), 0, -1))[..., 2]
    face = part.affine[2, 3]
    lengths = np.linalg.norm(found.transform.displacement, axis=-1)
    assert not found.force[z < face].any() and found.force[z > face + 10].any()
    assert lengths[z < face - 30].max() < 0.1 < lengths[z > face].max()
    apart = np.linalg.norm(found.transform.displacement - whole.transform.displacement, axis=-1)
    brain = np.asarray(fixed.dataobj) > 100
    assert apart[brain & (z > face + 20)].mean() < 0.4 * lengths[brain & (z > face + 20)].mean()
    assert found.summary["fold_pct"] == 0


def test_the_affine_has_names(brains):
    from drivenmorph_jax import registration as r
    pair = r.read(r.Request(fixed=str(brains / "sub-000_t1.nii.gz"), moving=str(brains / "sub-001_t1.nii.gz"),
                            method="demons", affine="rigid"))
    linear = r.align(r.strip(pair)).affine[:3, :3]
    np.testing.assert_allclose(linear.T @ linear, np.eye(3), atol=1e-6)
    assert not np.allclose(linear, np.eye(3), atol=1e-4)
    none = r.read(r.Request(fixed=pair.request.fixed, moving=pair.request.moving, method="demons", affine="none"))
    np.testing.assert_array_equal(r.align(r.strip(none)).affine, np.eye(4))
