"""Scores where labels are missing: validation, ranking, and JSON."""

import json
from dataclasses import replace

import numpy as np
import pytest

from drivenmorph_jax.data import Dataset, Subject
from drivenmorph_jax.evaluation.scoring import ranked
from drivenmorph_jax.evaluation.tables import pairs_table
from drivenmorph_jax.evaluation.validation import validate
from drivenmorph_jax.files import json_text, read_rows, rows_text

SHAPE = (8, 9, 10)


def still(params, fixed, moving):
    """A network that moves nothing."""
    return np.zeros((*fixed.shape, 3), np.float32), fixed


def subject(k, label):
    image = np.random.default_rng(k).random(SHAPE).astype(np.float32)
    return Subject(str(k), image, None if label is None else np.full(SHAPE, label, np.int32), np.eye(4))


def dataset(*labels):
    subjects = tuple(subject(k, label) for k, label in enumerate(labels))
    return Dataset("made", (), subjects, (), 1.0, {}, (0,))


def test_pairs_with_labels_are_scored_by_dice_and_the_others_do_not_count():
    assert validate(still, {}, dataset(1, 1, None)) == {"val_dice": 1.0, "val_fold_pct": 0.0}
    assert validate(still, {}, dataset(1, 1, 2)) == {"val_dice": 1.0, "val_fold_pct": 0.0}


@pytest.mark.parametrize("labels", [(None, None, None), (1, None, None), (1, 2, 3)])
def test_without_a_common_label_it_is_the_local_correlation(labels):
    scores = validate(still, {}, dataset(*labels))
    assert set(scores) == {"val_lncc"} and 0 < scores["val_lncc"] < 1
    same = dataset(*labels)
    same = replace(same, val=tuple(replace(s, image=same.val[0].image) for s in same.val))
    assert validate(still, {}, same)["val_lncc"] > 0.99


def test_pairs_are_ranked_by_dice_else_by_similarity_and_nan_is_no_best():
    rough = {"sdlogj": 9.0}
    assert ranked([{"dice": 0.7}, {"dice": float("nan")}, {"dice": 0.5}, {"lncc": 0.9}]) == [2, 0]
    assert ranked([{"lncc": 0.3, **rough}, {"lncc": 0.6}, {"lncc": 0.1}]) == [2, 0, 1]
    assert ranked([{"dice": None, "lncc": 0.3}, {"dice": None, "lncc": 0.2}]) == [1, 0]
    assert ranked([rough, {}]) == [0, 1]  # nothing to rank by


def test_json_holds_null_where_a_number_is_not_finite(tmp_path):
    def strict(text):
        return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    row = {"a": float("nan"), "b": [1.5, -float("inf")], "c": {"d": (np.float64("nan"), "NaN")}}
    found = {"a": None, "b": [1.5, None], "c": {"d": [None, "NaN"]}}
    assert strict(json_text(row, indent=2)) == found
    (tmp_path / "rows.jsonl").write_text(rows_text([row]))
    assert read_rows(tmp_path / "rows.jsonl") == [found]
    assert "| – |" in pairs_table([{"dice": None}])
