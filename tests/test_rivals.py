import json

import numpy as np
import pytest
from matplotlib import image
from scipy import stats

from drivenmorph_jax import rivals
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.evaluation import evaluate_checkpoint


def test_holm_as_by_hand():
    # Holm 1979: .01 * 4, .02 * 3, .03 * 2 raised to the one before, .04 raised likewise.
    np.testing.assert_allclose(rivals.holm([0.04, 0.01, 0.03, np.nan, 0.02]), [0.06, 0.04, 0.06, np.nan, 0.06])
    np.testing.assert_allclose(rivals.holm([0.6, 0.5]), [1, 1])


def test_the_table_has_means_spread_and_the_test():
    rng = np.random.default_rng(0)
    ours = [{"dice": 0.6 + 0.01 * x, "seconds": 5.0} for x in rng.standard_normal(12)]
    other = [{"dice": row["dice"] - 0.02 + 0.005 * x, "seconds": 30.0}
             for row, x in zip(ours, rng.standard_normal(12), strict=True)]
    table = rivals.markdown({"drivenmorph": ours, "other": other}).splitlines()
    p = stats.wilcoxon([a["dice"] - b["dice"] for a, b in zip(ours, other, strict=True)]).pvalue
    assert table[0] == "| | pairs | Dice | Seconds a pair | p (Dice) |"
    assert table[2].startswith("| drivenmorph | 12 | 0.6") and table[2].endswith("| 5 ± 0 | |")
    assert table[3].endswith(f"| 30 ± 0 | {p:.2g} |")


def test_what_is_not_installed_is_said_and_what_is_unknown_refused(capsys, monkeypatch):
    monkeypatch.setitem(rivals.METHODS, "strange", (None, (), "no_such_package"))
    assert rivals.installed(["affine", "strange"]) == ["affine"]
    assert "strange is left out: no_such_package is not installed" in capsys.readouterr().out
    with pytest.raises(InputError, match="voxel is none of .*greedy"):
        rivals.installed(["voxel"])


def test_rivals_are_scored_on_the_same_pairs(smoke, brains, tmp_path):
    (brains / "splits.json").write_text(json.dumps({"test": ["sub-000", "sub-001"]}))
    exclude = f"--config.data.exclude={tuple(smoke[1]['excluded_labels'])}"
    ours = evaluate_checkpoint(smoke[0], tmp_path, root=brains, overrides=[exclude],
                               others=["affine", "demons-intensity", "itk-demons"])
    rows = json.loads((tmp_path / "rivals.json").read_text())
    assert {name: len(found) for name, found in rows.items()} == {
        "drivenmorph": 2, "affine": 2, "demons-intensity": 2, "itk-demons": 2}
    dice = {name: np.mean([row["dice"] for row in found]) for name, found in rows.items()}
    assert dice["drivenmorph"] == pytest.approx(ours["dice"]["mean"], abs=1e-4)
    assert dice["affine"] == pytest.approx(ours["dice_initial"]["mean"])
    assert min(dice["demons-intensity"], dice["itk-demons"]) > dice["affine"] + 0.02
    assert "| itk-demons | 2 |" in (tmp_path / "rivals.md").read_text()
    assert image.imread(tmp_path / "rivals.png").size > 100_000
