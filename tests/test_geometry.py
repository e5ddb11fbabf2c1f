"""Which affine of a file holds: compared with nibabel and SimpleITK."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from drivenmorph_jax.errors import InputError, InputWarning
from drivenmorph_jax.images import writing
from drivenmorph_jax.images.geometry import checked, sheared
from drivenmorph_jax.images.reading import load_image, load_labels, load_mask

SHAPE = (7, 9, 11)
DATA = np.random.default_rng(0).random(SHAPE).astype(np.float32)
SFORM = np.array([[-2.0, 0, 0, 10], [0, 1.5, 0, -20], [0, 0, 3, 5], [0, 0, 0, 1]])
TURN = nib.eulerangles.euler2mat(0.1, 0.2, 0.3)


def moved(affine, shift):
    out = affine.copy()
    out[:3, 3] += shift
    return out


def file(path, sform, sform_code, qform, qform_code):
    image = nib.Nifti1Image(DATA, sform)
    image.set_sform(sform, sform_code)
    image.set_qform(qform, qform_code)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return path


def affine_by_itk(path):
    """Voxel to RAS mm, as SimpleITK reads the file."""
    image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return np.diag([-1, -1, 1, 1]) @ affine


@pytest.mark.parametrize("sform_code", [1, 2, 4])
def test_where_qform_and_sform_differ_one_holds_and_the_other_tools_are_named(tmp_path, sform_code):
    path = file(tmp_path / "a.nii", SFORM, sform_code, moved(SFORM, (0, 15, -8)), 1)
    by_itk = "sform" if np.allclose(affine_by_itk(path), SFORM, atol=1e-4) else "qform"
    assert by_itk == ("sform" if sform_code == 1 else "qform")
    for geometry, affine in (("sform", SFORM), ("qform", moved(SFORM, (0, 15, -8))), ("LAS", SFORM)):
        with pytest.warns(InputWarning, match=f"a.nii differ by 17 mm; .* ITK uses the {by_itk}"):
            np.testing.assert_allclose(load_image(path, geometry).affine, affine, atol=1e-4)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("sform_code", "qform_code"), [(1, 0), (0, 1), (2, 0), (2, 1), (1, 4)])
def test_where_they_agree_or_one_is_missing_nothing_is_said_and_itk_reads_the_same(tmp_path, sform_code, qform_code):
    turned = SFORM.copy()
    turned[:3, :3] = TURN @ turned[:3, :3]
    path = file(tmp_path / "a.nii", turned, sform_code, turned, qform_code)
    for geometry in ("sform", "qform"):
        np.testing.assert_allclose(load_image(path, geometry).affine, turned, atol=1e-4)
    np.testing.assert_allclose(affine_by_itk(path), turned, atol=1e-4)


READERS = {"image": load_image, "labels": lambda path, geometry="sform": load_labels(path, None, geometry),
           "mask": lambda path, geometry="sform": load_mask(path, None, geometry)}


@pytest.mark.parametrize("kind", READERS)
def test_a_file_that_does_not_say_which_side_is_left_is_refused_unless_the_user_says_it(tmp_path, kind):
    image = nib.Nifti1Image((DATA > 0.5).astype(np.int16), SFORM)
    image.set_sform(SFORM, 0)
    image.set_qform(SFORM, 0)
    nib.save(image, tmp_path / "a.nii")
    with pytest.raises(InputError, match="a.nii does not say which side is left .* such as LAS"):
        READERS[kind](tmp_path / "a.nii")
    affine = READERS[kind](tmp_path / "a.nii", "LAS").affine
    assert nib.aff2axcodes(affine) == ("L", "A", "S")
    np.testing.assert_allclose(nib.affines.voxel_sizes(affine), (2, 1.5, 3))
    np.testing.assert_allclose(affine @ [3, 4, 5, 1], (0, 0, 0, 1), atol=1e-6)  # the middle voxel


def test_axes_may_have_any_order(tmp_path):
    image = nib.Nifti1Image(DATA, SFORM)
    image.set_sform(SFORM, 0)
    assert nib.aff2axcodes(load_image(image, "SPR").affine) == ("S", "P", "R")
    for wrong in ("LLS", "las", "scanner", "RA"):
        with pytest.raises(InputError, match="set it to sform, to qform, or"):
            checked(wrong)


@pytest.mark.parametrize("qform_code", [0, 1])
def test_what_is_written_on_a_sheared_grid_is_refused_by_itk_and_never_read_elsewhere(tmp_path, qform_code):
    skew = np.eye(4)
    skew[0, 1] = 0.15
    path = file(tmp_path / "a.nii", skew @ SFORM, 2, SFORM, qform_code)
    with pytest.warns(InputWarning, match="ITK does not read"):
        volume = load_image(path)
    assert sheared(volume.affine) and not sheared(SFORM)
    writing.save(tmp_path / "b.nii", DATA, volume)
    np.testing.assert_allclose(nib.load(tmp_path / "b.nii").affine, skew @ SFORM, atol=1e-4)
    with pytest.raises(RuntimeError, match="orthonormal"):
        sitk.ReadImage(str(tmp_path / "b.nii"))


def test_what_is_written_on_a_grid_is_read_alike_by_nibabel_and_itk(tmp_path):
    path = file(tmp_path / "a.nii", SFORM, 2, moved(SFORM, (0, 15, -8)), 1)
    for geometry, affine in (("sform", SFORM), ("qform", moved(SFORM, (0, 15, -8)))):
        with pytest.warns(InputWarning):
            writing.save(tmp_path / "b.nii", DATA, load_image(path, geometry))
        for read in (nib.load(tmp_path / "b.nii").affine, affine_by_itk(tmp_path / "b.nii")):
            np.testing.assert_allclose(read, affine, atol=1e-4)
