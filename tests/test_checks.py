"""The checks of a registration: each finds what it is for."""

import json

import nibabel as nib
import numpy as np
import pytest
from test_programs import run

import register as program
from drivenmorph_jax.registration.checks import LIMITS, Check
from drivenmorph_jax.registration.register import register

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_a_check_warns_outside_its_limits_and_where_it_is_no_number():
    for value, ok in ((0.5, True), (0, True), (1, True), (1.1, False), (-0.1, False), (np.nan, False)):
        assert Check("x", value, (0, 1), "").ok is ok
    assert Check("x", 5, (1, np.inf), "").as_dict()["limits"] == [1, None]


@pytest.fixture(scope="module")
def pair(brains):
    return [nib.load(brains / f"sub-00{k}_t1.nii.gz") for k in (0, 1)]


def checked(fixed, moving, **settings):
    found = register(fixed, moving, method="demons", quiet=True, **settings).summary["checks"]
    return {one["name"]: one for one in found}


@pytest.fixture(scope="module")
def good(pair):
    return checked(*pair)


def test_every_check_has_a_value_limits_and_a_sentence(good):
    of_guidance = "landmarks", "landmarks left out", "guided labels"  # which have tests of their own
    assert list(good) == [name for name in LIMITS if name not in of_guidance]
    for one in good.values():
        assert np.isfinite(one["value"]) and one["sentence"] and one["status"] in ("ok", "warn")
    for name in ("geometry", "affine scale", "affine shape", "affine rotation", "field of view", "overlap", "inverse",
                 "slices", "flatness"):
        assert good[name]["status"] == "ok", good[name]


def like(image, data, affine=None):
    return nib.Nifti1Image(data.astype(np.float32), image.affine if affine is None else affine)


def warned(found):
    return {name for name, one in found.items() if one["status"] == "warn"}


SPOILT = {  # what is wrong: (change of (data, affine), whether an affine is looked for, a check that has to warn)
    "upside down": (lambda x, a: (x[:, ::-1, ::-1], a), True, "affine rotation"),
    "cut": (lambda x, a: (x[:, :, x.shape[2] // 2:], a @ nib.affines.from_matvec(np.eye(3), (0, 0, 16))), True,
            "field of view"),
    "repeated slices": (lambda x, a: (x[:, :, np.arange(x.shape[2]) // 4 * 4], a), False, "slices"),
    "a label map": (lambda x, a: (np.digitize(x, (1, 400, 700)), a), False, "flatness"),
    "a smaller head": (lambda x, a: (x, np.diag([0.6, 0.6, 0.6, 1]) @ a), True, "size of moving"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_what_is_spoilt_raises_an_alarm(kind, pair, good):
    change, affine, name = SPOILT[kind]
    fixed, moving = pair
    found = checked(fixed, like(moving, *change(np.asarray(moving.dataobj, np.float32), moving.affine)), affine=affine)
    assert name in warned(found) - warned(good), found


def test_strict_ends_with_3_and_the_report_tells_the_checks_that_warn_first(pair, tmp_path, monkeypatch, capsys):
    fixed, moving = pair
    data = np.asarray(moving.dataobj, np.float32)
    for name, image in (("fixed", fixed), ("moving", like(moving, data[:, :, np.arange(data.shape[2]) // 4 * 4]))):
        nib.save(image, tmp_path / f"{name}.nii")
    arguments = ["--fixed", tmp_path / "fixed.nii", "--moving", tmp_path / "moving.nii", "--out", tmp_path / "out",
                 "--method", "demons", "--no-affine"]
    for flags, status in (([], 0), (["--strict"], 3)):
        found, said = run(program, [*arguments, *flags], monkeypatch, capsys)
        assert found == status and "warning: slices is 0." in said
    kept = json.loads((tmp_path / "out" / "summary.json").read_text())["checks"]
    assert {"name", "value", "limits", "status", "sentence"} == set(kept[0])
    page = (tmp_path / "out" / "report.html").read_text()
    assert 0 < page.index("<td>slices</td>") < page.index("<td>flatness</td>")
