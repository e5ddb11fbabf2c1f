"""Whole heads in `register` and `strip`: the brain is found, registered alone, written and drawn."""

import importlib
from dataclasses import replace
from importlib import metadata

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

import drivenmorph_jax
from drivenmorph_jax.brain import extraction
from drivenmorph_jax.cli import main
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.registration.read import Request, read

stage = importlib.import_module("drivenmorph_jax.registration.strip")  # the room names the function so, too
SHAPE = (40, 48, 44)


def head(path, turn=0.0, seed=0):
    """A head of 4 mm voxels: an ellipsoid of tissue, a dark skull and a bright scalp. Returns the brain's mask."""
    x = np.moveaxis(np.indices(SHAPE), 0, -1) - (np.array(SHAPE) - 1) / 2
    c, s = np.cos(turn), np.sin(turn)
    x = x @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    radius = np.linalg.norm(x / (14, 17, 14), axis=-1)
    tissue = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=SHAPE), 2)
    image = np.where(radius < 1, 600 + 1500 * tissue, np.where((radius > 1.15) & (radius < 1.3), 900, 0))
    nib.save(nib.Nifti1Image(image.astype(np.int16), np.diag([4.0, 4, 4, 1])), path)
    return radius < 1


@pytest.fixture
def heads(tmp_path, monkeypatch):
    """Files of two heads, and the networks replaced by what they would find."""
    found = {str(tmp_path / f"{name}.nii.gz"): head(tmp_path / f"{name}.nii.gz", turn) for name, turn in (
        ("a", 0.0), ("b", 0.1))}
    monkeypatch.setattr(stage, "extract", lambda image: found[image.path])
    monkeypatch.setattr(stage, "tightened", lambda mask, image: mask)
    monkeypatch.setattr(stage, "is_head", lambda image: image.path in found)
    return found


def test_the_brains_of_heads_are_registered_alone_and_the_whole_head_is_warped(heads, tmp_path):
    (fixed, brain), (moving, other) = heads.items()
    settings = {"method": "demons", "force": "intensity", "quiet": True}  # which compiles in a third of the time
    result = drivenmorph_jax.register(fixed, moving, **settings)
    assert result.summary["stripped"] == ["fixed", "moving"]
    stripped = []
    for path, mask in heads.items():
        image = nib.load(path)
        stripped.append(nib.Nifti1Image(image.get_fdata() * mask, image.affine))
    before = drivenmorph_jax.register(*stripped, **settings)
    assert before.summary["stripped"] == []
    np.testing.assert_array_equal(result.transform.displacement, before.transform.displacement)
    scalp = np.asarray(result.warped.dataobj)[~ndimage.binary_dilation(brain, iterations=2)]
    assert (scalp > 700).mean() > 0.05  # of the moving head
    assert not (np.asarray(before.warped.dataobj)[~ndimage.binary_dilation(brain, iterations=4)] > 100).any()

    result.save(tmp_path / "out")
    for role, (path, mask) in zip(("fixed", "moving"), heads.items(), strict=True):
        written = nib.load(tmp_path / f"out/{role}_brain.nii.gz")
        assert written.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(np.asarray(written.dataobj), mask)
        np.testing.assert_allclose(written.affine, nib.load(path).affine)
    assert {"fixed_brain.nii.gz", "moving_brain.nii.gz"} < set(result.summary["files"])
    assert "Moving, head" in (tmp_path / "out/report.html").read_text()


def test_each_image_is_looked_at_by_itself(heads, tmp_path):
    (fixed, mask), (moving, _) = heads.items()
    image = nib.load(fixed)
    nib.save(nib.Nifti1Image((image.get_fdata() * mask).astype(np.int16), image.affine), tmp_path / "brain.nii.gz")
    pair = read(Request(fixed=tmp_path / "brain.nii.gz", moving=moving, method="demons"))
    found = stage.strip(pair)
    assert found.fixed_brain is None and found.fixed_head is None and found.fixed is pair.fixed
    assert not found.moving.data[~heads[moving]].any()
    np.testing.assert_array_equal(found.moving_head.data, pair.moving.data)
    np.testing.assert_array_equal(found.source.data, pair.source.data)
    for choice, roles in (("no", 0), ("yes", 2)):
        request = replace(pair.request, strip=choice, fixed=fixed)
        assert len(stage.strip(replace(pair, request=request, fixed=replace(pair.fixed, path=fixed))).heads) == roles
    with pytest.raises(InputError, match="strip is 'perhaps': set it to 'auto', 'yes' or 'no'"):
        replace(pair.request, strip="perhaps")


@pytest.mark.parametrize("rim", [False, True])
def test_the_brain_of_a_head_ends_as_the_other_stripped_brain_does(heads, tmp_path, monkeypatch, rim):
    (fixed, mask), (moving, other) = heads.items()
    ended = []
    monkeypatch.setattr(stage, "tightened", lambda mask, image: ended.append(image.path) or mask)
    shape = np.where(mask, 1000, 0)
    if rim:
        shape[mask & ~ndimage.binary_erosion(mask)] = 300
    nib.save(nib.Nifti1Image(shape.astype(np.int16), np.diag([4.0, 4, 4, 1])), tmp_path / "brain.nii.gz")
    stage.strip(read(Request(fixed=tmp_path / "brain.nii.gz", moving=moving, method="demons")))
    assert ended == ([] if rim else [moving])
    stage.strip(read(Request(fixed=fixed, moving=moving, method="demons")))
    assert ended == ([] if rim else [moving])  # two heads are stripped alike already


def test_strip_writes_mask_stripped_image_and_picture(heads, tmp_path, capsys):
    out = tmp_path / "brains"
    main.main(["strip", "--image", *heads, "--out", str(out)])
    assert capsys.readouterr().out.split() == [str(out / f"{name}_stripped.nii.gz") for name in "ab"]
    for name, (path, mask) in zip("ab", heads.items(), strict=True):
        stripped = nib.load(out / f"{name}_stripped.nii.gz")
        assert stripped.get_data_dtype() == np.int16
        np.testing.assert_array_equal(np.asarray(stripped.dataobj), np.asarray(nib.load(path).dataobj) * mask)
        np.testing.assert_array_equal(np.asarray(nib.load(out / f"{name}_brain.nii.gz").dataobj), mask)
        assert (out / f"{name}_brain.png").stat().st_size > 10_000
        np.testing.assert_array_equal(np.asarray(drivenmorph_jax.brain_mask(path).dataobj), mask)
    with pytest.raises(InputError, match="two images have one name"):
        main.main(["strip", "--image", *[next(iter(heads))] * 2, "--out", str(out)])


def test_of_several_images_a_broken_one_is_named_and_the_others_are_stripped(heads, tmp_path, capsys):
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"no image")
    with pytest.raises(SystemExit) as stop:
        main.main(["strip", "--image", str(broken), *heads, "--out", str(tmp_path)])
    done = capsys.readouterr()
    assert stop.value.code == 4 and done.err.startswith("skipped: ") and "broken.nii.gz" in done.err
    assert done.out.splitlines()[2:] == ["2 images are done, 1 failed"]


def test_what_to_install_is_said_where_deepbet_is_missing(tmp_path, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)
    monkeypatch.setattr(metadata, "distribution", missing)
    monkeypatch.setattr(stage, "is_head", lambda image: True)
    extraction._networks.cache_clear()
    head(tmp_path / "a.nii.gz")
    with pytest.raises(InputError, match=r"a\.nii\.gz .*pip install --no-deps deepbet==.*--strip no"):
        drivenmorph_jax.register(tmp_path / "a.nii.gz", tmp_path / "a.nii.gz", method="demons", quiet=True)
