import json

import numpy as np
import pytest
from matplotlib import image
from ml_collections import ConfigDict
from scipy import stats

from drivenmorph_jax import data
from drivenmorph_jax.cli.eval import main as eval_main
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.evaluation import rivals
from drivenmorph_jax.evaluation.evaluate import evaluate_checkpoint

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_holm_as_by_hand():
    # Holm 1979: .01 * 4, .02 * 3, .03 * 2 raised to the one before, .04 raised likewise.
    np.testing.assert_allclose(rivals.holm([0.04, 0.01, 0.03, np.nan, 0.02]), [0.06, 0.04, 0.06, np.nan, 0.06])
    np.testing.assert_allclose(rivals.holm([0.6, 0.5]), [1, 1])


def test_the_table_has_means_spread_and_the_test():
    rng = np.random.default_rng(0)
    ours = [{"dice": 0.6 + 0.01 * x, "seconds": 5.0} for x in rng.standard_normal(12)]
    other = [{"dice": row["dice"] - 0.02 + 0.005 * x, "seconds": 30.0}
             for row, x in zip(ours, rng.standard_normal(12), strict=True)]
    table = rivals.rivals_table({"drivenmorph": ours, "other": other}).splitlines()
    p = stats.wilcoxon([a["dice"] - b["dice"] for a, b in zip(ours, other, strict=True)]).pvalue
    assert table[0] == "| | pairs | Dice | Seconds a pair | p (Dice) |"
    assert table[2].startswith("| drivenmorph | 12 | 0.6") and table[2].endswith("| 5 ± 0 | |")
    assert table[3].endswith(f"| 30 ± 0 | {p:.2g} |")


def test_help_and_docs_name_every_method(capsys):
    with pytest.raises(SystemExit):
        eval_main(["--help"])
    words = " ".join(capsys.readouterr().out.split())
    page = (rivals.ROOT / "docs" / "evaluate.md").read_text()
    for name in set(rivals.METHODS) - {"drivenmorph"}:  # it is always compared with
        assert f" {name}," in words or f" {name};" in words
        assert f"`{name}`" in page


def test_what_is_not_installed_is_said_and_what_is_unknown_refused(capsys, monkeypatch):
    monkeypatch.setitem(rivals.METHODS, "strange", (None, (), "no_such_package"))
    monkeypatch.setitem(rivals.METHODS, "bare", (rivals.network, ("weights/none",), None))
    assert rivals.installed(["affine", "strange", "bare"]) == ["affine"]
    said = capsys.readouterr().out
    assert "strange is left out: no_such_package is not installed" in said
    assert "bare is left out: weights/none has no weights; train configs/bare.py" in said
    with pytest.raises(InputError, match="voxel is none of .*greedy"):
        rivals.installed(["voxel"])


def test_a_package_whose_wheel_does_not_say_what_it_holds_has_a_version_all_the_same(monkeypatch):
    monkeypatch.setattr(rivals.importlib.metadata, "packages_distributions", dict)
    assert rivals._key("itk-demons", (), [], (0,)) != rivals._key("itk-demons", (), [], (0, 1))


def test_rivals_are_scored_on_the_same_pairs(smoke, brains, tmp_path):
    (brains / "splits.json").write_text(json.dumps({"test": ["sub-000", "sub-001"]}))
    exclude = f"--config.data.exclude={tuple(smoke[1]['excluded_labels'])}"
    ours = evaluate_checkpoint(smoke[0], tmp_path, root=brains, overrides=[exclude],
                               others=["affine", "demons-intensity", "itk-demons"])
    table = [line.split("|")[1:] for line in (tmp_path / "rivals.md").read_text().splitlines()]
    column = [cell.strip() for cell in table[0]].index("Dice")
    assert [row[0].strip() for row in table[2:]] == ["drivenmorph", "affine", "demons-intensity", "itk-demons"]
    assert all(row[1].strip() == "2" for row in table[2:])
    dice = {row[0].strip(): float(row[column].split("±")[0]) for row in table[2:]}
    assert dice["drivenmorph"] == pytest.approx(ours["dice"]["mean"], abs=1e-4)
    assert dice["affine"] == pytest.approx(ours["dice_initial"]["mean"], abs=1e-4)
    assert min(dice["demons-intensity"], dice["itk-demons"]) > dice["affine"] + 0.02
    assert image.imread(tmp_path / "rivals.png").size > 100_000


def test_a_comparison_goes_on_where_it_was_stopped(brains, tmp_path, capsys, monkeypatch):
    (brains / "splits.json").write_text(json.dumps({"test": ["sub-000", "sub-001"]}))
    settings = ConfigDict({"name": "folder", "root": str(brains), "exclude": (0,), "splits": None})
    dataset = data.load(settings, ("test",))
    done = []

    def run(method, fixed, moving, *arguments):
        done.append(method)
        return np.zeros((*dataset.test[0].image.shape, 3), np.float32), 1.0

    monkeypatch.setattr(rivals, "run", run)
    rivals.compare(dataset, brains, "test", ["affine"], tmp_path)
    assert sorted(done) == ["affine", "affine", "drivenmorph", "drivenmorph"]
    record = tmp_path / "rivals.jsonl"
    record.write_text("".join(record.read_text().splitlines(keepends=True)[:-1]) + '{"key": "half a li')
    done.clear()
    rivals.compare(dataset, brains, "test", ["affine", "itk-demons"], tmp_path)
    assert done == ["itk-demons", "affine", "itk-demons"]
    assert "3 of 6 runs were in" in capsys.readouterr().out
    done.clear()
    rivals.compare(dataset, brains, "test", ["affine"], tmp_path, refine_steps=5)  # another run of ours alone
    assert done == ["drivenmorph", "drivenmorph"]
