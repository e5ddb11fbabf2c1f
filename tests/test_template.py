import re
import shutil

import nibabel as nib
import numpy as np
import pytest
from scipy import linalg, ndimage, stats
from test_programs import refused, run

import template as program
from drivenmorph_jax import Transform, inverse, warp
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.files import alone_in
from drivenmorph_jax.images.average import SHARPENING, WIDTH, robust_mean, sharpened, vote
from drivenmorph_jax.registration import template
from drivenmorph_jax.registration.template import build_template, grubbs, images_of_bids, images_of_folder
from drivenmorph_jax.registration.template_step import Step
from drivenmorph_jax.transforms.affine import centred

SHAPE, VOXEL = (32, 40, 32), 5.0  # mm
AFFINE = np.diag([VOXEL, VOXEL, VOXEL, 1])
IDS = ["a", "b", "c", "d"]


def anatomy():
    """An image with structure, and its labels."""
    rng = np.random.default_rng(0)
    x = (np.moveaxis(np.indices(SHAPE), 0, -1) - np.array(SHAPE) / 2) / np.array(SHAPE)
    inside = ndimage.gaussian_filter(((x**2).sum(-1) < 0.1).astype(np.float32), 0.7)
    tissue = ndimage.gaussian_filter(rng.standard_normal(SHAPE, np.float32), 2)
    image = inside * (0.6 + 0.3 * np.tanh(1.5 * tissue / tissue.std()))
    return image.astype(np.float32), np.where(inside > 0.5, 1 + (tissue > 0) + 2 * (x[..., 0] > 0), 0).astype(np.int16)


def displacements():
    """Four displacements in voxels, whose mean is 0."""
    rng = np.random.default_rng(1)
    one, other = (ndimage.gaussian_filter(rng.standard_normal((*SHAPE, 3), np.float32), (5, 5, 5, 0), mode="wrap")
                  for _ in range(2))
    one, other = (2.0 * x / np.linalg.norm(x, axis=-1).max() for x in (one, other))
    return one, -one, other, -other


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A folder of four subjects x_i = T o (id + u_i)^-1, made from one anatomy T; the mean of the u_i is 0."""
    folder = tmp_path_factory.mktemp("brains")
    image, labels = anatomy()
    for id, u in zip(IDS, displacements(), strict=True):
        back = inverse(u)
        moved = np.asarray(warp(image[..., None], back))[..., 0]
        one_hot = np.stack([warp((labels == k).astype(np.float32)[..., None], back)[..., 0] for k in range(5)])
        nib.save(nib.Nifti1Image(moved, AFFINE), folder / f"{id}_t1.nii.gz")
        nib.save(nib.Nifti1Image(one_hot.argmax(0).astype(np.int16), AFFINE), folder / f"{id}_seg.nii.gz")
    return folder


@pytest.fixture(scope="module")
def made(study):
    """(folder of a template of the study, its summary)."""
    return study / "out", build_template(images_of_folder(study), study / "out", affine="none")


def voxels(path):
    return np.asarray(nib.load(path).dataobj)


def on_template(x, grid, order=1):
    """An array on the grid of the study, sampled on that of the template."""
    first = grid.affine[:3, 3] / VOXEL
    return np.stack([ndimage.affine_transform(channel, np.eye(3), first, grid.shape, order=order)
                     for channel in np.moveaxis(x.reshape(*SHAPE, -1), -1, 0)], -1).reshape(*grid.shape, *x.shape[3:])


def test_the_template_of_deformed_copies_is_what_they_are_copies_of(made, study):
    """The mean of the displacements that made the subjects is 0, so the template lies where T lies."""
    out, summary = made
    grid = nib.load(out / "template.nii.gz")
    image, labels = (on_template(x, grid, order) for x, order in zip(anatomy(), (1, 0), strict=True))
    brain = labels > 0

    def likeness(x):
        return np.corrcoef(x[brain], image[brain])[0, 1]

    def agreeing(x):
        return np.mean(x[brain] == labels[brain])

    loaded = [(on_template(nib.load(study / f"{id}_t1.nii.gz").get_fdata(), grid),
               on_template(voxels(study / f"{id}_seg.nii.gz"), grid, 0)) for id in IDS]
    before, votes = (max(map(f, x)) for f, x in zip((likeness, agreeing), zip(*loaded, strict=True), strict=True))
    mean = likeness(sum(image for image, _ in loaded))
    assert likeness(voxels(out / "template.nii.gz")) > 0.995 > 0.99 > max(mean, before)
    assert agreeing(voxels(out / "template_labels.nii.gz")) > 0.88 > 0.87 > votes
    found = np.stack([Transform.load(out / f"subjects/{id}/displacement.nii.gz").displacement for id in IDS])
    wanted = np.stack([VOXEL * on_template(u, grid) for u in displacements()])

    def length(u):
        return np.linalg.norm(u, axis=-1)[brain].mean()

    assert length(found.mean(0)) < 0.1 and summary["bias_mm"] < 0.1  # mm, in voxels of 5 mm
    assert np.mean([length(u) for u in found - wanted]) < 0.4 * np.mean([length(u) for u in wanted])
    assert summary["still"] and summary["closest"] > summary["closest_by_chance"]
    assert {id: one["distance_mm"] for id, one in summary["subjects"].items()} == pytest.approx(
        dict(zip(IDS, map(length, found), strict=True)), rel=0.1)


def test_the_transforms_lead_to_the_subjects_and_back(made, study):
    out, summary = made
    confidence, labels = voxels(out / "template_confidence.nii.gz"), voxels(out / "template_labels.nii.gz")
    there = [Transform.load(out / f"subjects/{id}/displacement.nii.gz") for id in IDS]
    moved = [np.asarray(one.apply(study / f"{id}_seg.nii.gz", "nearest").dataobj)
             for id, one in zip(IDS, there, strict=True)]
    wanted, counts = stats.mode(np.stack(moved))
    np.testing.assert_array_equal(labels, wanted)
    np.testing.assert_allclose(confidence, counts / 4)
    points = nib.affines.apply_affine(there[0].grid.affine, np.argwhere(labels > 0)[::7])
    back = Transform.load(out / "subjects/a/inverse_displacement.nii.gz")
    assert np.linalg.norm(back.points(there[0].points(points)) - points, axis=-1).mean() < 0.2
    assert summary["files"] == sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()
                                      and path.name not in (".lock", "summary.json"))
    assert not (out / ".template").exists()


def test_the_page_has_the_rounds_and_the_subjects(made):
    out, summary = made
    text = (out / "report.html").read_text()
    cells = [re.findall("<t[dh].*?>(.*?)</t[dh]>", row) for row in re.findall("<tr>.*?</tr>", text)]
    rounds, subjects = cells[1:1 + len(summary["rounds"])], cells[2 + len(summary["rounds"]):]
    assert [row[2] for row in rounds] == [f"{one['change_mm']:.3f}" for one in summary["rounds"]]
    correlations = [one["correlation"] for one in summary["subjects"].values()]
    assert sorted(row[0] for row in subjects) == IDS
    assert float(subjects[0][3]) == pytest.approx(min(correlations), abs=1e-3)
    assert "The template stands still." in text and "No subject is closer to the template than by chance." in text
    assert text.count("<img") == 1 and "http" not in re.sub(r"[\w+/=]{200,}", "", text)


def test_the_order_of_the_images_does_not_matter(made, study, tmp_path):
    names = dict(zip(IDS, ("4", "2", "1", "3"), strict=True))
    for id, name in names.items():
        for kind in ("t1", "seg"):
            shutil.copy(study / f"{id}_{kind}.nii.gz", tmp_path / f"{name}_{kind}.nii.gz")
    build_template(images_of_folder(tmp_path), tmp_path / "out", affine="none")
    for id, name in names.items():
        one, other = (Transform.load(out / f"subjects/{x}/displacement.nii.gz").displacement
                      for out, x in ((made[0], id), (tmp_path / "out", name)))
        assert np.abs(one - other).max() < 0.1  # mm
    np.testing.assert_allclose(voxels(tmp_path / "out/template.nii.gz"), voxels(made[0] / "template.nii.gz"), atol=1e-3)


def test_a_run_that_was_stopped_continues_and_a_complete_one_does_nothing(made, study, tmp_path, monkeypatch):
    run, begun, stop = Step.run, [], [("round-2", "c"), ("affine", "b")]

    def stops(step):
        begun.append((step.stage, step.name))
        if begun[-1] == stop[0]:
            raise KeyboardInterrupt
        run(step)

    monkeypatch.setattr(Step, "run", stops)
    images, out = images_of_folder(study), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        build_template(images, out, affine="none")
    assert sorted(path.name for path in out.iterdir()) == [".lock", ".template"]  # nothing that looks like a result
    before = begun[:-1]
    begun.clear(), stop.pop(0)
    build_template(images, out, affine="none")
    assert begun[0] == ("round-2", "c") and not set(before) & set(begun)
    for name in ("template.nii.gz", "subjects/a/displacement.nii.gz"):
        np.testing.assert_array_equal(voxels(out / name), voxels(made[0] / name))
    begun.clear()
    (out / "subjects/a/mine.txt").write_text("stays")
    assert build_template(images, out, affine="none")["bias_mm"] == made[1]["bias_mm"] and not begun
    with pytest.raises(KeyboardInterrupt):  # of other images it is made anew
        build_template({id: images[id] for id in "bc"}, out, affine="none")
    assert begun[0] == ("read", "b") and (out / "template.nii.gz").exists()
    stop[0] = None
    build_template({id: images[id] for id in "bc"}, out, affine="none")
    assert [path.name for path in (out / "subjects/a").iterdir()] == ["mine.txt"]


def test_a_cluster_makes_the_same(made, study, tmp_path):
    distributed = pytest.importorskip("distributed", reason="needs the package distributed")
    with distributed.LocalCluster(n_workers=1, threads_per_worker=2, processes=False,
                                  dashboard_address=None) as cluster:
        build_template(images_of_folder(study), tmp_path, affine="none", scheduler=cluster.scheduler_address)
        (tmp_path / "b.nii.gz").write_text("no image")
        images = images_of_folder(study) | {"b": {"image": tmp_path / "b.nii.gz"}}
        with pytest.raises(InputError, match=r"^b cannot be part of the template: \S*b.nii.gz cannot be read"):
            build_template(images, tmp_path / "broken", scheduler=cluster.scheduler_address)
    for name in ("template.nii.gz", "subjects/a/displacement.nii.gz"):
        np.testing.assert_array_equal(voxels(tmp_path / name), voxels(made[0] / name))


def test_images_that_cannot_be_used_are_named(study, tmp_path, monkeypatch, capsys):
    shutil.copy(study / "a_t1.nii.gz", tmp_path / "a_t1.nii.gz")
    for folder, word in ((tmp_path / "gone", "gone is not a folder"), (tmp_path, "holds 1 images")):
        refused(*run(program, ["--images", folder, "--out", tmp_path / "out"], monkeypatch, capsys), word)
    (tmp_path / "b_t1.nii.gz").write_text("no image")
    arguments = ["--images", tmp_path, "--out", tmp_path / "out", "--affine", "none"]
    status, said = run(program, arguments, monkeypatch, capsys)
    told = said.replace("\r", "\n").strip().splitlines()[-1]
    assert status == 2 and told.startswith("error: b cannot be part of the template: ") and "b_t1.nii.gz" in told
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock", ".template"]
    shutil.copy(study / "b_seg.nii.gz", tmp_path / "a_seg.nii.gz")
    nib.save(nib.Nifti1Image(np.ones((8, 8, 8), np.int16), AFFINE), tmp_path / "a_seg.nii.gz")
    assert "a_seg.nii.gz is not on the grid" in run(program, arguments, monkeypatch, capsys)[1]
    with alone_in(tmp_path / "out"), pytest.raises(InputError, match="in use by another run"):
        build_template(images_of_folder(study), tmp_path / "out")


@pytest.mark.parametrize(("flags", "word"), [
    (["--spacing", "0"], "above 0"), (["--time_limit", "5"], "--scheduler"), (["--bids", "x"], "not allowed"),
    (["--affine", "warp"], "similarity"), (["--geometry", "up"], "up")])
def test_flags_that_cannot_be_used_are_refused(flags, word, study, tmp_path, monkeypatch, capsys):
    status, said = run(program, ["--images", study, "--out", tmp_path / "out", *flags], monkeypatch, capsys)
    assert status == 2 and word in said.splitlines()[-1] and not (tmp_path / "out").exists()


def test_images_of_a_bids_folder(study, tmp_path):
    for k, id in enumerate("ab"):
        folder = tmp_path / f"sub-0{k}" / "anat"
        folder.mkdir(parents=True)
        shutil.copy(study / f"{id}_t1.nii.gz", folder / f"sub-0{k}_T1w.nii.gz")
    shutil.copy(study / "b_seg.nii.gz", folder / "sub-01_dseg.nii.gz")
    found = images_of_bids(tmp_path)
    assert {id: list(files) for id, files in found.items()} == {"sub-00": ["image"], "sub-01": ["image", "labels"]}


def test_small_brains_are_scaled(made, study, tmp_path):
    """The same images with voxels of a tenth of the size."""
    for id in IDS:
        image = nib.load(study / f"{id}_t1.nii.gz")
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), np.diag([0.1, 0.1, 0.1, 1]) @ AFFINE),
                 tmp_path / f"{id}.nii.gz")
    summary = build_template(images_of_folder(tmp_path), tmp_path / "out", affine="none")
    assert summary["scale"] > 5 and summary["voxel_mm"] == pytest.approx(VOXEL / 10)
    assert summary["labelled"] == 0 and not (tmp_path / "out/template_labels.nii.gz").exists()
    small, large = (nib.load(out / "template.nii.gz") for out in (tmp_path / "out", made[0]))
    centres = [nib.affines.apply_affine(x.affine, ndimage.center_of_mass(x.get_fdata())) for x in (small, large)]
    np.testing.assert_allclose(10 * centres[0], centres[1], atol=0.5)
    assert summary["bias_mm"] < 0.01 and 10 * np.mean([one["distance_mm"] for one in summary["subjects"].values()]) == (
        pytest.approx(np.mean([one["distance_mm"] for one in made[1]["subjects"].values()]), rel=0.1))
    there, back = (Transform.load(tmp_path / f"out/subjects/a/{name}displacement.nii.gz") for name in ("", "inverse_"))
    points = nib.affines.apply_affine(small.affine, np.argwhere(small.get_fdata() > 0.3)[::7])
    assert np.linalg.norm(back.points(there.points(points)) - points, axis=-1).mean() < 0.02


def test_affines_are_centred():
    """Of T_i = exp(L_i) C, where the mean of the L_i is 0, the mean world is C away from the start."""
    rng = np.random.default_rng(0)
    logs = 0.1 * rng.standard_normal((4, 4, 4))
    logs[:, 3] = 0
    logs -= logs.mean(0)
    start = linalg.expm(np.array([[0, 0.3, 0, 5], [-0.3, 0, 0, 2], [0, 0, 0.1, -9], [0, 0, 0, 0.0]]))
    found = centred([linalg.expm(one) @ start for one in logs])
    np.testing.assert_allclose(found, [linalg.expm(one) for one in logs], atol=1e-6)
    with pytest.raises(InputError, match="180 degrees"):
        centred([np.eye(4), np.diag([-1.0, 1, 1, 1])])


def test_a_robust_mean_ignores_what_few_images_have_and_their_brightness():
    rng = np.random.default_rng(0)
    image = 1 + rng.random((12, 10, 8), np.float32)
    images = [image.copy() for _ in range(6)]
    images[2][3:5, 3:5, 3:5] = 0  # a lesion
    np.testing.assert_allclose(robust_mean(images), image, rtol=0.01)
    np.testing.assert_allclose(robust_mean([k * image for k in (0.5, 1, 1.5)]), image, rtol=1e-5)
    noisy = [image + 0.1 * rng.random(image.shape, np.float32) for _ in range(5)]
    gains = [np.mean([x.mean() for x in noisy]) / x.mean() for x in noisy]
    wanted = stats.trim_mean([g * x for g, x in zip(gains, noisy, strict=True)], 0.2, axis=0)
    np.testing.assert_allclose(robust_mean(noisy), wanted, rtol=1e-5)
    np.testing.assert_allclose(robust_mean(noisy[::-1]), robust_mean(noisy), rtol=1e-6)


def test_sharpening_raises_a_wave_by_its_frequency():
    """x + s (x - G x) multiplies a wave by 1 + s (1 - exp(-(k w)^2 / 2)), and changes no ramp."""
    x = np.arange(64)
    k = 2 * np.pi / 8
    wave = np.broadcast_to(2 + np.cos(k * x)[:, None, None], (64, 4, 4)).astype(np.float32)
    gain = 1 + SHARPENING * (1 - np.exp(-(k * WIDTH) ** 2 / 2))
    np.testing.assert_allclose(sharpened(wave)[8:-8] - 2, gain * (wave[8:-8] - 2), atol=1e-3)
    ramp = np.broadcast_to(np.arange(64.0)[:, None, None], (64, 4, 4))
    np.testing.assert_allclose(sharpened(ramp)[8:-8], ramp[8:-8], atol=1e-6)


def test_the_vote_is_the_mode():
    maps = np.random.default_rng(0).integers(0, 4, (5, 9, 8, 7)).astype(np.int16)
    labels, share = vote(maps)
    wanted, counts = stats.mode(maps)
    np.testing.assert_array_equal(labels, wanted)
    np.testing.assert_allclose(share, counts / 5)
    assert labels.dtype == np.int16


def test_grubbs_limits_are_those_of_the_tables():
    """One-sided, 5 %: the table of ISO 5725-2."""
    assert [grubbs(n) for n in (3, 10, 20)] == pytest.approx([1.153, 2.176, 2.557], abs=2e-3)
    assert grubbs(2) == np.inf


def test_the_reference_is_the_middle_one_whatever_its_name(study, tmp_path):
    def first(names):
        images = {name: {"image": study / f"{id}_t1.nii.gz"} for id, name in zip(IDS, names, strict=True)}
        steps = [Step(name, str(tmp_path / names), files, {"geometry": "sform", "strip": "no"}, (), {}, "read")
                 for name, files in images.items()]
        template._run(steps, None, None)
        return names.index(template._first(steps, None)["first"])

    assert first("abcd") == first("dbac")
