"""Extra channels: they drive the registration with the two images, and what does not fit is refused."""

import json

import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from test_programs import refused, run

import register as program
from drivenmorph_jax import demons
from drivenmorph_jax.demons.forces import lncc_force, mind
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.fields.smooth import gaussian_smooth
from drivenmorph_jax.network.refinement import SIGMA, refined
from drivenmorph_jax.registration.read import Request
from drivenmorph_jax.registration.register import register

FAST = {"method": "demons", "force": "intensity", "affine": "none", "strip": "no", "contrast": "same"}
FLAGS = [x for name, value in FAST.items() for x in (f"--{name}", value)]


def noise(seed, shape=(12, 16, 12), channels=2):
    image = ndimage.gaussian_filter(np.random.default_rng(seed).random((*shape, channels)), (1.5, 1.5, 1.5, 0))
    return jnp.asarray((image - image.min()) / np.ptp(image), jnp.float32)


def test_local_correlation_and_mind_of_equal_channels_are_those_of_one():
    one, other = noise(0, channels=1), noise(1, channels=1)
    twice = [jnp.concatenate([x, x], -1) for x in (one, other)]
    for got, wanted in zip(lncc_force(*twice, 1.0), lncc_force(one, other, 1.0), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)
    np.testing.assert_array_equal(mind(twice[0]), jnp.concatenate([mind(one)] * 2, -1))


def test_the_refinement_sees_all_channels_and_the_network_the_first():
    fixed, moving = noise(0), noise(1)
    seen = []

    def blind(fixed, moving, weights):
        seen.append(fixed.shape)
        return jnp.zeros((*fixed.shape, 3)), jnp.zeros((*fixed.shape, 3))

    u, _ = refined(blind, fixed[None, ..., 0], moving[None, ..., 0], 4, None, (fixed[None, ..., 1:],
                                                                              moving[None, ..., 1:]))
    expected = gaussian_smooth(demons.refine(fixed, moving, jnp.zeros((*fixed.shape[:3], 3)), 4), SIGMA)
    np.testing.assert_allclose(u[0], expected, atol=1e-4)
    assert np.abs(expected).max() > 0.1 and set(seen) == {(1, *fixed.shape[:3])}


def ball(path, centre, size=5.0, side=28, signs=(1, 1, 1), cut=0):
    """A ball of 50 mm with a brighter one around `centre` (None: without), on a grid of `side` voxels of `size` mm,
    whose axes point as `signs` say. The first `cut` slices are missing."""
    affine = np.diag([*np.multiply(signs, size), 1.0])
    affine[:3, 3] = -np.multiply(signs, size) * (side - 1) / 2
    x = nib.affines.apply_affine(affine, np.moveaxis(np.indices((side,) * 3), 0, -1))
    data = 500.0 * (np.linalg.norm(x, axis=-1) < 50)
    if centre is not None:
        inner = 1 / (1 + np.exp((np.linalg.norm(x - centre, axis=-1) - 20) / 4))
        data = data * (1 + inner)
    nib.save(nib.Nifti1Image(data.astype(np.int16), affine).slicer[:, :, cut:], path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two images that say nothing of what lies inside, and an extra one of each that does. 10 mm lie between."""
    folder = tmp_path_factory.mktemp("channels")
    return {"fixed": ball(folder / "f.nii.gz", None), "moving": ball(folder / "m.nii.gz", None),
            "extra_fixed": ball(folder / "f2.nii.gz", (0, 0, 0), 4.0, 40, (-1, 1, -1)),
            "extra_moving": ball(folder / "m2.nii.gz", (10, 0, 0), 5.5, 26, (-1, -1, 1))}


def at_the_middle(transform):
    return transform.points(np.zeros((1, 3)))[0]


def test_an_extra_channel_on_another_grid_drives_the_registration(files, tmp_path, monkeypatch, capsys):
    arguments = [x for role, path in files.items() for x in (f"--{role}", path)]
    status, said = run(program, [*arguments, "--out", tmp_path / "out", *FLAGS], monkeypatch, capsys)
    assert not status, said
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["extra_fixed"] == [str(files["extra_fixed"])] and summary["fold_pct"] == 0
    u = np.asarray(nib.load(tmp_path / "out" / "displacement.nii.gz").dataobj)[14, 14, 14, 0]
    np.testing.assert_allclose(u, [-10, 0, 0], atol=2.5)  # LPS; half a voxel. The two images are equal


def test_a_cut_channel_drives_where_it_is_known(files, tmp_path):
    """The lower part of the extra image of the fixed one is missing, up to 25 mm below the middle."""
    cut = ball(tmp_path / "cut.nii.gz", (0, 0, 0), 5.0, 29, cut=9)
    found = register(**files | {"extra_fixed": [cut]}, quiet=True, **FAST)
    np.testing.assert_allclose(at_the_middle(found.transform), [10, 0, 0], atol=2.5)
    below = found.transform.points(np.array([[0.0, 0, -42]]))[0] - (0, 0, -42)
    assert np.linalg.norm(below) < 1.5 and found.summary["fold_pct"] == 0


def test_what_does_not_fit_is_refused(files, tmp_path, monkeypatch, capsys):
    far = nib.load(files["extra_moving"])
    affine = far.affine.copy()
    affine[0, 3] += 400
    nib.save(nib.Nifti1Image(np.asarray(far.dataobj), affine), tmp_path / "far.nii.gz")
    given = [f"--{role}={path}" for role, path in files.items()]
    for arguments, words in (
            (given[:3], ("extra_fixed has 1 images and extra_moving 0", "the same number")),
            ([*given[:3], "--extra_moving", tmp_path / "far.nii.gz"], ("far.nii.gz does not overlap", "m.nii.gz")),
            ([*given[:3], "--extra_moving", tmp_path / "none.nii.gz"], ("none.nii.gz does not exist",))):
        status, said = run(program, [*arguments, "--out", tmp_path / "out", *FLAGS], monkeypatch, capsys)
        refused(status, said, *words)
        assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="refine_steps is 0"):
        Request(fixed="a", moving="b", extra_fixed="c", extra_moving="d", refine_steps=0)
