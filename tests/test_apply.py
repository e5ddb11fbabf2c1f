"""apply.py, and `Transform`: what a registration wrote, on other files."""

import csv

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.affines import apply_affine
from test_programs import refused, run
from test_transforms import GRIDS, WORK, T, points_of, smooth_field, volume_on

import apply as apply_program
from drivenmorph_jax.fields.inverse import inverse
from drivenmorph_jax.images.volume import on_grid
from drivenmorph_jax.transforms.transform import Transform
from drivenmorph_jax.transforms.world import (
    linear_part,
    pull_back,
    total_displacement,
    total_inverse_displacement,
)

KINDS = [("isotropic", "isotropic"), ("anisotropic", "flipped"), ("flipped", "oblique"), ("oblique", "anisotropic")]


def made(tmp_path, fixed_grid, moving_grid):
    fixed = volume_on(tmp_path / "fixed.nii.gz", *GRIDS[fixed_grid])
    moving = volume_on(tmp_path / "moving.nii.gz", *GRIDS[moving_grid])
    u = smooth_field(WORK[0], 1.5)
    there = total_displacement(fixed.data.shape, fixed.affine, u, WORK[1], T)
    back = total_inverse_displacement(moving.data.shape, moving.affine, np.asarray(inverse(u)), WORK[1], T)
    return Transform(there, fixed, T, moving, back)


def command(monkeypatch, capsys, *arguments):
    return run(apply_program, arguments, monkeypatch, capsys)


@pytest.mark.parametrize("grids", KINDS)
def test_itk_reads_every_form_of_a_transform_as_we_do(tmp_path, grids):
    transform = made(tmp_path, *grids)
    names = [tmp_path / f"a{ending}" for ending in (".nii.gz", ".h5")]
    for name in names:
        transform.save(name)
    readers = [sitk.DisplacementFieldTransform(sitk.Cast(sitk.ReadImage(names[0]), sitk.sitkVectorFloat64)),
               sitk.ReadTransform(names[1])]
    ours = np.asarray(transform.apply(transform.other.path).dataobj)
    inside = np.asarray(transform.apply(nib.Nifti1Image(np.ones(transform.other.data.shape, np.float32),
                                                        transform.other.affine)).dataobj) > 0.999
    for itk in readers:
        theirs = sitk.GetArrayFromImage(sitk.Resample(sitk.ReadImage(transform.other.path),
                                                      sitk.ReadImage(transform.grid.path), itk, sitk.sitkLinear))
        assert np.abs(ours - theirs.transpose(2, 1, 0))[inside].mean() < 0.002 * np.ptp(ours)
    # A composite holds the affine apart, so that it goes on beyond the field's grid.
    far = np.array([300.0, 200.0, -100.0])
    lps = np.array([-1, -1, 1])
    np.testing.assert_allclose(np.array(readers[1].TransformPoint((far * lps).tolist())) * lps, apply_affine(T, far))


@pytest.mark.parametrize("grids", KINDS)
def test_ants_applies_the_file_as_we_do(tmp_path, grids):
    ants = pytest.importorskip("ants", reason="needs ANTsPy")
    transform = made(tmp_path, *grids)
    transform.save(tmp_path / "d.nii.gz")
    fixed, moving = (ants.image_read(volume.path) for volume in (transform.grid, transform.other))
    theirs = ants.apply_transforms(fixed, moving, [str(tmp_path / "d.nii.gz")]).numpy()
    ours = np.asarray(transform.apply(transform.other.path).dataobj)
    inside = np.asarray(transform.apply(nib.Nifti1Image(np.ones(transform.other.data.shape, np.float32),
                                                        transform.other.affine)).dataobj) > 0.999
    assert np.abs(ours - theirs)[inside].mean() < 0.002 * np.ptp(ours)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("grids", KINDS)
def test_forward_then_inverse_returns(tmp_path, grids, known):
    transform = made(tmp_path, *grids)
    if not known:  # as it comes from the file: the inverse has to be found
        transform.save(tmp_path / "d.nii.gz")
        transform = Transform.load(tmp_path / "d.nii.gz")
        np.testing.assert_allclose(transform.linear, T)
    points = np.random.default_rng(0).uniform(-8, 8, (300, 3))
    there = transform.points(points)
    assert np.linalg.norm(there - points, axis=1).mean() > 1
    assert np.linalg.norm(transform.inverse.points(there) - points, axis=1).mean() < 0.1
    both = transform.compose(transform.inverse)
    assert np.linalg.norm(both.points(points) - points, axis=1).mean() < 0.1
    assert both.names == ("fixed", "fixed") and transform.inverse.names == ("moving", "fixed")


def test_composition_takes_the_second_where_the_first_leads(tmp_path):
    shape, affine = GRIDS["oblique"]
    grid = on_grid(shape, affine)
    x = points_of(shape, affine)
    first, second = (Transform((apply_affine(m, x) - x).astype(np.float32), grid, m, grid)
                     for m in (T, np.diag([1.1, 0.9, 1, 1])))
    points = np.random.default_rng(0).uniform(-5, 5, (50, 3))
    np.testing.assert_allclose(first.compose(second).points(points), second.points(first.points(points)), atol=1e-3)
    np.testing.assert_allclose(first.compose(second).linear, second.linear @ first.linear)


def test_the_affine_part_is_found_where_no_sidecar_tells_it():
    shape, affine = GRIDS["anisotropic"]
    x = points_of(shape, affine)
    displacement = (apply_affine(T, x) - x).astype(np.float32)
    np.testing.assert_allclose(linear_part(displacement, affine), T, atol=1e-5)


def test_images_labels_and_series_follow(tmp_path, monkeypatch, capsys):
    transform = made(tmp_path, "flipped", "oblique")
    transform.save(tmp_path / "d.nii.gz")
    moving = transform.other
    labels = (moving.data > 60).astype(np.uint8) * 7
    nib.save(nib.Nifti1Image(labels, moving.affine), tmp_path / "labels.nii.gz")
    nib.save(nib.Nifti1Image(np.stack([moving.data, 2 * moving.data], -1), moving.affine), tmp_path / "series.nii.gz")
    status, _ = command(monkeypatch, capsys, "--transform", tmp_path / "d.nii.gz", "--moving", moving.path,
                        tmp_path / "series.nii.gz", "--out", tmp_path / "moved")
    assert status == 0
    image, series = (nib.load(tmp_path / "moved" / name) for name in ("moving.nii.gz", "series.nii.gz"))
    np.testing.assert_allclose(image.affine, transform.grid.affine, atol=1e-5)
    expected = pull_back(moving, transform.displacement, transform.grid.affine)
    np.testing.assert_allclose(image.dataobj, expected, atol=1e-3)
    np.testing.assert_allclose(np.asarray(series.dataobj)[..., 1], 2 * expected, atol=1e-3)
    status, _ = command(monkeypatch, capsys, "--transform", tmp_path / "d.nii.gz", "--moving",
                        tmp_path / "labels.nii.gz", "--out", tmp_path / "l.nii.gz", "--interpolation", "nearest")
    found = nib.load(tmp_path / "l.nii.gz")
    assert status == 0 and found.get_data_dtype() == np.uint8 and set(np.unique(found.dataobj)) == {0, 7}


def test_the_inverse_brings_the_fixed_image_to_the_moving_one(tmp_path, monkeypatch, capsys):
    transform = made(tmp_path, "isotropic", "oblique")
    transform.save(tmp_path / "d.nii.gz")
    arguments = ("--transform", tmp_path / "d.nii.gz", "--inverse", "--moving", transform.grid.path, "--out",
                 tmp_path / "back.nii.gz")
    assert command(monkeypatch, capsys, *arguments)[0] == 0
    expected = pull_back(transform.grid, transform.backward, transform.other.affine)
    found = nib.load(tmp_path / "back.nii.gz")
    assert np.abs(found.get_fdata() - expected).mean() < 0.01 * np.ptp(expected)
    (tmp_path / "d.json").unlink()
    refused(*command(monkeypatch, capsys, *arguments), "--reference")
    assert command(monkeypatch, capsys, *arguments, "--reference", transform.other.path)[0] == 0
    assert np.abs(nib.load(tmp_path / "back.nii.gz").get_fdata() - expected).mean() < 0.01 * np.ptp(expected)


def test_points_move_from_fixed_to_moving(tmp_path, monkeypatch, capsys):
    transform = made(tmp_path, "oblique", "anisotropic")
    transform.save(tmp_path / "d.nii.gz")
    points = np.random.default_rng(0).uniform(-8, 8, (5, 3))
    with (tmp_path / "p.csv").open("w") as file:
        csv.writer(file).writerows([("name", "x", "y", "z"), *(("a", *point) for point in points)])
    assert command(monkeypatch, capsys, "--transform", tmp_path / "d.nii.gz", "--points", tmp_path / "p.csv", "--out",
                   tmp_path / "q.csv")[0] == 0
    rows = list(csv.DictReader((tmp_path / "q.csv").open()))
    found = np.array([[float(row[axis]) for axis in "xyz"] for row in rows])
    np.testing.assert_allclose(found, transform.points(points), atol=1e-3)
    assert [row["name"] for row in rows] == ["a"] * 5


def test_what_cannot_be_used_is_said_in_one_sentence(tmp_path, monkeypatch, capsys):
    transform = made(tmp_path, "isotropic", "isotropic")
    field, out = tmp_path / "d.nii.gz", tmp_path / "out.nii.gz"
    transform.save(field)
    moving = transform.other.path
    (tmp_path / "no.csv").write_text("a,b\n1,2\n")
    (tmp_path / "text.csv").write_text("x,y,z\n1,2,three\n")
    cases = {
        "1007": ("--transform", moving, "--moving", moving, "--out", out),
        "does not exist": ("--transform", field, "--moving", tmp_path / "none.nii", "--out", out),
        "must end in .nii": ("--transform", field, "--moving", moving, "--out", tmp_path / "out.png"),
        "one name": ("--transform", field, "--moving", moving, moving, "--out", tmp_path / "folder"),
        "no.csv": ("--transform", field, "--points", tmp_path / "no.csv", "--out", out),
        "text.csv": ("--transform", field, "--points", tmp_path / "text.csv", "--out", out),
        "missing.csv": ("--transform", field, "--points", tmp_path / "missing.csv", "--out", out),
    }
    for words, arguments in cases.items():
        refused(*command(monkeypatch, capsys, *arguments), words)
    assert not out.exists()
