import csv
import json
from functools import cache

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from test_training import finish, start

from drivenmorph_jax.data import Dataset, Subject
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.evaluation import evaluate as evaluate_module
from drivenmorph_jax.evaluation.evaluate import evaluate, evaluate_checkpoint
from drivenmorph_jax.evaluation.record import Record

pytestmark = pytest.mark.usefixtures("no_pictures")

PROMISED = ("dice", "dice_initial", "hd95", "sdlogj", "sdlogj_l2r", "sdlogj_l2r_whole", "fold_pct", "ndv_pct",
            "inverse_mm", "seconds")


def test_scores_of_a_run_hold_every_metric_and_its_definition(smoke):
    workdir, returned = smoke
    out = workdir / "evaluation"
    summary = json.loads((out / "summary.json").read_text())
    assert summary.keys() == returned.keys() and summary["dice"] == returned["dice"]
    for key in (*PROMISED, "tre_mm"):
        assert set(summary[key]) == {"mean", "std"} and summary["definitions"][key]
    assert summary["pairs"] == 2 and {"device", "commit", "jax"} <= set(summary["environment"])
    rows = list(csv.DictReader((out / "pairs.csv").open()))
    assert len(rows) == 2
    for key in PROMISED:
        assert np.mean([float(row[key]) for row in rows]) == pytest.approx(summary[key]["mean"])
    assert "| Dice |" in (out / "report.md").read_text()
    assert {path.name for path in out.glob("*.png")} >= {"best.png", "worst.png", "dice.png", "training.png"}


@pytest.fixture(scope="module")
def on_files(smoke, brains, tmp_path_factory):
    """A function (steps of refinement) -> scores of the smoke run on files of its own cohort."""
    (brains / "splits.json").write_text(json.dumps({"test": ["sub-000", "sub-001"]}))
    exclude = f"--config.data.exclude={tuple(smoke[1]['excluded_labels'])}"
    return cache(lambda steps: evaluate_checkpoint(smoke[0], tmp_path_factory.mktemp("scores"), root=brains,
                                                   overrides=[exclude], refine_steps=steps))


def test_a_checkpoint_is_scored_on_files_as_on_the_cohort_that_they_were_written_from(smoke, on_files):
    summary, scores = smoke[1], on_files(0)
    assert scores["dice_initial"]["mean"] == pytest.approx(summary["dice_initial"]["mean"], abs=1e-6)
    # Files hold whole numbers and are scaled by their brightest voxels: a little other images, a little other fields.
    assert scores["dice"]["mean"] == pytest.approx(summary["dice"]["mean"], abs=0.02)
    assert "tre_mm" not in scores


def test_an_atlas_is_the_moving_image_of_every_pair(smoke, brains, tmp_path):
    (brains / "splits.json").write_text(json.dumps({"test": ["sub-000", "sub-001"]}))
    evaluate_checkpoint(smoke[0], tmp_path, root=brains, overrides=["--config.data.atlas=sub-002"])
    rows = csv.DictReader((tmp_path / "pairs.csv").open())
    assert [(row["fixed"], row["moving"]) for row in rows] == [("sub-000", "sub-002"), ("sub-001", "sub-002")]
    with pytest.raises(InputError, match="sub-009_t1.nii.gz does not exist: set data.atlas"):
        evaluate_checkpoint(smoke[0], tmp_path, root=brains, overrides=["--config.data.atlas=sub-009"])


def test_refinement_goes_on_from_the_network(on_files):
    plain, refined = on_files(0), on_files(5)
    assert (plain["refine_steps"], refined["refine_steps"]) == (0, 5)
    assert refined["dice"]["mean"] > plain["dice"]["mean"]
    assert refined["fold_pct"]["mean"] == 0 and refined["inverse_mm"]["mean"] < 1  # of 5 mm voxels


def test_learn2reg_reads_the_fields_as_its_own(smoke, brains, tmp_path):
    (brains / "splits.json").write_text(json.dumps({"test": ["sub-000", "sub-001"]}))
    exclude = f"--config.data.exclude={tuple(smoke[1]['excluded_labels'])}"
    evaluate_checkpoint(smoke[0], tmp_path, root=brains, overrides=[exclude], l2r=tmp_path / "l2r")
    for row in csv.DictReader((tmp_path / "pairs.csv").open()):
        field = nib.load(tmp_path / "l2r" / f"disp_{row['fixed']}_{row['moving']}.nii.gz")
        fixed, moving = (np.asarray(nib.load(brains / f"{row[role]}_seg.nii.gz").dataobj)
                         for role in ("fixed", "moving"))
        assert field.shape == (*fixed.shape, 3)
        # As the challenge's own evaluation does: the field is added to the array's indices.
        where = np.indices(fixed.shape) + np.moveaxis(field.get_fdata(), -1, 0)
        moved = ndimage.map_coordinates(moving, where, order=0, mode="nearest")
        labels = (set(np.unique(fixed)) & set(np.unique(moving))) - set(smoke[1]["excluded_labels"])
        dice = [2 * ((fixed == k) & (moved == k)).sum() / ((fixed == k).sum() + (moved == k).sum()) for k in labels]
        assert np.mean(dice) == pytest.approx(float(row["dice"]), abs=1e-3)


def test_fields_between_files_need_files(smoke, tmp_path):
    with pytest.raises(InputError, match="--l2r and --rivals .* --data"):
        evaluate_checkpoint(smoke[0], tmp_path, l2r=tmp_path / "l2r")


def test_a_split_without_pairs_is_refused(tmp_path):
    with pytest.raises(InputError, match="test split"):
        evaluate(None, None, Dataset("empty", (), (), (), 1.0, {}, (0,)), "test", tmp_path)


def test_two_pairs_do_not_share_a_file_of_learn2reg(tmp_path):
    subjects = tuple(Subject(id, None, None, np.eye(4)) for id in ("a", "b_c", "a_b", "c"))
    with pytest.raises(InputError, match=r"disp_a_b_c.nii.gz for a with b_c and for a_b with c: rename"):
        evaluate(None, None, Dataset("four", (), (), subjects, 1.0, {}, (0,)), "test", tmp_path, l2r=tmp_path / "l2r")


def test_an_evaluation_that_was_stopped_goes_on_from_the_finished_pairs(smoke, brains, tmp_path, monkeypatch):
    (brains / "splits.json").write_text(json.dumps({"test": ["sub-000", "sub-001", "sub-002"]}))
    scored, score = [], evaluate_module.scored
    monkeypatch.setattr(evaluate_module, "scored", lambda pair, *rest: scored.append(pair) or score(pair, *rest))
    whole = evaluate_checkpoint(smoke[0], tmp_path, root=brains)
    lines = (tmp_path / "pairs.jsonl").read_text().splitlines(keepends=True)
    assert len(scored) == 6 and len(lines) == 7
    (tmp_path / "summary.json").unlink()
    (tmp_path / "pairs.jsonl").write_text("".join(lines[:4]) + lines[4][:40])  # stopped in the middle of a line
    again = evaluate_checkpoint(smoke[0], tmp_path, root=brains)
    assert len(scored) == 6 + 3
    for key in ("dice", "hd95", "fold_pct", "inverse_mm", "force"):
        assert again[key] == whole[key]
    assert len(list(csv.DictReader((tmp_path / "pairs.csv").open()))) == 6


def test_what_another_run_left_or_one_that_ended_is_not_taken_over(tmp_path):
    row = {"scores": {"fixed": "a", "moving": "b", "dice": 0.5}}
    Record(tmp_path, "this").add(row)
    assert Record(tmp_path, "this").rows == {("a", "b"): row}
    assert Record(tmp_path, "other").rows == {}
    Record(tmp_path, "this").add(row)
    (tmp_path / "summary.json").touch()
    assert Record(tmp_path, "this").rows == {} and not (tmp_path / "summary.json").exists()


def test_pairs_are_shared_by_the_devices(smoke, tmp_path):
    """Two pairs on three devices: the scores of one device."""
    one = evaluate_checkpoint(smoke[0], tmp_path / "one")
    finish(start(3, "from drivenmorph_jax import evaluate_checkpoint\n"
                    f"evaluate_checkpoint({str(smoke[0])!r}, {str(tmp_path / 'three')!r})"))
    three = json.loads((tmp_path / "three" / "summary.json").read_text())
    assert three["environment"]["devices"] == 3
    for key in ("dice", "hd95", "inverse_mm"):
        assert three[key]["mean"] == pytest.approx(one[key]["mean"], rel=1e-3)
