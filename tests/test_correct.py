"""Corrections of a finished result: landmarks hold, nothing else moves, and a history makes the same files again."""

import json
import shutil
from dataclasses import replace
from importlib import import_module

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine, from_matvec
from scipy import ndimage
from test_programs import refused, run

import correct as program
from drivenmorph_jax.demons.guidance import kernel
from drivenmorph_jax.errors import InputError, InputWarning
from drivenmorph_jax.files import checksum
from drivenmorph_jax.images.reading import load_image
from drivenmorph_jax.images.volume import affine_of_part
from drivenmorph_jax.registration import correct, piece, region
from drivenmorph_jax.registration.correct import Correction, Session
from drivenmorph_jax.registration.export import corrected_result
from drivenmorph_jax.registration.guide import labels_left_out
from drivenmorph_jax.registration.history import History, same
from drivenmorph_jax.registration.plan import demons_grid
from drivenmorph_jax.registration.register import register
from drivenmorph_jax.transforms.points import Landmarks
from drivenmorph_jax.transforms.transform import Transform
from drivenmorph_jax.transforms.world import jacobian_determinant_of_displacement, pull_back

pytestmark = pytest.mark.usefixtures("no_pictures")

SIDE, MM = 28, 5.0
RADIUS = 11.0  # mm; a region of 14 voxels, and so the smallest box
POINTS, SHIFT = [[20.0, 5, 0]], [4.0, -2, 3]
AFFINE = np.array([[-MM, 0, 0, 70], [0, MM, 0, -70], [0, 0, MM, -70], [0, 0, 0, 1]])
FAST = {"method": "demons", "force": "intensity", "affine": "none", "quiet": True}


def brain(path, stretch, labels=False):
    x = (np.moveaxis(np.indices((SIDE,) * 3), 0, -1) - SIDE / 2) / [stretch, 1.1, 1]
    data = np.select([(radius := np.linalg.norm(x, axis=-1)) < 4, radius < 7, radius < 10], [3, 9, 6], 0)
    nib.save(nib.Nifti1Image((data if labels else 100 * data).astype(np.int16), AFFINE), path)


@pytest.fixture(scope="module", autouse=True)
def few_iterations():
    """The tests compile hardly optimised code, and need little of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(piece, "ITERATIONS", 4)
        yield


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A folder with two images, a label map, and the folder "result" of their registration."""
    folder = tmp_path_factory.mktemp("study")
    brain(folder / "fixed.nii.gz", 1.1)
    brain(folder / "moving.nii.gz", 0.95)
    brain(folder / "moving_seg.nii.gz", 0.95, labels=True)
    brain(folder / "fixed_seg.nii.gz", 1.1, labels=True)
    register(str(folder / "fixed.nii.gz"), str(folder / "moving.nii.gz"), **{
        f"{role}_labels": str(folder / f"{role}_seg.nii.gz") for role in ("fixed", "moving")}, **FAST).save(
            folder / "result")
    return folder


@pytest.fixture(scope="module")
def session(study):
    return Session(study / "result")


def landmarks(session, points, shift, radius=RADIUS, names="abcdef"):
    """Landmarks whose partners lie `shift` away from where the result has them."""
    points = np.array(points, float)
    moving = Transform(session.first.displacement, session.fixed, session.transform.linear).points(points) + shift
    return Landmarks(tuple(names[:len(points)]), points, moving, np.broadcast_to(radius, len(points)).astype(float))


def distance(session, points):
    x = apply_affine(session.fixed.affine, np.moveaxis(np.indices(session.fixed.data.shape), 0, -1))
    return np.min([np.linalg.norm(x - point, axis=-1) for point in points], 0)


@pytest.fixture(scope="module")
def led(session):
    """A state with a landmark."""
    told = []
    state = session.corrected(Correction(landmarks(session, POINTS, SHIFT)), lambda *one: told.append(one))
    assert told[0] == ("read", 0.0) and [share for _, share in told] == sorted(share for _, share in told)
    return state


def test_landmarks_hold_and_nothing_moves_elsewhere(session, led):
    before, far, (one,) = session.first, distance(session, POINTS) > 3 * RADIUS, led.told
    assert one["name"] == "a" and one["left_out"] is None
    assert one["before_mm"] == pytest.approx(np.linalg.norm(SHIFT), abs=1e-3) and one["after_mm"] < 0.5
    moved = np.linalg.norm(led.displacement - before.displacement, axis=-1)
    assert moved[far].max() < 0.05 and moved.max() > 3 and led.jacobian.min() > 0
    outside = np.ones(far.shape, bool)
    outside[led.region] = False
    assert outside.any()
    for name in ("displacement", "warped", "jacobian", "labels"):
        np.testing.assert_array_equal(getattr(led, name)[outside], getattr(before, name)[outside])


def test_the_state_is_what_the_formulas_give_for_its_displacement(session, led):
    affine = session.fixed.affine
    np.testing.assert_allclose(led.warped, pull_back(session.moving, led.displacement, affine), atol=1e-2)
    np.testing.assert_allclose(led.jacobian, jacobian_determinant_of_displacement(led.displacement, affine), atol=1e-5)
    np.testing.assert_array_equal(led.labels, pull_back(session.labels, led.displacement, affine, "nearest"))
    assert led.numbers["fold_pct"] == 0 and 0 < led.numbers["similarity_before"] <= 1


def changed(session, study, folder, displacement):
    """The session of a copy of the result with another displacement."""
    copy = shutil.copytree(study / "result", folder / "changed")
    Transform(displacement.astype(np.float32), session.fixed, np.eye(4), session.moving).save(
        copy / "displacement.nii.gz")
    return Session(copy)


def test_a_rough_field_beyond_a_correction_keeps_its_bits(session, study, tmp_path):
    far, spacing = distance(session, POINTS) > 3 * RADIUS, session.fixed.spacing[0]
    rough = session.first.displacement.copy()
    # By central differences this folds nowhere. By one-sided ones, as at the border of a part, it does.
    waves = 0.6 * spacing * (-1.0) ** np.indices(far.shape).sum(0)
    inside = np.pad(np.ones([n - 6 for n in far.shape], bool), 3)  # the border of the image is one as well
    rough[..., 0] += far * inside * waves
    one = changed(session, study, tmp_path, rough)
    state = one.corrected(Correction(landmarks(one, POINTS, SHIFT)))
    np.testing.assert_array_equal(state.displacement[far], one.first.displacement[far])


def test_where_images_are_not_trusted_the_field_is_that_of_the_surroundings(session, study, tmp_path):
    """A bump that no image asks for goes, and what lies beyond its surroundings stays."""
    middle = [0.0, -10, 0]
    bump = np.exp(-0.5 * (distance(session, [middle]) / 6) ** 2)[..., None] * np.array([8.0, 0, 0])
    wrong = changed(session, study, tmp_path, session.first.displacement + bump)
    ball = distance(wrong, [middle]) < 12
    state = wrong.corrected(Correction(distrust=ball))
    error = np.linalg.norm(wrong.first.displacement - session.first.displacement, axis=-1)
    left = np.linalg.norm(state.displacement - session.first.displacement, axis=-1)
    assert error[ball].max() > 7 and left[ball].max() < 2.5 and state.jacobian.min() > 0
    far = ndimage.distance_transform_edt(~ball) * MM > 20
    np.testing.assert_allclose(state.displacement[far], wrong.first.displacement[far], atol=0.05)
    assert state.told == []


def test_stiffness_is_a_gaussian_where_the_correction_acts(session, study, tmp_path, monkeypatch):
    """A wave loses exp(-2 pi^2 s^2 / length^2) of its height, where w is 1, and 1 - w (1 - that) of it elsewhere."""
    monkeypatch.setattr(piece, "ITERATIONS", 0)
    middle, length, height, stiffness = [0.0, 0, 0], 40.0, 3.0, 8.0
    x = apply_affine(AFFINE, np.moveaxis(np.indices((SIDE,) * 3), 0, -1))[..., 0]
    wave = height * np.sin(2 * np.pi * x / length)[..., None] * np.array([1.0, 0, 0])
    waved = changed(session, study, tmp_path, wave)
    marks = landmarks(waved, [middle], np.zeros(3))  # on a zero of the wave, so that it holds already
    state = waved.corrected(Correction(marks, stiffness=stiffness))
    away = distance(waved, [middle])
    w = np.minimum(1, 2 * kernel(away / (3 * RADIUS - 2 * MM)))
    loss = 1 - np.exp(-2 * (np.pi * stiffness / length) ** 2)
    np.testing.assert_allclose(state.displacement, wave * (1 - w * loss)[..., None], atol=0.05 * height)
    assert (w * loss).max() > 0.4 and state.told[0]["after_mm"] < 0.1 and state.jacobian.min() > 0


def test_a_landmark_of_less_weight_lets_the_images_decide_partly(session, led):
    marks = replace(led.correction.landmarks, weight=np.array([0.5]))
    (one,) = session.corrected(Correction(marks)).told
    assert one["weight"] == 0.5 and 0.5 < one["after_mm"] < 0.95 * one["before_mm"]


def test_pairs_of_labels_bring_borders_together_and_nothing_moves_elsewhere(session, study, tmp_path, monkeypatch):
    for module in (correct, piece, import_module(labels_left_out.__module__)):  # voxels are large here
        monkeypatch.setattr(module, "BORDER_RADIUS", 2 * MM)
    middle = [0.0, 0, 0]
    bump = np.exp(-0.5 * (distance(session, [middle]) / 30) ** 2)[..., None] * np.array([5.0, 0, 0])
    wrong = changed(session, study, tmp_path, session.first.displacement + bump)
    wrong.first.found[3][:] = pull_back(wrong.labels, wrong.first.displacement, AFFINE, "nearest")
    state = wrong.corrected(wrong.correction(guide_labels=["3"]))
    (told,) = state.labels_told
    assert told["fixed"] == told["moving"] == 3 and told["left_out"] is None and state.jacobian.min() > 0
    one, other = wrong.fixed_labels.data == 3, state.labels == 3
    assert told["dice_after"] == pytest.approx(2 * (one & other).sum() / (one.sum() + other.sum()))
    assert told["dice_after"] > max(0.9, told["dice_before"] + 0.04)
    moved = np.linalg.norm(state.displacement - wrong.first.displacement, axis=-1)
    border = ndimage.distance_transform_edt(wrong.fixed_labels.data != 3) * MM
    assert moved[border > 3 * 2 * MM + MM].max() < 0.05 < 2 < moved.max()
    with pytest.raises(InputError, match=r"fixed_seg.nii.gz has no label 8"):
        session.corrected(Correction(label_pairs=((8, 3),)))


def test_curves_of_a_table_become_landmarks_from_end_to_end(session, tmp_path):
    """The moving line is that of the fixed one by the result, from its other end, and so the landmarks lack nothing."""
    line = np.array([[-20.0, 0, 0], [0, 5, 0], [20, 0, 10]])
    there = landmarks(session, line, np.zeros(3)).moving[::-1]
    rows = [",".join([*map(repr, map(float, (*a, *b))), "ridge"]) for a, b in zip(line, there, strict=True)]
    header = "fixed_x,fixed_y,fixed_z,moving_x,moving_y,moving_z,curve"
    (tmp_path / "l.csv").write_text("\n".join([header, *rows]))
    marks = session.correction(tmp_path / "l.csv").landmarks
    number = 1 + np.ceil(np.linalg.norm(np.diff(line, axis=0), axis=-1).sum() / (0.5 * 10))
    assert marks.names == tuple(f"ridge ({k} of {number:.0f})" for k in range(1, int(number) + 1))
    np.testing.assert_allclose(marks.fixed[[0, -1]], line[[0, -1]])
    found = landmarks(session, marks.fixed, np.zeros(3), names=marks.names).moving
    np.testing.assert_allclose(marks.moving[[0, -1]], there[[-1, 0]], atol=1e-3)
    assert np.linalg.norm(marks.moving - found, axis=-1).max() < 2  # mm, of voxels of 5


def test_contradictory_and_distant_landmarks_are_named_and_not_obeyed(session, led):
    marks = landmarks(session, [*POINTS, [22, 7, 2], [12, 5, 3]], [SHIFT, [-25, 0, 0], [4, -2, 10]], [RADIUS] * 2 + [5])
    with pytest.warns(InputWarning, match="landmark b contradicts landmark"):
        state = session.corrected(Correction(marks))
    assert state.told[0]["left_out"] is None and "contradicts landmark" in state.told[1]["left_out"]
    assert state.told[2]["left_out"] == ("lies 11.0 mm from its place in the moving image, and in the fixed image too "
                                         "far for its radius of 5.0 mm")
    np.testing.assert_allclose(state.displacement, led.displacement, atol=0.02)  # as without the two


def test_places_that_do_not_reach_each_other_are_computed_by_themselves(session, monkeypatch):
    """So a further place changes nothing at the first one, and takes no longer than alone."""
    places = [30.0, 0, 0], [-35.0, 5, 0]
    both, *alone = (session.corrected(Correction(landmarks(session, points, SHIFT, 8.0)))
                    for points in (places, places[:1], places[1:]))
    moved = [(state.displacement != session.first.displacement).any(-1) for state in (both, *alone)]
    np.testing.assert_array_equal(moved[0], moved[1] | moved[2])
    assert moved[1].any() and moved[2].any() and not (moved[1] & moved[2]).any()
    for state, where in zip(alone, moved[1:], strict=True):
        for name in ("displacement", "warped", "jacobian"):
            np.testing.assert_array_equal(getattr(both, name)[where], getattr(state, name)[where])
    wanted = jacobian_determinant_of_displacement(both.displacement, AFFINE)
    np.testing.assert_allclose(both.jacobian, wanted, atol=1e-5)
    monkeypatch.setattr(correct, "piece_of", None)  # each is known by now
    np.testing.assert_array_equal(session.corrected(both.correction).jacobian, both.jacobian)


def test_places_reach_each_other_by_way_of_others():
    low = np.array([[0.0, 0, 0], [9, 0, 0], [4.5, 0, 0], [30, 40, 0]])
    high, reach = low + [2, 1, 1], np.array([1.0, 1, 1, 2])
    assert [list(one) for one in region.reaching(low, high, reach, 0.4)] == [[0], [1], [2], [3]]
    assert [list(one) for one in region.reaching(low, high, reach, 0.6)] == [[0, 1, 2], [3]]  # 0 and 1 by way of 2
    far = np.hypot(30 - 11, 40 - 1) - 3  # from 1 to 3, over the corner
    assert [len(region.reaching(low, high, reach, apart)) for apart in (far - 0.1, far + 0.1)] == [2, 1]


def test_nothing_changes_where_every_landmark_is_left_out(session):
    with pytest.warns(InputWarning, match="too far"):
        state = session.corrected(Correction(landmarks(session, POINTS[:1], [0, 40, 0])))
    assert state.region == region.NOWHERE and state.displacement is session.first.displacement


@pytest.mark.parametrize("turn", [0.0, 0.5])
def test_a_field_on_a_box_comes_back_to_an_anisotropic_and_oblique_grid(turn):
    """An affine move is sampled exactly by linear interpolation, on the way there and back."""
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    affine, shape = from_matvec(rotation @ np.diag([-1.0, 2, 5]), [20.0, -10, 3]), (40, 20, 8)
    grid = from_matvec(rotation * 1.5, [-25.0, -15, 0])
    box = region.box_around(np.array([4, 4, 4]), np.array([12, 12, 12]), grid)
    assert box.shape == (32, 32, 32) and np.allclose(box.voxels(apply_affine(grid, [8, 8, 8])), 15.5, atol=0.51)
    part = region.part_within(box, shape, affine)
    small = affine_of_part(affine, part)
    x = apply_affine(small, np.moveaxis(np.indices([one.stop - one.start for one in part]), 0, -1))
    field = x @ np.diag([0.01, 0.02, -0.01]) + [0.3, 0.2, 0.1]
    there = region.on_box(field, small, box)
    back = region.on_part(there @ np.linalg.inv(box.affine[:3, :3]).T, box, part, affine)
    inside = ((v := box.voxels(x)) > 0).all(-1) & (v < 31).all(-1)
    index = np.moveaxis(np.indices(inside.shape), 0, -1)
    core = inside & ((index > 0) & (index < np.array(inside.shape) - 1)).all(-1)
    assert core.sum() > 100
    np.testing.assert_allclose(back[core], field[core], atol=1e-4)
    assert not back[~((v > -1) & (v < 32)).all(-1)].any()


def test_the_history_goes_back_and_forth(session, led, tmp_path):
    history = History.of(session)
    assert history.current is None
    ball = distance(session, POINTS) < 15
    other = replace(led, correction=Correction(led.correction.landmarks, ball, 2.0), numbers={"seconds": 0.1})
    history.add(led.correction, led)
    history.add(other.correction, other)
    history.undo()
    assert history.current.state is led and len(history.steps) == 2
    history.redo()
    history.redo()
    assert history.current.state is other and history.at == 2
    history.write(tmp_path)
    (mask,) = tmp_path.glob("distrust-*.nii.gz")
    found = History.read(tmp_path / "history.json", session)
    assert found.at == 2 and [one.numbers for one in found.steps] == [led.numbers, other.numbers]
    correction = found.correction
    np.testing.assert_array_equal(correction.distrust, ball)
    for name in ("fixed", "moving", "radius"):
        np.testing.assert_array_equal(getattr(correction.landmarks, name), getattr(led.correction.landmarks, name))
    assert correction.landmarks.names == ("a",) and correction.stiffness == 2 and found.current.told == other.told
    history.undo()
    history.add(led.correction, led)  # the step that was undone is forgotten, and its mask goes
    history.write(tmp_path)
    assert len(history.steps) == 2 and not mask.exists()
    for _ in range(3):
        history.undo()
    assert history.at == 0 and history.correction is None


def test_a_draft_is_kept_undone_first_and_taken_again(session, led, tmp_path):
    history, ball = History.of(session), distance(session, POINTS) < 15
    history.ask(Correction(stiffness=0.0))  # as it is in force
    assert history.draft is None and not history.undoable and not history.redoable
    history.add(led.correction, led)
    draft = Correction(led.correction.landmarks, ball, 1.0, ((3, 3), (6, 9)))
    history.ask(draft)
    history.write(tmp_path)
    found = History.read(tmp_path / "history.json", session)
    assert found.at == 1 and found.current.correction.distrust is None and same(found.draft, draft)
    assert not same(draft, replace(draft, label_pairs=())) and not same(draft, replace(draft, distrust=~ball))
    for one in (history, found):
        assert not one.redoable
        one.undo()
        assert one.draft is None and one.at == 1 and one.redoable
        one.undo()
        one.redo()
        one.redo()
        assert same(one.draft, draft) and one.at == 1
        one.ask(led.correction)
        assert one.draft is None and not one.redoable
    history.write(tmp_path)
    assert not list(tmp_path.glob("distrust-*"))


@pytest.mark.parametrize("change", [{"at": 5}, {"steps": [{}]}, {"displacement_crc32": 1}, None])
def test_a_history_that_is_damaged_or_of_another_result_is_refused(session, led, tmp_path, change):
    history = History.of(session)
    history.add(led.correction, led)
    history.write(tmp_path)
    path = tmp_path / "history.json"
    path.write_text("{" if change is None else json.dumps(json.loads(path.read_text()) | change))
    words = "of another result" if change == {"displacement_crc32": 1} else "is no history of corrections"
    with pytest.raises(InputError, match=words):
        History.read(path, session)


@pytest.fixture(scope="module")
def exported(session, study, led):
    """(folder of an export, its state): landmarks, a mask and a stiffness."""
    history = History.of(session)
    history.add(led.correction, led)
    state = session.corrected(Correction(led.correction.landmarks, distance(session, [[20, -5, 0]]) < 8, 3.0))
    history.add(state.correction, state)
    session.save(history, study / "exported")
    return study / "exported", state


def test_the_export_has_all_files_of_register_and_the_history(exported, study, session):
    out, state = exported
    names, summary = {path.name for path in out.iterdir()}, json.loads((out / "summary.json").read_text())
    new = names - {path.name for path in (study / "result").iterdir()}
    assert len(new) == 2 and "history.json" in new and names - {"summary.json"} == set(summary["files"])
    assert summary["landmarks"] == state.told and summary["fold_pct"] == 0 and summary["inverse_mm"] < 0.5
    assert summary["corrected"]["stiffness"] == 3 and summary["corrected"]["distrust_voxels"] > 0
    assert {one["name"] for one in summary["checks"]} > {"landmarks", "stretch", "inverse"}
    assert summary["method"] == "demons" and summary["inputs"] == session.summary["inputs"]


def test_the_numbers_are_those_of_the_working_grid_of_the_result(study, led, tmp_path, monkeypatch):
    """A network works on another grid than Demons, on which a correction is computed."""
    with monkeypatch.context() as patch:
        patch.setattr(import_module(demons_grid.__module__), "DEMONS_SPACING", 1.2 * MM)
        register(str(study / "fixed.nii.gz"), str(study / "moving.nii.gz"), **FAST).save(tmp_path / "result")
    other = Session(tmp_path / "result")
    assert other.spacing == pytest.approx(MM) and other.summary["working_spacing_mm"] == pytest.approx(1.2 * MM)
    summary = corrected_result(other, other.corrected(led.correction)).summary
    for name in ("working_grid", "working_spacing_mm"):
        assert summary[name] == other.summary[name]
    assert summary["similarity_before"] == pytest.approx(other.summary["similarity_before"], abs=1e-5)
    assert summary["similarity_after"] == pytest.approx(other.summary["similarity_after"], abs=0.1)


def test_the_files_are_those_of_the_state_and_the_inverse_leads_back(exported, session):
    out, state = exported
    again = Session(out)
    for name in ("displacement", "warped", "jacobian", "labels"):
        np.testing.assert_array_equal(getattr(again.first, name), getattr(state, name))
    inside = state.warped > 0
    inside &= ndimage.binary_erosion(inside, iterations=2)
    points = apply_affine(session.fixed.affine, np.argwhere(inside)[::7])
    there = Transform(state.displacement, session.fixed, session.transform.linear).points(points)
    back = Transform(again.inverse_displacement, session.moving, np.linalg.inv(session.transform.linear)).points(there)
    assert np.linalg.norm(back - points, axis=-1).mean() < 0.3  # mm, on voxels of 5 mm
    unchanged = np.linalg.norm(again.inverse_displacement - session.inverse_displacement, axis=-1) == 0
    assert unchanged.mean() > 0.2


def test_the_history_on_the_command_line_gives_the_same_bits(exported, study, tmp_path, monkeypatch, capsys):
    out, _ = exported
    status, said = run(program, [study / "result", "--history", out / "history.json", "--out", tmp_path / "again"],
                       monkeypatch, capsys)
    assert not status and not said
    for path in out.iterdir():
        if path.name != "summary.json":  # which has seconds
            assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_table_and_a_mask_on_the_command_line(led, study, tmp_path, monkeypatch, capsys, session):
    marks = led.correction.landmarks
    rows = [",".join([name, *(repr(float(x)) for x in (*fixed, *moving, RADIUS))]) for name, fixed, moving in zip(
        marks.names, marks.fixed, marks.moving, strict=True)]
    header = "name,fixed_x,fixed_y,fixed_z,moving_x,moving_y,moving_z,radius"
    (tmp_path / "l.csv").write_text("\n".join([header, *rows]))
    correction = session.correction(tmp_path / "l.csv")
    assert correction.distrust is None and correction.stiffness == 0
    np.testing.assert_array_equal(correction.landmarks.moving, marks.moving)
    nib.save(nib.Nifti1Image((distance(session, POINTS) < 15).astype(np.uint8), AFFINE), tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(session.correction(distrust=tmp_path / "mask.nii.gz").distrust,
                                  distance(session, POINTS) < 15)
    for flags, words in ((["--stiffness", "3"], "--stiffness alone has no place"),
                         (["--history", "h.json", "--landmarks", "l.csv"], "--history excludes")):
        status, said = run(program, [study / "result", "--out", tmp_path / "out", *flags], monkeypatch, capsys)
        assert status == 2 and words in said
    refused(*run(program, [study / "result", "--out", study / "result", "--landmarks", tmp_path / "l.csv"], monkeypatch,
                 capsys), "another --out")


def test_what_asks_for_nothing_or_for_too_much_is_refused(session, led):
    shape = session.fixed.data.shape
    for correction, words in (
            (Correction(stiffness=3.0), "asks for nothing"),
            (Correction(distrust=np.zeros(shape, bool)), "asks for nothing"),
            (Correction(distrust=np.ones(shape, bool)), "holds 100% of the brain"),
            (Correction(distrust=np.ones((3, 3, 3), bool)), "give one on the grid of that image"),
            (Correction(Landmarks(("far",), np.full((1, 3), 500.0), np.zeros((1, 3)), np.array([np.nan]))),
             "the fixed point of landmark far lies outside")):
        with pytest.raises(InputError, match=words):
            session.corrected(correction)
    history = History.of(session)
    with pytest.raises(InputError, match="no correction is in force"):
        session.save(history, "nowhere")


def test_a_result_whose_files_changed_is_refused(study, tmp_path, led):
    copy = shutil.copytree(study / "result", tmp_path / "copy")
    moving = tmp_path / "moving.nii.gz"
    shutil.copy(study / "moving.nii.gz", moving)
    summary = json.loads((copy / "summary.json").read_text())

    def rewritten(**changes):
        (copy / "summary.json").write_text(json.dumps(summary | changes))

    inputs = summary["inputs"] | {"moving": [{"path": str(moving), "crc32": summary["inputs"]["moving"][0]["crc32"]}]}
    rewritten(inputs=inputs)
    opened = Session(copy)
    brain(moving, 0.9)
    for again in (lambda: Session(copy), lambda: opened.corrected(led.correction)):
        with pytest.raises(InputError, match="moving.nii.gz was changed since"):
            again()
    moving.unlink()
    with pytest.raises(InputError, match="moving.nii.gz, which .* names, cannot be read"):
        Session(copy)
    rewritten()
    with pytest.raises(InputError, match="holds another result than it did"):
        opened.check()
    rewritten(inputs=inputs | {"moving": [{"path": None, "crc32": None}]})
    with pytest.raises(InputError, match="made from an image in memory"):
        Session(copy)
    rewritten(formats=["h5"])
    with pytest.raises(InputError, match="was written as h5 only"):
        Session(copy)
    del summary["inputs"]
    rewritten()
    with pytest.raises(InputError, match="made by an earlier version"):
        Session(copy)
    with pytest.raises(InputError, match="holds no result of register"):
        Session(tmp_path)


def with_inputs(session, folder, **files):
    """A copy of the result in `folder` that was made from other files, by their roles."""
    copy = shutil.copytree(session.folder, folder / "other")
    summary = session.summary | {"inputs": session.summary["inputs"] | {
        role: [{"path": str(path), "crc32": checksum(path)}] for role, path in files.items()}}
    (copy / "summary.json").write_text(json.dumps(summary))
    return copy, summary


def test_the_brain_of_a_small_animal_is_corrected_in_its_own_lengths(session, tmp_path):
    small, files = np.diag([0.1, 0.1, 0.1, 1]), {}
    for role in ("fixed", "moving", "moving_labels"):
        image = nib.load(session.files[role][0])
        files[role] = tmp_path / f"{role}.nii.gz"
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), small @ image.affine), files[role])
    copy, _ = with_inputs(session, tmp_path, **files)
    grid = load_image(files["fixed"])
    Transform(session.first.displacement / 10, grid, np.eye(4), grid).save(copy / "displacement.nii.gz")
    mouse = Session(copy)
    point = np.array(POINTS) / 10
    state = mouse.corrected(Correction(landmarks(mouse, point, np.array(SHIFT) / 10, RADIUS / 10)))
    moved = np.linalg.norm(state.displacement - mouse.first.displacement, axis=-1)
    assert mouse.scale == 13 and state.told[0]["before_mm"] == pytest.approx(np.linalg.norm(SHIFT) / 10, abs=1e-3)
    assert state.told[0]["after_mm"] < 0.05 and state.jacobian.min() > 0
    assert moved[distance(mouse, point) > 3 * RADIUS / 10].max() < 0.005 < 0.3 < moved.max()


def test_a_whole_head_and_a_transform_to_start_from(session, tmp_path):
    """The brain that register found drives, and the whole head is warped. The inverse includes the start."""
    image = nib.load(session.files["moving"][0])
    data = np.asarray(image.dataobj).copy()
    brain = data > 0
    near, far = (ndimage.binary_dilation(brain, iterations=k) for k in (1, 3))
    data[far & ~near] = 1500  # a skull
    nib.save(nib.Nifti1Image(data, AFFINE), tmp_path / "head.nii.gz")
    bump = np.exp(-0.5 * (distance(session, [[0, 0, 0]]) / 20) ** 2)[..., None] * np.array([3.0, 0, 0])
    Transform(bump.astype(np.float32), session.fixed, np.eye(4), session.moving).save(tmp_path / "start.nii.gz")
    copy, summary = with_inputs(session, tmp_path, moving=tmp_path / "head.nii.gz",
                                initial_transform=tmp_path / "start.nii.gz")
    (copy / "summary.json").write_text(json.dumps(summary | {"stripped": ["moving"], "affine": np.eye(4).tolist()}))
    with pytest.raises(InputError, match="has no moving_brain.nii.gz"):
        Session(copy)
    nib.save(nib.Nifti1Image(brain.astype(np.uint8), AFFINE), copy / "moving_brain.nii.gz")
    headed = Session(copy)
    correction = Correction(landmarks(session, [[35, 5, 0]], SHIFT))  # near the skull
    state, alone = (one.corrected(correction) for one in (headed, session))
    np.testing.assert_array_equal(state.displacement, alone.displacement)
    assert state.warped.max() > 1000 > alone.warped.max()
    result = corrected_result(headed, state)
    assert result.summary["inverse_mm"] < 0.5
    assert result.summary["similarity_after"] == pytest.approx(session.summary["similarity_after"], abs=0.01)
    assert set(result.brains) == {"moving"}
