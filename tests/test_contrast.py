import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage, stats

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.images import contrast
from drivenmorph_jax.registration.register import register

RNG = np.random.default_rng(0)


def brain(seed=0):
    image = ndimage.gaussian_filter(np.random.default_rng(seed).random((24, 28, 20)), 2)
    image = ((image - image.min()) / np.ptp(image)).astype(np.float32)
    image[:3] = 0
    return image


def test_correlation_is_scipys_where_neither_is_background():
    a, b = brain(0), brain(1)
    b[:, :4] = 0
    both = (a > 0) & (b > 0)
    assert contrast.correlation(a, b) == pytest.approx(stats.pearsonr(a[both], b[both]).statistic, abs=1e-4)
    assert contrast.correlation(a, np.where(a > 0, 1 - a, 0)) == pytest.approx(-1, abs=1e-4)
    half = (np.arange(20) < 10).astype(np.float32) * np.ones(a.shape, np.float32)
    chosen = both & (half > 0)
    assert contrast.correlation(a, b, half) == pytest.approx(stats.pearsonr(a[chosen], b[chosen]).statistic, abs=1e-4)
    assert np.isfinite(contrast.correlation(np.zeros_like(a), a))


@pytest.mark.parametrize("change", [lambda x: 1 - x, lambda x: x**2, lambda x: 4 * x * (1 - x)])
def test_the_curve_is_the_function_that_relates_two_aligned_images(change):
    moved = np.where(RNG.random((40, 40, 40)) < 0.2, 0, RNG.random((40, 40, 40))).astype(np.float32)
    fixed = np.where(moved > 0, change(moved), 0).astype(np.float32)
    curve = contrast.conditional_mean(fixed, moved)
    middle = slice(4, -4)  # a mean of neighbours is off at the ends
    np.testing.assert_allclose(curve[middle], change(np.linspace(0, 1, contrast.BINS))[middle], atol=0.02)
    found = np.asarray(contrast.recoloured(moved, curve))
    assert not found[moved == 0].any() and np.abs(found - fixed).mean() < 0.02


def test_values_that_do_not_occur_get_those_of_the_nearest_that_do_and_weights_leave_voxels_out():
    moved = np.where(RNG.random((30, 30, 30)) < 0.5, 0.3, 0.7).astype(np.float32)
    fixed = np.where(moved < 0.5, 0.8, 0.2).astype(np.float32)
    curve = np.asarray(contrast.conditional_mean(fixed, moved))
    assert curve[:20] == pytest.approx(0.8, abs=0.05) and curve[-20:] == pytest.approx(0.2, abs=0.05)
    wrong = np.zeros_like(fixed)
    wrong[:10] = 1
    curve = contrast.conditional_mean(np.where(wrong, 1.0, fixed), moved, 1 - wrong)
    assert curve[:20] == pytest.approx(0.8, abs=0.05)
    assert np.isfinite(contrast.conditional_mean(0 * fixed, moved)).all()


def test_each_pass_sees_the_curve_of_the_one_before():
    fixed, seen = jnp.asarray(brain()), []
    shift = jnp.zeros((*fixed.shape, 3)).at[..., 2].set(3.0)
    moving = jnp.where(fixed > 0, 1 - jnp.roll(fixed, 3, 2), 0)  # u = shift undoes the roll

    def method(fixed, moving):
        seen.append(moving)
        return shift

    seen.append(contrast.matched(method, fixed, moving))
    assert len(seen) == contrast.PASSES
    errors = [float(np.abs(np.roll(x, -3, 2) - fixed)[4:, :, 4:-4].mean()) for x in seen]
    assert errors[1] < 0.5 * errors[0] and errors[1] < 0.03


def test_agreement_is_one_for_images_that_a_line_relates_and_none_for_noise():
    a, b = RNG.random((2, 40, 40, 40)).astype(np.float32)
    assert contrast.agreement(a, 0.2 + 0.5 * a) == pytest.approx(1, abs=0.02)
    assert contrast.agreement(a, 1 - a) == 0
    assert contrast.agreement(a, b) < 0.05
    mixed = np.where(np.arange(40) < 30, a, b)  # alike in the part that counts
    weight = (np.arange(40) < 20).astype(np.float32) * np.ones(a.shape, np.float32)
    assert contrast.agreement(a, mixed, weight) == pytest.approx(1, abs=0.02)


def test_images_with_little_in_common_are_registered_stiffly_and_it_can_be_said(tmp_path, capsys):
    settings = {"method": "demons", "affine": False, "strip": "no", "contrast": "same"}
    other, near = brain(1), np.roll(brain(0), 1, 1)
    told = register(brain(0), other, **settings).summary
    assert told["stiffness"] == "high" and told["agreement"] < contrast.LITTLE
    assert "a stiff field is used" in capsys.readouterr().out
    settings["quiet"] = True
    soft = register(brain(0), other, stiffness="low", **settings).summary
    assert soft["stiffness"] == "low" and soft["agreement"] is None and soft["sdlogj"] > told["sdlogj"]
    assert register(brain(0), near, **settings).summary["stiffness"] == "low"
    forced = register(brain(0), near, stiffness="high", **settings)
    assert forced.summary["stiffness"] == "high" and forced.summary["inverse_mm"] < 0.1
    forced.save(tmp_path)
    assert "force of Demons" in (tmp_path / "force.json").read_text()


def test_an_unknown_contrast_is_refused():
    with pytest.raises(InputError, match="'auto', 'same' or 'other'"):
        register(brain(), brain(1), contrast="T2")


@pytest.fixture(scope="module")
def inverted(brains, tmp_path_factory):
    """Files: a fixed image, the moving one and its negative, and their labels."""
    moving = nib.load(brains / "sub-001_t1.nii.gz")
    x = np.asarray(moving.dataobj, np.float32)
    path = tmp_path_factory.mktemp("inverted") / "moving.nii.gz"
    nib.save(nib.Nifti1Image(np.where(x > 0, x.max() - x, 0), moving.affine), path)
    return (brains / "sub-000_t1.nii.gz", brains / "sub-001_t1.nii.gz", path,
            {"fixed_labels": brains / "sub-000_seg.nii.gz", "moving_labels": brains / "sub-001_seg.nii.gz"})


# The network's part is small here, with voxels of 5 mm; on real brains it is nearly all, see test_weights.py. There it
# is also tested on a small pair: this one has 5 million voxels for the network.
@pytest.mark.parametrize(("settings", "part"), [({"method": "demons"}, 0.8),
                                                pytest.param({}, 0.7, marks=pytest.mark.slow)])
def test_an_inverted_image_registers_nearly_as_well_and_nobody_has_to_say_it(inverted, settings, part, capsys):
    fixed, plain, negative, labels = inverted
    one, other = (register(fixed, x, affine=False, **labels, **settings).summary for x in (plain, negative))
    assert (one["contrast"], other["contrast"]) == ("same", "other")
    assert "of different contrast" in capsys.readouterr().out
    gain = one["dice_after"] - one["dice_before"]
    assert other["dice_after"] > other["dice_before"] + part * gain and other["fold_pct"] < 0.01
    if settings:
        kept = register(fixed, negative, affine=False, contrast="same", quiet=True, **labels, **settings).summary
        assert kept["contrast"] == "same" and kept["dice_after"] < other["dice_after"]
