"""The weights that come with the project, as a user gets them."""

import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.default import get_config
from drivenmorph_jax import data
from drivenmorph_jax.data import augmentation
from drivenmorph_jax.evaluation import metrics
from drivenmorph_jax.images import contrast
from drivenmorph_jax.network.inference import grid_multiple, load_checkpoint, make_predict
from drivenmorph_jax.registration.read import REFINE_STEPS
from drivenmorph_jax.registration.register import register
from drivenmorph_jax.runtime.checkpoint import SHIPPED

MALF = Path(__file__).resolve().parents[2] / "shared" / "data" / "malf"
EXCLUDE = (0, 1, 42, 43, 46, 63, 64)


def test_they_are_small_and_hold_nothing_but_parameters():
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*")) < 16e6
    assert not list(SHIPPED.rglob("opt_state"))
    # Orbax writes there where on disk it saved.
    assert not list(SHIPPED.rglob("commit_success.txt"))
    assert "CC BY-NC" in (SHIPPED / "README.md").read_text()


@pytest.fixture(scope="module", autouse=True)
def fast_code():
    """The network is as large here as for a user, so its code is compiled as for one, which takes longer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", re.sub(r"--xla_backend_optimization_level=\d", "", os.environ["XLA_FLAGS"]))
        yield


@pytest.fixture(scope="module")
def cohort():
    """Two subjects of the embedded cohort, on a grid that the network takes."""
    settings = get_config().data
    settings.update({"shape": (48, 64, 48), "spacing": 2.8, "num_test": 2})
    return data.load(settings, ("test",), grid_multiple(load_checkpoint(SHIPPED)[0])).test


@pytest.fixture(scope="module")
def files(cohort, tmp_path_factory):
    """(file of the fixed image, of the moving one and of its negative; the labels of both, as settings)."""
    folder = tmp_path_factory.mktemp("files")
    for name, subject in zip(("fixed", "moving"), cohort, strict=True):
        t1 = 1000 * subject.image
        for ending, voxels in (("t1", t1), ("seg", subject.labels), ("negative", np.where(t1 > 0, t1.max() - t1, 0))):
            affine = subject.affine @ np.diag([0.6, 0.6, 0.6, 1])  # 5 times fewer voxels on the grid of 1 mm
            nib.save(nib.Nifti1Image(voxels.astype(np.int16), affine), folder / f"{name}_{ending}.nii.gz")
    return (*(folder / f"{name}.nii.gz" for name in ("fixed_t1", "moving_t1", "moving_negative")),
            {f"{name}_labels": folder / f"{name}_seg.nii.gz" for name in ("fixed", "moving")})


@pytest.fixture(scope="module")
def registered(files):
    fixed, moving, _, labels = files
    return register(fixed, moving, affine=False, quiet=True, **labels).summary


def test_two_files_are_registered_with_no_settings(registered):
    assert registered["refine_steps"] == 5 and registered["fold_pct"] < 0.01
    assert registered["dice_after"] > registered["dice_before"] + 0.25
    assert registered["checkpoint"].endswith("brain-t1") and registered["contrast"] == "same"


@pytest.mark.slow
def test_an_inverted_image_is_registered_nearly_as_well_and_nobody_has_to_say_it(registered, files, capsys):
    fixed, _, negative, labels = files
    other = register(fixed, negative, affine=False, **labels).summary
    assert other["contrast"] == "other" and "of different contrast" in capsys.readouterr().out
    gain = registered["dice_after"] - registered["dice_before"]
    assert other["dice_after"] > other["dice_before"] + 0.6 * gain and other["fold_pct"] < 0.01  # .68 measured


FOREIGN = {
    "rotated by 90 degrees": lambda image, rng: np.rot90(image, axes=(0, 2)).copy(),
    "upside down": lambda image, rng: image[:, :, ::-1].copy(),
    "noise": lambda image, rng: rng.random(image.shape, np.float32),
    "a box": lambda image, rng: np.pad(np.ones((20, 20, 20), np.float32), [(9, n - 29) for n in image.shape]),
    "nothing but one voxel": lambda image, rng: (np.arange(image.size) == image.size // 3).reshape(image.shape) * 1.0,
}


def test_whatever_the_images_the_result_is_a_diffeomorphism(cohort):
    config, params, _ = load_checkpoint(SHIPPED)
    fixed, moving = (subject.image for subject in cohort)
    predict = make_predict(config, REFINE_STEPS["drivenmorph"])
    for kind, change in FOREIGN.items():
        foreign = change(moving, np.random.default_rng(0)).astype(np.float32)
        u, u_inverse = (np.asarray(x[0]) for x in predict(params, fixed[None], foreign[None])[:2])
        assert np.isfinite(u_inverse).all() and metrics.jacobian(u).min() > 0, kind


@pytest.fixture(scope="module")
def real():
    """(function of two images -> u by the network alone, Dice of u, two brains that no training saw, and their u)."""
    if not MALF.is_dir():
        pytest.skip("needs the folder of real brains beside the project")
    config, params, _ = load_checkpoint(SHIPPED)
    settings = ConfigDict({"name": "folder", "root": str(MALF / "aligned"), "exclude": EXCLUDE, "splits": None})
    fixed, moving = data.load(settings, ("test",), grid_multiple(config)).test[:2]
    predict = make_predict(config)

    def dice(u):
        return metrics.mean_dice(fixed.labels, metrics.warp_labels(moving.labels, np.asarray(u)), EXCLUDE)

    def network(fixed, moving):
        return predict(params, fixed[None], moving[None])[0][0]

    return network, dice, fixed.image, moving.image, network(fixed.image, moving.image)


def test_a_real_pair_that_no_training_saw(real):
    _, dice, _, _, u = real
    assert dice(u) > 0.61
    assert metrics.fold_pct(metrics.jacobian(np.asarray(u))) < 0.01


def test_a_bias_of_20_percent_or_an_inverted_contrast_costs_a_real_pair_little(real):
    network, dice, fixed, moving, u = real
    plain = dice(u)
    biased = augmentation.add_bias(jnp.asarray(moving), jax.random.key(0), 0.2)
    assert dice(network(fixed, biased)) > plain - 0.012
    inverted = np.where(moving > 0, 1 - moving, 0).astype(np.float32)
    assert dice(network(fixed, contrast.matched(network, fixed, inverted))) > plain - 0.012
