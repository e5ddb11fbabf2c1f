"""apply.py, and `Transform`: what a registration wrote, on other files."""

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.affines import apply_affine
from scipy import ndimage
from test_programs import refused, run
from test_transforms import GRIDS, WORK, T, points_of, smooth_field, volume_on

import apply as apply_program
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.fields.inverse import inverse
from drivenmorph_jax.images import writing
from drivenmorph_jax.images.volume import Volume, on_grid
from drivenmorph_jax.images.writing import to_nibabel
from drivenmorph_jax.registration.apply import apply_files
from drivenmorph_jax.registration.register import register
from drivenmorph_jax.transforms.transform import Transform
from drivenmorph_jax.transforms.world import (
    linear_part,
    pull_back,
    total_displacement,
    total_inverse_displacement,
)

pytestmark = pytest.mark.usefixtures("no_pictures")

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


def test_of_several_images_a_broken_one_is_named_and_the_others_are_moved(tmp_path, monkeypatch, capsys):
    transform = made(tmp_path, "isotropic", "isotropic")
    field, out, broken = tmp_path / "d.nii.gz", tmp_path / "out", tmp_path / "broken.nii.gz"
    transform.save(field)
    broken.write_bytes(b"no image")
    code, told = command(monkeypatch, capsys, "--transform", field, "--moving", broken, transform.other.path, "--out",
                         out)
    assert code == 4 and told.startswith("skipped: ") and told.count("\n") == told.count("broken.nii.gz") == 1
    assert [path.name for path in out.iterdir()] == [Path(transform.other.path).name]


SMALL = (6, 7, 8)


@pytest.fixture
def shift(tmp_path):
    """A field on a grid of 1 mm that brings image(i + 1, j, k) to voxel (i, j, k)."""
    grid, path = on_grid(SMALL, np.eye(4)), tmp_path / "shift.nii.gz"
    Transform(np.broadcast_to(np.float32([1, 0, 0]), (*SMALL, 3)), grid, np.eye(4), grid).save(path)
    return path


def shifted(data):
    return np.concatenate([data[1:], np.zeros_like(data[:1])])


def saved(path, data, affine=None, change=None):
    image = nib.Nifti1Image(data, np.eye(4) if affine is None else affine, dtype=data.dtype)
    if change:
        change(image.header)
    nib.save(image, path)
    return path


def moved(shift, image, interpolation="linear", **settings):
    path, = apply_files(shift, shift.with_name("out.nii.gz"), [image], interpolation=interpolation, **settings)
    return nib.load(path)


def random(shape=SMALL, dtype=np.int16):
    return np.random.default_rng(0).integers(1, 100, shape).astype(dtype)


@pytest.mark.parametrize("dtype", ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8", ">i2", ">f8"])
def test_nearest_keeps_every_value_and_the_type(tmp_path, shift, dtype):
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        hard = [0.1, -1 / 3, 2**24 + 1, 614_454_001, 2**53 - 1, np.finfo(dtype).max, np.finfo(dtype).tiny]
    else:
        ends = np.iinfo(dtype)
        hard = [ends.min, ends.max, ends.max - 1, *(
            n for n in (2**24 + 1, 2**31 + 1, 2**53 + 1, 2**63 + 1) if n < ends.max)]
    data = np.random.default_rng(0).choice(np.array(hard, dtype), SMALL)
    path = saved(tmp_path / "labels.nii.gz", data)
    transform = Transform.load(shift)
    for found in (moved(shift, path, "nearest"), transform.apply(nib.load(path), "nearest"),
                  transform.apply(data, "nearest")):
        assert found.get_data_dtype() == dtype.newbyteorder("=")
        np.testing.assert_array_equal(np.asarray(found.dataobj), shifted(data))
        assert np.asarray(found.dataobj).dtype.kind == dtype.kind


def test_nearest_keeps_the_real_values_of_a_file_with_a_scale_factor(tmp_path, shift):
    path = tmp_path / "scaled.nii"
    saved(path, random())
    raw = bytearray(path.read_bytes())
    raw[112:120] = np.array([0.3, 7], "<f4").tobytes()  # scl_slope, scl_inter
    path.write_bytes(raw)
    values = np.asarray(nib.load(path).dataobj)
    assert values.max() > 30
    found = moved(shift, path, "nearest")
    assert found.get_data_dtype() == np.float64
    np.testing.assert_array_equal(np.asarray(found.dataobj), shifted(values))


def test_arrays_of_types_that_nifti_lacks(shift):
    transform = Transform.load(shift)
    found = transform.apply(random() > 50, "nearest")
    assert found.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(found.dataobj, shifted(random() > 50))
    np.testing.assert_array_equal(transform.apply(random(dtype=np.float16), "nearest").dataobj, shifted(random()))
    for data in (random(dtype=np.longdouble), np.full(SMALL, "a")):
        with pytest.raises(InputError, match="convert it"):
            transform.apply(data, "nearest")


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float64])
def test_linear_gives_float32(tmp_path, shift, dtype):
    found = moved(shift, saved(tmp_path / "image.nii", random(dtype=dtype)))
    assert found.get_data_dtype() == np.float32
    np.testing.assert_allclose(found.dataobj, shifted(random()), rtol=1e-6)


def test_nearest_picks_the_voxel_that_scipy_picks():
    rng, data = np.random.default_rng(0), random()
    voxel = np.where(rng.random((*SMALL, 3)) < 0.3, rng.integers(-3, 18, (*SMALL, 3)) / 2, rng.uniform(-3, 11, 3))
    displacement = voxel - points_of(SMALL, np.eye(4))
    found = pull_back(Volume(data, np.eye(4), None, ""), displacement, np.eye(4), "nearest")
    theirs = ndimage.map_coordinates(data, np.moveaxis(voxel, -1, 0), order=0, mode="grid-constant")
    assert 0.05 < (theirs > 0).mean() < 0.95
    np.testing.assert_array_equal(found, theirs)


def test_register_keeps_the_type_of_the_labels(brains, tmp_path):
    labels = nib.load(brains / "sub-001_seg.nii.gz")
    data = np.where(np.asarray(labels.dataobj) > 0, np.asarray(labels.dataobj, np.int64) + 70_000, 0)
    found = register(*(brains / f"sub-00{i}_t1.nii.gz" for i in (0, 1)), method="demons", affine=False, quiet=True,
                     moving_labels=saved(tmp_path / "seg.nii.gz", data, labels.affine)).warped_labels
    assert found.get_data_dtype() == np.int64 and set(np.unique(found.dataobj)) == set(np.unique(data))


@pytest.mark.parametrize("largest, dtype, stored", [
    (200, "u1", "u1"), (256, "u1", "i4"), (2**24 + 1, "f4", "i4"), (2**24 + 2, "f4", "f4"), (2**31 - 1, "f8", "f8"),
    (2**31 - 1, "u8", "u8"), (300, ">i2", "i2")])
def test_a_type_is_kept_where_it_holds_every_label(largest, dtype, stored):
    labels = np.full(SMALL, largest, np.int32)
    image = to_nibabel(labels, on_grid(SMALL, np.eye(4)), dtype=np.dtype(dtype))
    assert image.get_data_dtype() == np.dtype(stored)
    np.testing.assert_array_equal(image.dataobj, labels)


def test_whole_numbers_beyond_32_bits_are_written_as_they_are(tmp_path):
    labels = np.full(SMALL, 2**31, np.int64)
    writing.save(tmp_path / "labels.nii.gz", labels, on_grid(SMALL, np.eye(4)))
    np.testing.assert_array_equal(nib.load(tmp_path / "labels.nii.gz").dataobj, labels)


@pytest.mark.parametrize("voxels", [
    np.zeros(SMALL, np.int16), np.ones(SMALL, np.int16), np.full(SMALL, np.nan, np.float32), -random(),
    random((*SMALL, 2)), np.zeros(SMALL, [("R", "u1"), ("G", "u1"), ("B", "u1")])])
def test_a_reference_needs_only_its_grid(tmp_path, shift, voxels):
    affine = np.diag([1.0, 2, 1, 1])
    reference = saved(tmp_path / "reference.nii.gz", voxels, affine, lambda header: header.set_xyzt_units("mm", "sec"))
    found = moved(shift, saved(tmp_path / "image.nii.gz", random()), "nearest", reference=reference)
    np.testing.assert_array_equal(found.affine, affine)
    assert found.shape == SMALL and found.header["sform_code"] == nib.load(reference).header["sform_code"]
    np.testing.assert_array_equal(found.dataobj[:, :4], shifted(random())[:, ::2])


def test_a_reference_that_has_no_grid(tmp_path, shift):
    image = saved(tmp_path / "image.nii.gz", random())
    for name, shape in (("flat", SMALL[:2]), ("thin", (6, 1, 8))):
        reference = saved(tmp_path / f"{name}.nii.gz", random(shape))
        with pytest.raises(InputError, match=name):
            moved(shift, image, reference=reference)


@pytest.mark.parametrize("interpolation", ["linear", "nearest"])
@pytest.mark.parametrize("unit, time", [("sec", 2.5), ("msec", 2500), ("usec", 2.5e6)])
def test_a_series_keeps_its_times(tmp_path, shift, unit, time, interpolation):
    def change(header):
        header.set_xyzt_units("mm", unit)
        header["pixdim"][4], header["toffset"], header["slice_code"], header["slice_duration"] = time, 5, 1, time / 8

    series = random((*SMALL, 3))
    found = moved(shift, saved(tmp_path / "series.nii.gz", series, change=change), interpolation)
    np.testing.assert_array_equal(found.dataobj, shifted(series))
    assert found.header.get_zooms()[3] == time and found.header["toffset"] == 5
    assert found.header.get_xyzt_units() == ("mm", unit)
    assert found.header["slice_code"] == 0  # the slices are no longer those that were measured


def test_a_series_of_freesurfer_has_its_repetition_time_in_milliseconds(tmp_path, shift):
    series = nib.MGHImage(random((*SMALL, 2)), np.eye(4))
    series.header.set_zooms((1, 1, 1, 2000))
    nib.save(series, tmp_path / "series.mgz")
    for source in (tmp_path / "series.mgz", series):
        header = Transform.load(shift).apply(source).header
        assert header.get_zooms()[3] == 2000 and header.get_xyzt_units() == ("mm", "msec")


@pytest.mark.parametrize("shape, left", [
    ((), ()), ((1,), (1,)), ((1, 1), ()), ((1, 1, 1, 1), ()), ((3,), (3,)), ((3, 1), (3,)), ((3, 1, 1), (3,))])
def test_axes_of_length_one_at_the_end_are_dropped(tmp_path, shift, shape, left):
    data = random((*SMALL, *shape))
    found = moved(shift, saved(tmp_path / "image.nii.gz", data), "nearest")
    assert found.shape == (*SMALL, *left)
    np.testing.assert_array_equal(found.dataobj, shifted(data).reshape(found.shape))


@pytest.mark.parametrize("shape", [(1, 3), (2, 3), (1, 1, 3)])
def test_other_axes_are_refused(tmp_path, shift, shape):
    with pytest.raises(InputError, match="vectors.*3-D image or a 4-D series"):
        moved(shift, saved(tmp_path / "vectors.nii.gz", random((*SMALL, *shape))))


@pytest.mark.parametrize("interpolation", ["linear", "nearest"])
@pytest.mark.parametrize("where, inside", [(0, True), (400, False), (5.4, True), (6.4, True), (6.6, False),
                                           (-4.4, True), (-4.6, False)])
def test_an_image_without_overlap_is_refused(tmp_path, shift, where, inside, interpolation):
    affine = np.eye(4)  # the grid's centres are moved to 1 ... 6 mm along x
    affine[0, 3] = where
    image, out = saved(tmp_path / "image.nii.gz", random(), affine), tmp_path / "out.nii.gz"
    if inside:
        moved(shift, image, interpolation)
        return
    with pytest.raises(InputError, match="image.nii.gz and the grid of .*shift.nii.gz do not overlap.*give.*--inverse"):
        moved(shift, image, interpolation)
    assert not out.exists()


def test_overlap_is_that_of_the_grid_of_the_result(tmp_path, shift, monkeypatch, capsys):
    far = np.eye(4)
    far[1, 3] = 50
    near, away = (saved(tmp_path / f"{name}.nii.gz", random((*SMALL, 2)), affine)
                  for name, affine in (("near", np.eye(4)), ("away", far)))
    assert moved(shift, away, reference=away).shape == (*SMALL, 2)
    out = tmp_path / "none.nii.gz"
    cases = [(near, away, ("--reference", away)), (away, near, ("--reference", near)), (away, shift, ("--inverse",))]
    for moving, grid, arguments in cases:
        said = command(monkeypatch, capsys, "--transform", shift, "--moving", moving, "--out", out, *arguments)
        refused(*said, f"{moving} and the grid of {grid} do not overlap")
    assert not out.exists()


def test_an_image_of_zeros_is_no_error(tmp_path, shift):
    assert not moved(shift, saved(tmp_path / "zeros.nii.gz", np.zeros(SMALL, np.uint8)), "nearest").get_fdata().any()
