import json

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from drivenmorph_jax.evaluation import metrics
from drivenmorph_jax.evaluation.explanation import _bootstrap, of_pair, statistics
from drivenmorph_jax.evaluation.tables import OF_FORCE
from drivenmorph_jax.network.outputs import Registration, Update, by_level

SPACE = (16, 12, 20)


def smooth(seed, size, space=SPACE):
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.standard_normal((*space, 3)), (2, 2, 2, 0))
    return (size * field / np.abs(field).max()).astype(np.float32)


def update(force, u_inverse_before, **others):
    zero = jnp.zeros_like(force)
    return Update(**{"force": force, "demons_force": zero, "attention_force": zero, "velocity": zero,
                     "u_inverse_before": u_inverse_before, "u": zero, "u_inverse": zero} | others)


def test_the_forces_of_a_level_are_summed_and_given_in_voxels_of_the_images():
    half = tuple(n // 2 for n in SPACE)
    u = jnp.full((1, *SPACE, 3), 4.0)
    coarse = update(jnp.full((1, *half, 3), 0.5), jnp.full((1, *half, 3), -0.5))
    fine = update(jnp.full((1, *SPACE, 3), 0.25), jnp.full((1, *SPACE, 3), -3.0),
                  attention_force=jnp.full((1, *SPACE, 3), 0.125))
    found = by_level(Registration(u, -u, (coarse, coarse, coarse, fine, fine)))
    assert [level.force.shape[1:4] for level in found] == [half, SPACE]
    # 4 voxels are 2 of the coarse grid, of which half a voxel is done when its level begins, 3 of 4 for the fine one.
    np.testing.assert_allclose(found[0].remaining, 3.0, atol=1e-5)
    np.testing.assert_allclose(found[1].remaining, 1.0, atol=1e-5)
    np.testing.assert_allclose([found[0].force.mean(), found[1].force.mean()], [3.0, 0.5], rtol=1e-6)
    np.testing.assert_allclose(found[1].attention_force, 0.25, rtol=1e-6)


def test_statistics_know_a_force_that_explains_from_one_that_does_not():
    displacements = [smooth(seed, 4) for seed in range(6)]
    brains = [np.ones(SPACE, bool)] * 6
    pairs = [{"coarse": (u[1::2, 1::2, 1::2] / 3, u[1::2, 1::2, 1::2]), "total": (u / 2, u)} for u in displacements]
    table = statistics(*([of_pair(pairs[k - shift], pairs[k], brains[k]) for k in range(6)]
                                     for shift in (0, 3)))
    for level in ("coarse", "total"):
        for name in OF_FORCE:
            row = table[level][name]
            assert row["mean"] == pytest.approx(1, abs=1e-6) and row["low"] == pytest.approx(row["high"])
            assert row["control_low"] <= row["control"] <= row["control_high"] < 0.6
    own = metrics.force_statistics(displacements[3] / 2, displacements[0])["cosine"]
    assert own != pytest.approx(1, abs=0.1)


def test_the_interval_is_that_of_a_mean():
    values = np.random.default_rng(1).standard_normal(400)
    mean, low, high = _bootstrap([*values, np.nan])
    assert mean == pytest.approx(values.mean())
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_a_run_explains_its_force_by_level(smoke):
    workdir, summary = smoke
    table = json.loads((workdir / "evaluation" / "summary.json").read_text())["force"]
    assert list(table) == ["level 1", "level 2", "total"]
    assert table == summary["force"]
    # The force of a network points where the displacement goes, and that of another pair does so less.
    assert table["total"]["cosine"]["mean"] > table["total"]["cosine"]["control"]
    report = (workdir / "evaluation" / "report.md").read_text()
    assert "| level 1 |" in report and metrics.DEFINITIONS["cosine"] in report
    assert (workdir / "evaluation" / "forces.png").stat().st_size > 10_000
