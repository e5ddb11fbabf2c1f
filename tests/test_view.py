"""The page of a result: what it shows, who may see it, and what it does. How it looks: test_view_browser."""

import base64
import gzip
import http.client
import json
import re
import shutil
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import from_matvec

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.evaluation import layers
from drivenmorph_jax.files import make_folder
from drivenmorph_jax.images.reading import load_image
from drivenmorph_jax.registration import decisions
from drivenmorph_jax.registration.correct import State
from drivenmorph_jax.registration.history import HISTORY, History
from drivenmorph_jax.registration.region import NOWHERE
from drivenmorph_jax.transforms.files import write_force
from drivenmorph_jax.transforms.itk import write_affine
from drivenmorph_jax.transforms.transform import Transform
from drivenmorph_jax.view import niivue, server, steering
from drivenmorph_jax.view.layers import IMAGES, Shown

SHAPE = 30, 34, 32
AFFINE = from_matvec(np.diag([-2.0, 2, 2]), [30, -34, -32])  # LAS
TURN = from_matvec([[0, -1, 0], [1, 0, 0], [0, 0, 1]], [1.0, 2, 3])
SHIFT = np.array([2.0, -1, 2])  # mm, of length 3
SWOLLEN, FOLDED, FAULTY = (20, 17, 16), (15, 10, 16), (12, 20, 18)  # voxels; at FAULTY the images differ most


def save(path, data):
    nib.save(nib.Nifti1Image(data, AFFINE), path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a result whose maps are known: x -> TURN (x + SHIFT)."""
    folder = tmp_path_factory.mktemp("study")
    out = folder / "out"
    out.mkdir()
    x = np.moveaxis(np.indices(SHAPE), 0, -1)
    brain = np.linalg.norm(x - np.array(SHAPE) / 2, axis=-1) < 13
    image = np.where(brain, 100 + 20 * np.sin(x).sum(-1), 0).astype(np.float32)
    near = np.linalg.norm(x - np.array(FAULTY), axis=-1) < 4
    save(folder / "fixed.nii.gz", image)
    save(folder / "moving.nii.gz", image)
    save(out / "warped.nii.gz", image)
    jacobian = np.full(SHAPE, 2.0, np.float32)
    jacobian[SWOLLEN], jacobian[FOLDED], jacobian[0, 0, 0] = 600, -1, 8  # the last one outside the brain
    save(out / "jacobian.nii.gz", jacobian)
    save(out / "confidence.nii.gz", np.where(near, 0.1, np.where(brain, 0.9, 0)).astype(np.float32))
    save(out / "uncertainty.nii.gz", np.full(SHAPE, 2.5, np.float32))
    save(out / "warped_labels.nii.gz", np.where(brain & (x[..., 0] > 15), 7, 0).astype(np.int16))
    grid = load_image(folder / "fixed.nii.gz")
    write_force(out / "force.nii.gz", np.broadcast_to(np.float32([0, 3, 4]), (*SHAPE, 3)), grid, "test")
    places = np.einsum("ij,...j", AFFINE[:3, :3], x) + AFFINE[:3, 3]
    total = (places + SHIFT) @ TURN[:3, :3].T + TURN[:3, 3] - places
    Transform(total.astype(np.float32), grid, TURN @ from_matvec(np.eye(3), SHIFT)).save(out / "displacement.nii.gz")
    write_affine(out / "affine.tfm", TURN)
    checks = [{"name": "overlap", "value": 0.95, "limits": [0.9, 1], "status": "ok", "sentence": "Dice."},
              {"name": "stretch", "value": 9.0, "limits": [0, 7], "status": "warn", "sentence": "<b>Range</b>."},
              {"name": "similarity", "value": None, "limits": [0.3, None], "status": "warn", "sentence": "Local."}]
    marks = [{"name": "one", "fixed": [1.0, 2, 3], "before_mm": 4.0, "after_mm": 0.1, "left_out": None},
             {"name": "<i>two", "fixed": [9.0, 9, 9], "before_mm": 4.0, "after_mm": 8.0, "left_out": "contradicts one"}]
    (out / "summary.json").write_text(json.dumps({
        "fixed": str(folder / "fixed.nii.gz"), "moving": str(folder / "moving.nii.gz"), "method": "demons",
        "checks": checks, "landmarks": marks, "files": sorted(path.name for path in out.iterdir())}))
    return folder


@pytest.fixture(scope="module")
def shown(folder):
    return Shown(folder / "out")


def test_maps_are_the_lengths_and_logarithms_of_the_files(shown):
    brain = shown.fixed.data > 0
    for name, wanted in (("displacement", 3), ("force", 5), ("uncertainty", 2.5)):  # the first without the affine
        x, low, high = shown.layer(name)
        np.testing.assert_allclose(x, np.where(brain, wanted, 0), atol=1e-3)
        assert low == 0 and high >= wanted
    jacobian, low, high = shown.layer("jacobian")
    assert jacobian[15, 17, 8] == 1 and jacobian[SWOLLEN] == high == 2 and jacobian[FOLDED] == low == -2
    assert not jacobian[~brain].any()


def test_outlines_are_the_borders_of_labels():
    labels = np.zeros((9, 9, 9), int)
    labels[2:7, 2:7, 2:7] = 4
    labels[4:7, 2:7, 2:7] = 5
    edge = layers.outlines(labels)
    assert not edge[labels == 0].any() and edge[4, 2:7, 2:7].all() and not edge[3, 3:6, 3:6].any()
    assert edge.sum() == 3 * 25 + 2 * 16  # layers 2, 4 and 6 along the first axis are whole


def test_every_layer_is_a_file_that_niivue_shows_rightly(shown):
    images = [shown.image(name) for name in IMAGES]
    seen = np.argwhere(np.any([x > 0.1 * np.percentile(x[x > 0], 99) for x in images], axis=0))
    corner, end = (np.array([getattr(one, side) for one in shown.box]) for side in ("start", "stop"))
    for at, wanted in ((corner, seen.min(0) - 2), (SHAPE - end, SHAPE - seen.max(0) - 3)):
        assert ((at == np.maximum(wanted, 0)) | (at == np.maximum(wanted - 1, 0))).all()  # 2 or 3 voxels of background
    for name in (*IMAGES, *shown.maps()):
        image = nib.Nifti1Image.from_bytes(shown.file(name))
        assert image.shape == tuple(end - corner) and image.get_data_dtype() == np.int16
        assert not image.header["intent_code"] and image.header["cal_min"] < image.header["cal_max"]
        for affine, code in (image.get_qform(coded=True), image.get_sform(coded=True)):
            np.testing.assert_allclose(affine[:3, 3], nib.affines.apply_affine(AFFINE, corner), atol=1e-4)
            np.testing.assert_allclose(affine[:3, :3], AFFINE[:3, :3], atol=1e-6)
            assert code > 0
        x, low, high = shown.layer(name)
        np.testing.assert_allclose(image.get_fdata(), x[shown.box], atol=np.abs(x).max() / 60_000)
        assert np.array_equal(np.asarray(image.dataobj) == 0, x[shown.box] == 0)  # 0 is transparent
        np.testing.assert_allclose([image.header["cal_min"], image.header["cal_max"]], [low, high], rtol=1e-5)


def test_a_drawing_is_a_mask_on_the_grid_of_the_fixed_image(shown):
    mask = np.random.default_rng(0).random(SHAPE) < 0.1
    inside = np.zeros(SHAPE, bool)
    inside[shown.box] = mask[shown.box]
    np.testing.assert_array_equal(shown.mask(shown.drawing(mask)), inside)
    for wrong in (b"", b"x" * 1000, shown.drawing(mask)[:500], shown.file("fixed")[:-1],
                  nib.Nifti1Image(np.ones((3, 3, 3), np.uint8), shown.affine).to_bytes()):
        with pytest.raises(InputError, match="load the page again"):
            shown.mask(wrong)


def test_checks_lead_to_where_they_are_worst(shown):
    places = shown.places()
    np.testing.assert_allclose(places["stretch"], nib.affines.apply_affine(AFFINE, SWOLLEN))
    assert np.linalg.norm(places["similarity"] - nib.affines.apply_affine(AFFINE, FAULTY)) < 2 * 6
    assert places["landmarks"] == [1, 2, 3]  # the other was left out
    assert [one["name"] for one in shown.described()["checks"]] == ["stretch", "similarity", "overlap"]


def test_a_folder_without_a_result_and_a_missing_image_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match="holds no result of register"):
        Shown(tmp_path)
    copy = shutil.copytree(folder / "out", tmp_path / "out")
    summary = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").write_text(json.dumps(summary | {"moving": "gone.nii.gz"}))
    with pytest.raises(InputError, match="gone.nii.gz, which .* does not exist"):
        Shown(copy)


class Quick:
    """A stand-in for `Session`: everything in the box is moved by the first landmark, at once."""

    identity, hold = 7, None

    def __init__(self, folder):
        self.folder, self.summary = Path(folder), json.loads((Path(folder) / "summary.json").read_text())
        self.fixed, self.moving = (load_image(self.summary[role]) for role in ("fixed", "moving"))
        self.transform = Transform.load(self.folder / "displacement.nii.gz")
        voxels = [np.asarray(nib.load(self.folder / f"{name}.nii.gz").dataobj)
                  for name in ("warped", "jacobian", "warped_labels")]
        self.labels = replace(self.fixed, data=np.int32(voxels[2]))
        self.fixed_labels = replace(self.fixed, data=np.roll(self.labels.data, 1, axis=0))
        self.first = State((self.transform.displacement, *voxels), NOWHERE, None, None, [], [], {})

    def warm(self):
        """Nothing to compile."""

    def corrected(self, correction, progress):
        if self.summary != json.loads((self.folder / "summary.json").read_text()):
            raise InputError(f"{self.folder} holds another result than it did when it was opened: open it again")
        progress("deform", 0.5)
        if self.hold:
            self.hold.wait(20)
        marks, found = correction.landmarks, self.first.found
        if marks is None:
            raise InputError("the correction asks for nothing")
        told = [{"name": name, "fixed": fixed.tolist(), "weight": 1.0, "before_mm": 3.0, "after_mm": 0.0,
                 "left_out": None} for name, fixed in zip(marks.names, marks.fixed, strict=True)]
        pairs = [{"fixed": a, "moving": b, "dice_before": 0.5, "dice_after": 0.75, "left_out": None}
                 for a, b in correction.label_pairs]
        move = np.float32(marks.moving[0] - marks.fixed[0])
        parts = np.zeros_like(found[0]) + move, found[1] * 2, found[2] * 2, found[3] * 2
        return State(found, tuple(slice(0, n) for n in SHAPE), parts, correction, told, pairs,
                     {"similarity_before": 0.25, "similarity_after": 0.5, "fold_pct": 0.0, "seconds": 0.1})

    def save(self, history, out, progress):
        history.write(make_folder(out))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(steering, "Session", Quick)
    return Quick


@contextmanager
def serving(page):
    with server.Server(page) as one:
        thread = threading.Thread(target=one.serve_forever, daemon=True)
        thread.start()
        yield one
        one.shutdown()
        thread.join(10)


@pytest.fixture(scope="module")
def running(folder):
    with serving(steering.ResultPage(folder / "out")) as one:
        yield one


def answer(running, path, method="GET", body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", running.server_port, timeout=20)
    try:
        connection.request(method, path, body, headers={name.replace("_", "-"): text for name, text in headers.items()})
        found = connection.getresponse()
        return SimpleNamespace(status=found.status, headers=found.headers, body=found.read())
    finally:
        connection.close()


def test_the_page_is_served_on_the_loopback_address_with_its_policy(running):
    assert running.server_address[0] == "127.0.0.1" and len(running.token) >= 32
    page = answer(running, f"/{running.token}/")
    assert page.status == 200 and b"<canvas " in page.body
    assert page.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self';")
    assert "http" not in page.headers["Content-Security-Policy"] and b"http" not in page.body
    assert "Access-Control-Allow-Origin" not in page.headers and page.headers["Referrer-Policy"] == "no-referrer"
    told = json.loads(answer(running, f"/{running.token}/result.json").body)
    assert told["title"] == "moving.nii.gz to fixed.nii.gz"
    assert answer(running, f"/{running.token}/force.nii").body == running.page.shown.file("force")


def test_the_document_has_every_control_and_its_pictures():
    docs = Path(server.__file__).parents[2] / "docs"
    told, html = (docs / "view.md").read_text(), server.part("page.html").decode()
    controls = (re.findall(r"<button[^>]*>([^<]+)<", html)
                + re.findall(r"<label[^>]*>(?:<input[^>]*>)? *([^<]+?) *<", html))
    assert len(controls) > 12 and [one for one in controls if one not in told] == []
    assert {*re.findall(r'title="Key (\w)"', html)} == {*"LGURE"} and "D paints" in html
    pictures = re.findall(r"\((view_\w+\.png)\)", told)
    assert len(pictures) == 4 and all((docs / name).stat().st_size > 10_000 for name in pictures)


def test_nothing_else_is_served(running):
    token = running.token
    names = "other", "summary.json", "../../etc/passwd", "..%2fsummary.json", "fixed", "/etc/passwd", "fixed.nii/", "0/"
    for path in ("*", "/", "/result.json", f"/{token[:-1]}x/", f"/{token}", *(f"/{token}/{name}" for name in names)):
        assert answer(running, path).status == 404, path
    assert answer(running, f"/{token}/", "PUT").status == 501


def test_other_sites_are_refused(running):
    port, page = running.server_port, f"/{running.token}/"
    for headers in ({"Host": f"evil.example:{port}"}, {"Host": "127.0.0.1"}, {"Origin": "http://evil.example"},
                    {"Origin": "null"}, {"Origin": f"http://127.0.0.1:{port + 1}"}, {"Sec_Fetch_Site": "cross-site"},
                    {"Sec_Fetch_Site": "same-site"}):
        assert answer(running, page, **headers).status == 403, headers
    for headers in ({"Host": f"localhost:{port}"}, {"Origin": f"http://127.0.0.1:{port}"},
                    {"Sec_Fetch_Site": "same-origin"}):
        assert answer(running, page, **headers).status == 200, headers


def ask(running, what, **content):
    """(status, content) of what is asked for as the page does it."""
    found = answer(running, f"/{running.token}/{what}", "POST", json.dumps(content), Content_Type="application/json",
                   Origin=running.address[:-len(f"/{running.token}/")])
    return found.status, json.loads(found.body)


def told(running, wanted, seconds=20):
    """What the pages are told, once `wanted` is true of it."""
    number, content = running.page.news.wait(None, 0)
    end = time.monotonic() + seconds
    while not wanted(content):
        assert time.monotonic() < end, content
        number, content = running.page.news.wait(number, 1)
    return content


def marks(content):
    """The landmarks that the pages are told of, without what the program says of them."""
    return [{name: one[name] for name in MARK} for one in content["landmarks"]]


def idle(content):
    return content["able"] and not content["busy"]


def packed(shown, mask):
    return base64.b64encode(gzip.compress(shown.drawing(mask))).decode()


MARK = {"name": "one", "fixed": [1.0, 2, 3], "moving": [4.0, 2, 3], "radius": None, "weight": 1.0}
GOOD = {"landmarks": [MARK], "distrust": None, "stiffness": 0, "label_pairs": []}  # what a page asks for


@pytest.fixture
def result(folder, tmp_path, quick):
    """A copy of the result."""
    return Path(shutil.copytree(folder / "out", tmp_path / "result"))


def test_a_correction_is_made_undone_redone_kept_and_exported(result):
    mask = np.zeros(SHAPE, bool)
    mask[14:17, 12:15, 11:20] = True
    with serving(page := steering.ResultPage(result)) as one:
        page.begin()
        assert not told(one, idle)["before"]
        drawing, first = packed(page.shown, mask), answer(one, f"/{one.token}/warped.nii").body
        assert ask(one, "go", **GOOD | {"distrust": drawing, "stiffness": 2.5}) == (200, {})
        found = told(one, lambda content: content["at"] == 1 and idle(content))
        assert marks(found) == [MARK] and found["distrust"] and found["stiffness"] == 2.5 and found["before"]
        assert found["maps"] == ["force", "displacement", "jacobian", "labels"]  # the uncertainty is that of another
        assert found["landmarks"][0]["after_mm"] == 0 and found["steps"][0]["similarity_after"] == 0.5
        assert "1 landmark" in found["steps"][0]["words"] and "2.5 mm" in found["steps"][0]["words"]
        voxels = {name: nib.Nifti1Image.from_bytes(answer(one, f"/{one.token}/{name}.nii").body).get_fdata()
                  for name in ("warped", "before", "displacement", "jacobian", "distrust")}
        np.testing.assert_allclose(voxels["warped"], 2 * voxels["before"], atol=0.1)
        assert answer(one, f"/{one.token}/before.nii").body == first
        np.testing.assert_array_equal(page.shown.mask(answer(one, f"/{one.token}/distrust.nii").body), mask)
        again = ask(one, "go", **GOOD | {"landmarks": [MARK, MARK | {"name": "two", "radius": 5.0}]})
        assert again == (200, {}) and told(one, lambda content: content["at"] == 2 and idle(content))["landmarks"][1]
        for what, at, steps in (("undo", 1, 2), ("undo", 0, 2), ("undo", 0, 2), ("redo", 1, 2), ("redo", 2, 2)):
            assert ask(one, what)[0] == 200
            found = told(one, lambda content, at=at: content["at"] == at and idle(content))
            assert len(found["steps"]) == steps and found["before"] == (at > 0)
            kept = History.read(result / HISTORY, page._session)
            assert kept.at == at and len(kept.steps) == steps
        assert ask(one, "export") == (200, {})
        told(one, lambda content: "All files are in" in content["said"])
    copy = json.loads((result.parent / "result-corrected" / HISTORY).read_text())
    assert copy["at"] == 2 and copy["steps"][0]["landmarks"] == [MARK] and copy["steps"][0]["stiffness"] == 2.5
    with serving(page := steering.ResultPage(result)) as one:  # the program was killed and is started again
        page.begin()
        found = told(one, idle)
        assert found["at"] == 2 and [mark["name"] for mark in found["landmarks"]] == ["one", "two"]
        ask(one, "undo")
        assert told(one, lambda content: content["at"] == 1 and idle(content))["distrust"]


def test_a_click_is_carried_to_the_moving_image(result):
    with serving(page := steering.ResultPage(result)) as one:
        page.begin()
        told(one, idle)
        x = np.array([3.0, -5, 4])
        for panel, wanted in (("warped", x + SHIFT), ("moving", x)):
            status, found = ask(one, "point", panel=panel, place=x.tolist())
            np.testing.assert_allclose(found["moving"], TURN[:3, :3] @ wanted + TURN[:3, 3], atol=1e-4)
        ask(one, "go", **GOOD)  # moves all by 3 mm along x
        told(one, lambda content: content["at"] == 1 and idle(content))
        np.testing.assert_allclose(ask(one, "point", panel="warped", place=x.tolist())[1]["moving"], x + [3, 0, 0],
                                   atol=1e-4)
        np.testing.assert_allclose(ask(one, "point", panel="before", place=x.tolist())[1]["moving"],
                                   TURN[:3, :3] @ (x + SHIFT) + TURN[:3, 3], atol=1e-4)


def test_what_is_marked_is_kept_shown_to_all_pages_and_undone_first(result):
    mask = np.zeros(SHAPE, bool)
    mask[14:17, 12:15, 11:20] = True
    two = [MARK, MARK | {"name": "two", "weight": 0.5, "fixed": [4.0, 2, 3]}]
    with serving(page := steering.ResultPage(result)) as one:
        page.begin()
        assert not told(one, idle)["undoable"]
        marked = GOOD | {"landmarks": two, "distrust": packed(page.shown, mask), "label_pairs": [[7, 7]], "page": "a 1"}
        assert ask(one, "draft", **marked) == (200, {})
        found = page.news.content
        assert marks(found) == two and found["distrust"] and found["drafter"] == "a 1" and found["drafted"] == 2
        assert found["undoable"] and not found["redoable"] and found["at"] == 0 and found["made"] == 0
        row, pair = found["landmarks"][0], found["label_pairs"][0]
        assert row["after_mm"] is None and pair["dice_after"] is None and 0.8 < pair["dice_before"] < 1
        straight = np.linalg.inv(TURN) @ [*MARK["moving"], 1]  # the deformation is SHIFT
        for panel, wanted in (("fixed", MARK["fixed"]), ("moving", straight[:3]), ("warped", straight[:3] - SHIFT)):
            np.testing.assert_allclose(row["places"][panel], wanted, atol=0.01)
        assert row["before_mm"] == pytest.approx(np.linalg.norm(MARK["fixed"] + SHIFT - straight[:3]), abs=1e-3)
        for what, wanted in (("undo", []), ("redo", two)):
            ask(one, what)
            assert marks(told(one, lambda content, wanted=wanted: idle(content) and bool(content["landmarks"]) == bool(
                wanted))) == wanted
        assert not told(one, idle)["redoable"] and History.read(result / HISTORY, page._session).at == 0
    with serving(page := steering.ResultPage(result)) as one:  # the program was killed and is started again
        page.begin()
        found = told(one, idle)
        assert marks(found) == two and found["label_pairs"][0]["fixed"] == 7
        np.testing.assert_array_equal(page.shown.mask(answer(one, f"/{one.token}/distrust.nii").body), mask)
        ask(one, "go", **marked)
        found = told(one, lambda content: content["at"] == 1 and idle(content))
        assert marks(found) == two and found["label_pairs"][0]["dice_after"] == 0.75
        assert "label 7 onto 7" in found["steps"][0]["words"]
        assert ask(one, "go", **marked)[1]["error"] == steering.NOTHING_NEW
        ask(one, "draft", **marked | {"landmarks": two[:1]})
        assert len(page.news.content["landmarks"]) == 1 and page._history.draft is not None
        ask(one, "draft", **marked)  # as it is in force
        assert page._history.draft is None and page.news.content["landmarks"][0]["after_mm"] == 0
        ask(one, "draft", **marked | {"landmarks": two[:1]})
        ask(one, "export")
        said = told(one, lambda content: "All files are in" in content["said"])["said"]
        assert "What was marked since the last correction is not in them" in said
    other = (result / HISTORY).read_text().replace('"displacement_crc32": 7', '"displacement_crc32": 8')
    (result / HISTORY).write_text(other)
    with serving(page := steering.ResultPage(result)) as one:  # register wrote another result there
        page.begin()
        found = told(one, idle)
        assert found["landmarks"] == [] and "is the history of another result" in found["said"]
        assert "What you mark next begins another history in its place" in found["said"]


def test_what_cannot_be_kept_is_shown_until_the_program_ends(result):
    with serving(page := steering.ResultPage(result)) as one:
        page.begin()
        told(one, idle)
        (result / HISTORY).mkdir()  # so that it cannot be written, as on a full disk
        (result / HISTORY / "file").touch()
        status, found = ask(one, "draft", **GOOD)
        assert status == 409 and "lasts until the program ends only" in found["error"] and str(result) in found["error"]
        assert marks(page.news.content) == [MARK]
        ask(one, "go", **GOOD)
        found = told(one, lambda content: content["at"] == 1 and idle(content))
        assert "lasts until the program ends only" in found["said"] and found["warn"]
        assert [path.name for path in result.iterdir() if path.name.startswith((".", "distrust"))] == []


def test_checks_after_a_correction_say_what_they_are_of(result):
    with serving(page := steering.ResultPage(result)) as one:
        page.begin()
        assert not any("found" in check for check in told(one, idle)["checks"])
        ask(one, "go", **GOOD | {"label_pairs": [[7, 7]]})
        checks = {check["name"]: check for check in told(one, lambda content: content["at"] == 1)["checks"]}
        assert {name for name, check in checks.items() if check.get("found")} == {"stretch", "similarity"}
        assert checks["overlap"]["status"] == "ok" and checks["landmarks"]["value"] == 0
        assert checks["landmarks"]["place"] == MARK["fixed"] and checks["landmarks"]["limits"] == [0, 0.5]
        assert checks["guided labels"]["value"] == 0.75 and checks["landmarks left out"]["value"] == 0


def test_one_correction_at_a_time_with_its_progress(result, quick, monkeypatch):
    monkeypatch.setattr(quick, "hold", threading.Event())
    with serving(page := steering.ResultPage(result)) as one:
        assert ask(one, "go", **GOOD)[0] == 409  # it is not open yet
        page.begin()
        told(one, idle)
        ask(one, "go", **GOOD)
        assert told(one, lambda content: content["busy"] != "correct")["busy"] == "deform ... 50%"
        for what in ("go", "draft", "undo", "export"):
            status, found = ask(one, what, **GOOD)
            assert status == 409 and "wait until it has ended" in found["error"]
        quick.hold.set()
        assert told(one, idle)["at"] == 1


def test_what_is_no_correction_is_refused_in_one_sentence(result):
    with serving(page := steering.ResultPage(result)) as one:
        page.begin()
        told(one, idle)
        bomb = base64.b64encode(gzip.compress(bytes(10**7))).decode()
        for wrong in ({"landmarks": None}, {"landmarks": [{"name": "x"}]}, {"landmarks": [MARK | {"fixed": [1, 2]}]},
                      {"landmarks": [MARK | {"moving": [1, 2, "x"]}]}, {"landmarks": [MARK | {"radius": -1}]},
                      {"landmarks": [MARK, MARK]}, {"landmarks": [MARK | {"name": " "}]}, {"stiffness": -1},
                      {"stiffness": "x"}, {"distrust": "%"}, {"distrust": "eA=="}, {"distrust": bomb}, {"distrust": 3},
                      {"landmarks": [MARK | {"fixed": [1, 2, float("nan")]}]}, {"landmarks": [MARK | {"weight": 1.5}]},
                      {"landmarks": [MARK | {"fixed": [500, 2, 3]}]}, {"label_pairs": None}, {"label_pairs": [[7]]},
                      {"label_pairs": [[7, 7], [7, 8]]}, {"label_pairs": [[7, 9]]}, {"label_pairs": [["x", 7]]}):
            for what in ("go", "draft"):
                status, found = ask(one, what, **GOOD | wrong)
                assert status == 409 and found["error"].count("\n") == 0, wrong
        assert ask(one, "label", place=nib.affines.apply_affine(AFFINE, [20, 17, 16]).tolist()) == (200, {"label": 7})
        assert "no label at the crosshair" in ask(one, "label", place=[999, 0, 0])[1]["error"]
        assert ask(one, "point", panel="warped", place=None)[0] == 409
        page_path, json_type = f"/{one.token}/go", {"Content_Type": "application/json"}
        assert answer(one, page_path, "POST", json.dumps(GOOD)).status == 400  # as a form of another site sends it
        assert answer(one, page_path, "POST", "[1]", **json_type).status == 400
        assert answer(one, page_path, "POST", "{", **json_type).status == 400
        assert answer(one, page_path, "POST", "", Content_Length=str(2**30), **json_type).status == 413
        assert answer(one, page_path, "POST", json.dumps(GOOD), Origin="http://evil.example", **json_type).status == 403
        assert answer(one, "/x/go", "POST", json.dumps(GOOD), **json_type).status == 404
        assert answer(one, f"/{one.token}/other", "POST", json.dumps(GOOD), **json_type).status == 404
        assert told(one, idle)["at"] == 0 and not (result / HISTORY).exists()


def test_a_result_that_changed_or_cannot_be_corrected_says_so(result, monkeypatch):
    with serving(page := steering.ResultPage(result)) as one:
        page.begin()
        told(one, idle)
        summary = json.loads((result / "summary.json").read_text())
        (result / "summary.json").write_text(json.dumps(summary | {"method": "drivenmorph"}))
        ask(one, "go", **GOOD)
        found = told(one, lambda content: content["warn"])
        assert "holds another result than it did" in found["said"] and found["at"] == 0 and idle(found)
    (result / HISTORY).write_text("{}")
    with serving(page := steering.ResultPage(result)) as one:
        page.begin()
        assert "is no history of corrections" in told(one, idle)["said"]
    (result / "summary.json").write_text(json.dumps(summary | {"corrected": {"result": "other"}}))
    with serving(page := steering.ResultPage(result)) as one:
        page.begin()
        found = told(one, lambda content: content["said"])
        assert "looked at only. It is a correction of other" in found["said"] and not found["able"]
        assert ask(one, "go", **GOOD)[1]["error"] == found["said"]


@pytest.fixture
def cohort(folder, tmp_path):
    """The folder of a cohort of three pairs."""
    for name in ("good", "<b>bad"):
        shutil.copytree(folder / "out", tmp_path / name)
    (tmp_path / "cohort.csv").write_text("name,fixed,moving,status,warnings,checks,error\ngood,f,m,done,1,slices,\n"
                                         "<b>bad,f,m,done,3,x,\nlost,f,m,missing,,,\nbroken,f,m,failed,,,no image\n")
    return tmp_path


def test_a_cohort_is_listed_and_decisions_are_kept_in_its_table(cohort):
    with serving(server.opened(cohort)) as one:
        pairs = told(one, lambda content: content)["pairs"]
        assert [pair["name"] for pair in pairs] == ["broken", "lost", "<b>bad", "good"]
        assert [pair["number"] for pair in pairs] == [None, None, 2, 3]
        assert b"cohort.js" in answer(one, f"/{one.token}/").body
        about = json.loads(answer(one, f"/{one.token}/2/result.json").body)
        assert about["pair"] == {"name": "<b>bad", "next": 3}
        assert answer(one, f"/{one.token}/3/fixed.nii").status == 200
        for number in ("4", "x", "-1", ".."):
            assert answer(one, f"/{one.token}/{number}/").status == 404, number
        found = answer(one, f"/{one.token}/0/")  # which failed
        assert found.status == 409 and b"holds no result of register" in found.body
        assert ask(one, "decide", name="<b>bad", decision="redo", note=' moved,\n "twice" ') == (200, {})
        assert ask(one, "decide", name="good", decision="accept", note="")[0] == 200
        for wrong in ({"name": "other"}, {"decision": "x"}, {"note": 3}, {"note": "x" * 20_000}):
            assert ask(one, "decide", **{"name": "good", "decision": "", "note": ""} | wrong)[0] == 409
        kept = {pair["name"]: pair for pair in one.page.news.content["pairs"]}
    assert kept["<b>bad"]["note"] == 'moved, "twice"' and kept["good"]["decision"] == "accept"
    assert decisions.decisions(cohort)["<b>bad"] == {"decision": "redo", "note": 'moved, "twice"'}
    rows = decisions.read_table(cohort)
    assert [row["name"] for row in rows] == ["good", "<b>bad", "lost", "broken"] and rows[3]["error"] == "no image"
    with pytest.raises(InputError, match=r"cohort.csv does not exist: give the --out of cohort"):
        decisions.read_table(cohort / "good")


def test_the_server_ends_when_the_last_page_is_closed(folder, quick, monkeypatch):
    monkeypatch.setattr(server, "GRACE", 0.3)
    monkeypatch.setattr(server, "BEAT", 0.05)
    with server.Server(steering.ResultPage(folder / "out")) as one:
        thread = threading.Thread(target=one.serve_forever)
        thread.start()
        pages = []
        for _ in range(2):
            connection = http.client.HTTPConnection("127.0.0.1", one.server_port, timeout=20)
            connection.request("GET", f"/{one.token}/alive")
            pages.append(connection.getresponse())
            assert pages[-1].readline().startswith(b'data: {"able": ')
        pages[0].close()
        time.sleep(1.5)
        assert thread.is_alive()  # the other is open
        pages[1].close()
        thread.join(20)
        assert not thread.is_alive()


def test_a_port_in_use_is_refused(running):
    with pytest.raises(InputError, match=f"port {running.server_port} cannot be used"):
        server.Server(running.page, running.server_port)


def test_niivue_is_found_or_asked_for_in_one_sentence(monkeypatch, tmp_path):
    (tmp_path / "static").mkdir()
    script = tmp_path / "static" / "widget.js"
    script.write_text('if(!v){console.log("Creating new Niivue instance");let B=g();v=new t$2(C)}export{w as default};')

    def made(found):
        monkeypatch.setattr(niivue, "find_spec", lambda name: found)
        niivue.module.cache_clear()
        return niivue.module()

    there = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    assert made(there).endswith("\nexport { t$2 as Niivue };\n")
    script.write_text("another")
    with pytest.raises(InputError, match="has no NiiVue that the page can use: pip install"):
        made(there)
    with pytest.raises(InputError, match="the page needs NiiVue: pip install --no-deps ipyniivue=="):
        made(None)
    niivue.module.cache_clear()
