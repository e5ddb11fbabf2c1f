import gzip
import zlib

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.images import writing
from drivenmorph_jax.images.intensity import normalise
from drivenmorph_jax.images.reading import load_image, load_labels
from drivenmorph_jax.images.volume import Volume, canonical, resample
from drivenmorph_jax.images.working_grid import working_grid

SHAPE = (14, 11, 9)
DATA = np.random.default_rng(0).integers(0, 900, SHAPE).astype(np.int16)


def oblique(spacing=(1.0, 1.0, 1.0), angles=(0.2, -0.3, 0.4), origin=(-20.0, 15.0, 7.0)):
    affine = np.eye(4)
    affine[:3, :3] = nibabel.eulerangles.euler2mat(*angles) * spacing
    affine[:3, 3] = origin
    return affine


def write(path, data=DATA, affine=None, change=None):
    image = nibabel.Nifti1Image(data, np.diag([2.0, 2.0, 3.0, 1.0]) if affine is None else affine)
    if change:
        change(image)
    nibabel.save(image, path)
    return path


def volume(data, affine):
    return Volume(data, affine, nibabel.Nifti1Header(), "memory")


def refused(call, path, *words):
    with pytest.raises(InputError) as caught:
        call()
    sentence = str(caught.value)
    assert str(path) in sentence and "\n" not in sentence
    for word in words:
        assert word in sentence


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_image_is_read_as_float_with_its_spacing(tmp_path, ending):
    path = write(tmp_path / f"a{ending}")
    image = load_image(path)
    assert image.data.dtype == np.float32 and image.path == str(path)
    np.testing.assert_array_equal(image.data, DATA)
    np.testing.assert_allclose(image.spacing, [2, 2, 3])


def test_slope_is_applied(tmp_path):
    path = write(tmp_path / "a.nii")
    raw = bytearray(path.read_bytes())
    raw[112:120] = np.array([0.5, 3], "<f4").tobytes()  # scl_slope, scl_inter
    path.write_bytes(raw)
    np.testing.assert_array_equal(load_image(path).data, DATA * np.float32(0.5) + 3)


def test_trailing_axis_of_one_is_dropped(tmp_path):
    assert load_image(write(tmp_path / "a.nii.gz", DATA[..., None])).data.shape == SHAPE


def test_missing_and_folder(tmp_path):
    refused(lambda: load_image(tmp_path / "no.nii"), tmp_path / "no.nii", "does not exist")
    refused(lambda: load_image(tmp_path), tmp_path, "folder")


def test_damaged_files(tmp_path):
    path = write(tmp_path / "a.nii.gz")
    whole = path.read_bytes()
    flat = gzip.decompress(whole)
    broken = bytearray(whole)
    broken[len(whole) // 2:len(whole) // 2 + 40] = b"\0" * 40
    with pytest.raises((zlib.error, OSError, EOFError)):
        gzip.decompress(broken)
    cases = {"cut.nii.gz": whole[:len(whole) // 2], "broken.nii.gz": broken, "notzip.nii.gz": flat[:100],
             "cut.nii": flat[:600], "head.nii": flat[:100], "text.nii": b"hello", "empty.nii": b"",
             "crc.nii.gz": whole[:-8] + b"\1" * 8}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        refused(lambda name=name: load_image(tmp_path / name), tmp_path / name, "cannot be read")


def test_other_formats_are_refused(tmp_path):
    path = tmp_path / "a.img"
    nibabel.save(nibabel.AnalyzeImage(DATA.astype(np.float32), np.eye(4)), path)
    refused(lambda: load_image(path), path, "not a NIfTI")


@pytest.mark.parametrize("shape", [(9, 8), (9, 8, 7, 3), (9, 8, 7, 1, 3)])
def test_wrong_dimensions(tmp_path, shape):
    path = write(tmp_path / "a.nii", np.ones(shape, np.float32))
    refused(lambda: load_image(path), path, "3-D")


def test_thin_volume(tmp_path):
    path = write(tmp_path / "a.nii", np.ones((9, 1, 7), np.float32))
    refused(lambda: load_image(path), path, "at least 2 voxels")


@pytest.mark.parametrize("size, word", [((30000, 30000, 30000), "2^30"), ((0, 5, 5), "no voxels")])
def test_absurd_sizes_are_refused_before_reading(tmp_path, size, word):
    path = write(tmp_path / "a.nii")
    raw = bytearray(path.read_bytes())
    raw[42:48] = np.array(size, "<i2").tobytes()  # dim[1:4]
    path.write_bytes(raw)
    refused(lambda: load_image(path), path, word)


@pytest.mark.parametrize("value, word", [(np.nan, "NaN"), (np.inf, "NaN or infinite")])
def test_non_finite_voxels(tmp_path, value, word):
    data = DATA.astype(np.float32)
    data[3, 4, 5] = value
    path = write(tmp_path / "a.nii", data)
    refused(lambda: load_image(path), path, word)
    refused(lambda: load_labels(path), path, word)


def test_images_without_content(tmp_path):
    path = write(tmp_path / "a.nii", np.full(SHAPE, 7, np.int16))
    refused(lambda: load_image(path), path, "same value")
    path = write(tmp_path / "b.nii", -DATA)  # has a foreground as DATA has, see test_intensity.py
    np.testing.assert_array_equal(load_image(path).data, -DATA)
    colour = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    path = write(tmp_path / "c.nii", colour)
    refused(lambda: load_image(path), path, "colour")


def test_unusable_geometry(tmp_path):
    def singular(image):
        image.header["sform_code"], image.header["srow_x"], image.header["srow_y"] = 1, 0, 0

    def infinite(image):
        image.header["srow_x"][3] = np.inf

    for change in (singular, infinite):
        path = write(tmp_path / f"{change.__name__}.nii", change=change)
        # nibabel writes the affine it was made with, so put the bad header in afterwards
        image = nibabel.load(path)
        change(image)
        raw = image.header.binaryblock + path.read_bytes()[348:]
        path.write_bytes(raw)
        refused(lambda path=path: load_image(path), path, "affine")
    path = write(tmp_path / "micron.nii", change=lambda image: image.header.set_xyzt_units("micron"))
    refused(lambda: load_image(path), path, "mm")


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_labels_of_any_type(tmp_path, dtype):
    labels = (DATA % 200).astype(dtype)
    got = load_labels(write(tmp_path / "a.nii.gz", labels))
    assert got.data.dtype == np.int32
    np.testing.assert_array_equal(got.data, labels.astype(int))


def test_label_files_that_are_none(tmp_path):
    for name, data, word in (("half", DATA + np.float32(0.5), "fractional"), ("minus", -DATA, "below 0"),
                             ("none", DATA * 0, "background")):
        path = write(tmp_path / f"{name}.nii", data)
        refused(lambda path=path: load_labels(path), path, word)


def test_labels_must_lie_on_the_image(tmp_path):
    image = load_image(write(tmp_path / "image.nii"))
    affine = image.affine.copy()
    affine[0, 3] += 5e-4
    load_labels(write(tmp_path / "near.nii", affine=affine), image)
    affine[0, 3] += 0.1
    for path in (write(tmp_path / "far.nii", affine=affine), write(tmp_path / "small.nii", DATA[1:])):
        refused(lambda path=path: load_labels(path, image), path, "grid", image.path)


@pytest.mark.parametrize("axes", ["LAS", "PIR", "SAL"])
def test_canonical_as_nibabel(axes):
    turn = nibabel.orientations.axcodes2ornt(axes)
    image = nibabel.Nifti1Image(DATA, oblique((1, 2, 3))).as_reoriented(turn)
    ours = canonical(volume(np.asarray(image.dataobj), image.affine))
    theirs = nibabel.as_closest_canonical(image)
    np.testing.assert_array_equal(ours.data, theirs.dataobj)
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-12)


@pytest.mark.parametrize("order, interpolator", [(1, sitk.sitkLinear), (0, sitk.sitkNearestNeighbor)])
def test_resample_as_simpleitk(tmp_path, order, interpolator):
    smooth = ndimage.gaussian_filter(DATA.astype(np.float32), 1)
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = SHAPE[0] - 1
    source = load_image(write(tmp_path / "a.nii", smooth, oblique((1, 2, 1.5)) @ flip))
    target = load_image(write(tmp_path / "b.nii", smooth[:10], oblique((1.5, 1.2, 1), (0.1, 0.2, 0.3))))
    ours = resample(source, target.data.shape, target.affine, order=order)
    theirs = sitk.Resample(sitk.ReadImage(source.path), sitk.ReadImage(target.path), sitk.Transform(),
                           interpolator)
    theirs = sitk.GetArrayFromImage(theirs).transpose(2, 1, 0)
    ones = Volume(np.ones_like(source.data), source.affine, None, "")
    inside = resample(ones, target.data.shape, target.affine) > 0.999
    assert inside.mean() > 0.05 and not inside.all()
    different = np.abs(ours - theirs)[inside] > 0.01
    assert different.mean() < (1e-3 if order else 0.01)  # nearest: ties fall to either side


def test_resample_through_a_transform():
    source = volume(DATA.astype(np.float32), np.eye(4))
    shift = np.eye(4)
    shift[:3, 3] = 2, 0, -1
    moved = resample(source, SHAPE, np.eye(4), shift)  # out(o) = source(o + (2, 0, -1))
    np.testing.assert_allclose(moved[:-2, :, 1:], source.data[2:, :, :-1])
    assert not moved[-2:].any() and not moved[:, :, 0].any()
    rounded = shift + 0.0
    rounded[3, 0] = 1e-17
    np.testing.assert_array_equal(moved, resample(source, SHAPE, np.eye(4), rounded))


def ball(shape, affine, centre, radius):
    x = nibabel.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    distance = np.linalg.norm(x - centre, axis=-1)
    return np.where(distance < radius, 100 + distance, 0).astype(np.float32)


@pytest.mark.parametrize("affine", [np.diag([1.0, 1, 1, 1]), np.diag([-1.0, 1, 1, 1]), oblique()])
def test_working_grid_copies_a_volume_of_its_spacing(affine):
    shape = (40, 50, 45)
    centre = nibabel.affines.apply_affine(affine, (18, 30, 20))
    source = volume(ball(shape, affine, centre, 10), affine)
    grid, grid_affine = working_grid(source)
    np.testing.assert_allclose(grid_affine[:3, :3], canonical(source).affine[:3, :3], atol=1e-9)
    copy = resample(source, grid, grid_affine)
    np.testing.assert_allclose(np.sort(copy[copy > 1]), np.sort(source.data[source.data > 0]), rtol=1e-5)
    assert grid == (48, 48, 48)  # 20 + 2 * 8 mm, to the next multiple of 16
    middle = nibabel.affines.apply_affine(grid_affine, (np.array(grid) - 1) / 2)
    assert np.linalg.norm(middle - centre) < 1.5


def test_working_grid_holds_foreground_and_margin_of_an_anisotropic_oblique_volume():
    affine = oblique((1.0, 1.0, 3.0)) @ np.array([[0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    data = np.zeros((60, 50, 20), np.float32)
    data[20:40, 15:35, 5:13] = 1000
    data[2, 2, 2] = 1000  # a speck
    shape, grid = working_grid(volume(data, affine), spacing=1.5, multiple=8, margin=6)
    assert all(n % 8 == 0 for n in shape) and max(shape) <= 32
    np.testing.assert_allclose(grid[:3, :3].T @ grid[:3, :3], 1.5**2 * np.eye(3), atol=1e-9)
    corners = nibabel.affines.apply_affine(affine, [(i, j, k) for i in (20, 39) for j in (15, 34) for k in (5, 12)])
    inside = nibabel.affines.apply_affine(np.linalg.inv(grid), corners)
    assert (inside * 1.5 >= 6 - 0.8).all() and ((np.array(shape) - 1 - inside) * 1.5 >= 6 - 0.8).all()


def test_working_grid_of_a_sheared_volume_is_rigid():
    affine = np.diag([1.0, 1, 1, 1])
    affine[0, 1] = 0.2
    source = volume(ball((40, 40, 40), affine, (22, 20, 20), 9), affine)
    shape, grid = working_grid(source)
    np.testing.assert_allclose(grid[:3, :3].T @ grid[:3, :3], np.eye(3), atol=1e-9)
    assert resample(source, shape, grid).sum() == pytest.approx(source.data.sum(), rel=0.02)


def test_working_grid_where_nothing_is_above_zero():
    shape, _ = working_grid(volume(np.zeros((20, 20, 20), np.float32), np.eye(4)), margin=0)
    assert shape == (32, 32, 32)


def test_normalise():
    data = np.concatenate([np.full(500, -3.0), np.zeros(500), np.arange(1000.0)]).astype(np.float32).reshape(20, 10, 10)
    out = normalise(data)
    positive = np.arange(1, 1000.0)
    top = np.percentile(positive[positive > 0.1 * np.percentile(positive, 99)], 99.5)
    np.testing.assert_allclose(out, np.clip(data / top, 0, 1), rtol=1e-5)
    assert out.dtype == np.float32 and out.min() == 0 and out.max() == 1
    assert not normalise(data[:9]).any()


def test_save_returns_to_the_grid_and_codes_of_like(tmp_path):
    def coded(image):
        image.set_qform(image.affine, 2)
        image.set_sform(image.affine, 4)

    like = load_image(write(tmp_path / "like.nii", affine=oblique((1, 2, 3)), change=coded))
    writing.save(tmp_path / "out.nii.gz", like.data * 0.5, like)
    saved = nibabel.load(tmp_path / "out.nii.gz")
    np.testing.assert_allclose(saved.affine, like.affine, atol=1e-5)
    np.testing.assert_allclose(saved.get_qform(), like.affine, atol=1e-4)
    assert (int(saved.header["qform_code"]), int(saved.header["sform_code"])) == (2, 4)
    assert saved.get_data_dtype() == np.float32 and saved.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_array_equal(saved.dataobj, DATA * np.float32(0.5))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["like.nii", "out.nii.gz"]


def test_compressed_files_are_those_of_nibabel_and_the_same_every_time(tmp_path):
    like = load_image(write(tmp_path / "like.nii.gz"))
    field = np.random.default_rng(1).normal(size=(*SHAPE, 1, 3)).astype(np.float32)
    for name in ("a", "b"):
        writing.save(tmp_path / f"{name}.nii.gz", field, like, 1007)
    written = (tmp_path / "a.nii.gz").read_bytes()
    assert written == (tmp_path / "b.nii.gz").read_bytes()
    assert written[3:8] == bytes(5)  # no name and no time
    nibabel.save(writing.to_nibabel(field, like, 1007), tmp_path / "plain.nii")
    assert gzip.decompress(written) == (tmp_path / "plain.nii").read_bytes()


@pytest.mark.parametrize("source, largest, stored", [
    (np.uint8, 207, np.uint8), (np.uint8, 1000, np.int16), (np.float32, 207, np.int16), (np.uint16, 50000, np.uint16),
    (np.float32, 70000, np.int32), (np.int32, 207, np.int32)])
def test_save_labels_in_a_type_that_holds_them(tmp_path, source, largest, stored):
    like = load_image(write(tmp_path / "like.nii", (DATA % 100).astype(source)))
    labels = np.zeros(SHAPE, np.int32)
    labels[3:5] = largest
    writing.save(tmp_path / "out.nii.gz", labels, like)
    saved = nibabel.load(tmp_path / "out.nii.gz")
    assert saved.get_data_dtype() == stored
    np.testing.assert_array_equal(saved.dataobj, labels)


def test_save_fails_in_one_sentence_and_leaves_the_old_file(tmp_path, monkeypatch):
    like = load_image(write(tmp_path / "like.nii"))
    refused(lambda: writing.save(tmp_path / "out.img", like.data, like), tmp_path / "out.img", ".nii.gz")
    absent = tmp_path / "absent" / "out.nii"
    refused(lambda: writing.save(absent, like.data, like), absent, "cannot be written")

    def full(image, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    old = (tmp_path / "like.nii").read_bytes()
    monkeypatch.setattr(nibabel, "save", full)
    refused(lambda: writing.save(tmp_path / "like.nii", like.data, like), tmp_path / "like.nii", "cannot be written")
    assert (tmp_path / "like.nii").read_bytes() == old and len(list(tmp_path.iterdir())) == 1


def test_freesurfers_files_nibabels_images_and_arrays_are_read_alike(tmp_path):
    affine = oblique((1, 1.5, 2))
    nibabel.save(nibabel.MGHImage(DATA.astype(np.float32), affine), tmp_path / "a.mgz")
    for source in (tmp_path / "a.mgz", nibabel.Nifti1Image(DATA, affine), nibabel.load(tmp_path / "a.mgz")):
        image = load_image(source)
        np.testing.assert_array_equal(image.data, DATA)
        np.testing.assert_allclose(image.affine, affine, atol=1e-4)
    array = load_image(DATA.astype(np.int64))
    np.testing.assert_array_equal(array.data, DATA)
    np.testing.assert_array_equal(array.affine, np.eye(4))
    refused(lambda: load_image(np.zeros(SHAPE)), "the array", "same value")
