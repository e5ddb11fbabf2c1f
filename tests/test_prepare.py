"""Miniature copies of every layout, made here."""

import json
import pickle
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from matplotlib import image as pictures

from drivenmorph_jax.data import prepare
from drivenmorph_jax.data.folder import folder_dataset, person
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.evaluation import metrics
from drivenmorph_jax.images.reading import load_image, load_labels

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "malf"
SHAPE = (20, 24, 20)
RAS = np.diag([2.0, 2, 2, 1])
LAS = np.array([[-2.0, 0, 0, 38], [0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]])


def brain(seed):
    """(image, labels) of a ball, brighter to the right."""
    x = np.moveaxis(np.indices(SHAPE), 0, -1) - np.array(SHAPE) / 2
    inside = (x**2).sum(-1) < 64
    noise = np.random.default_rng(seed).random(SHAPE)
    return (inside * (500 + 20 * x[..., 0] + 50 * noise)).astype(np.int16), (inside * (1 + (x[..., 0] > 0))).astype(
        np.int16)


def write(path, data, affine=RAS, kind=nib.Nifti1Image):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(kind(data, affine), path)


def pair(seed, image, labels, affine=RAS):
    for path, data in zip((image, labels), brain(seed), strict=True):
        write(path, data[::-1] if affine is LAS else data, affine)


def neurite(root):
    for k in range(1, 7):
        folder = root / f"OASIS_OAS1_{k:04d}_MR1"
        pair(k, folder / "aligned_norm.nii.gz", folder / "aligned_seg35.nii.gz", LAS)


def learn2reg(root):
    for k in (1, 2, 394, 395, 414):
        pair(k, root / "imagesTr" / f"OASIS_{k:04d}_0000.nii.gz", root / "labelsTr" / f"OASIS_{k:04d}_0000.nii.gz")


def pickles(root):
    for folder, count in (("Train", 3), ("Val", 2), ("Test", 2), ("Atlas", 1)):
        (root / folder).mkdir(parents=True)
        for k in range(count):
            name = "atlas" if folder == "Atlas" else f"{folder.lower()}_{k}"
            (root / folder / f"{name}.pkl").write_bytes(pickle.dumps(brain(k)))


def names(*forms):
    """A layout of files named by the forms, image first, a number put in."""
    def make(root):
        for k in range(1, 7):
            paths = [root / form.format(k=k) for form in forms]
            pair(k, *(paths if len(paths) == 2 else (paths[0], root.parent / "unused" / f"{k}.nii.gz")))
    return make


LAYOUTS = {
    "oasis": neurite, "oasis-l2r": learn2reg, "ixi-pkl": pickles, "ixi": names("IXI{k:03d}-Guys-0828-T1.nii.gz"),
    "lpba40": names("S{k:02d}/S{k:02d}.delineation.skullstripped.nii.gz",
                    "S{k:02d}/S{k:02d}.delineation.structure.label.nii.gz"),
    "mindboggle": names("NKI/NKI-{k}/t1weighted_brain.nii.gz", "NKI/NKI-{k}/labels.DKT31.manual.nii.gz"),
    "malf": names("100{k}_3.nii", "100{k}_3_glm.nii"),
    "bids": names("sub-{k:02d}/ses-1/anat/sub-{k:02d}_ses-1_T1w.nii.gz",
                  "derivatives/seg/sub-{k:02d}/sub-{k:02d}_ses-1_dseg.nii.gz"),
    "folder": names("{k:02d}.nii.gz", "{k:02d}_seg.nii.gz"),
}


@pytest.fixture
def without_affine(monkeypatch):
    """Balls of noise have nothing that an affine could be found by: every layout as if it were aligned."""
    monkeypatch.setattr(prepare, "LAYOUTS", {name: (layout, True) for name, (layout, _) in prepare.LAYOUTS.items()})
    monkeypatch.setattr(prepare, "ProcessPoolExecutor", Here)


class Here:
    """In place of a pool of processes."""

    def __init__(self, *_):
        self.map = map

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_becomes_a_folder_that_training_reads(name, tmp_path, without_affine):
    LAYOUTS[name](tmp_path / "source")
    made = prepare.prepare(name, tmp_path / "source", tmp_path / "out")
    assert set(made) and set(prepare.LAYOUTS) == set(LAYOUTS)
    splits = json.loads((tmp_path / "out" / "splits.json").read_text())
    assert sorted(id for split in splits.values() for id in split) == sorted(set(made) - {"atlas"})
    config = type("Config", (dict,), {"root": tmp_path / "out"})()
    dataset = folder_dataset(config)
    assert dataset.spacing == (1.0 if name == "ixi-pkl" else 2.0)
    subject = dataset.train[0]
    assert subject.image.shape == SHAPE and subject.image.max() == 1
    right = subject.image[12:16, 10:14, 8:12].mean() > subject.image[4:8, 10:14, 8:12].mean()
    assert right, "the right side is on the left"
    assert (subject.labels is None) == (name == "ixi")
    assert pictures.imread(tmp_path / "out" / "contact_sheet.png").size > 10_000
    if name == "oasis-l2r":
        assert splits["val"] == ["OASIS_0395", "OASIS_0414"] and len(splits["train"]) == 3
    if name == "ixi-pkl":
        assert {split: len(ids) for split, ids in splits.items()} == {"train": 3, "val": 2, "test": 2}
        config["atlas"] = "atlas"
        assert [(fixed.id, moving.id) for fixed, moving in folder_dataset(config).pairs("test")] == [
            ("test_0", "atlas"), ("test_1", "atlas")]


def test_a_broken_subject_is_named_and_left_out_and_the_others_are_not_made_again(tmp_path, without_affine, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    LAYOUTS["folder"](source)
    whole = (source / "03.nii.gz").read_bytes()
    (source / "03.nii.gz").write_bytes(whole[: len(whole) // 2])
    assert "03" not in prepare.prepare("folder", source, out)
    assert "03 is left out" in capsys.readouterr().out
    made = (out / "01_t1.nii.gz").stat().st_mtime_ns
    (source / "03.nii.gz").write_bytes(whole)
    assert "03" in prepare.prepare("folder", source, out)
    assert (out / "01_t1.nii.gz").stat().st_mtime_ns == made


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_read_by_whatever_protocol_they_were_pickled(protocol, order, tmp_path):
    voxels = np.asarray(np.random.default_rng(0).normal(size=(4, 5, 6)), np.float32, order=order)
    pair = voxels, np.arange(240).reshape(8, 5, 6)[::2]  # the second is no block of memory
    (tmp_path / "pair.pkl").write_bytes(pickle.dumps(pair, protocol))
    for found, wanted in zip(prepare.load_pickle(tmp_path / "pair.pkl"), pair, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_pickle_that_is_a_program_is_not_run(tmp_path, without_affine, capsys):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "pwned",)

    pickles(tmp_path / "source")
    (tmp_path / "source" / "Train" / "train_0.pkl").write_bytes(pickle.dumps((Evil(), np.zeros(3))))
    assert "train_0" not in prepare.prepare("ixi-pkl", tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "pwned").exists()
    assert "train_0 is left out" in capsys.readouterr().out
    with pytest.raises(InputError, match="not allowed"):
        prepare.load_pickle(tmp_path / "source" / "Train" / "train_0.pkl")


def test_too_few_subjects_and_a_missing_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match="holds 0 subjects in the layout oasis"):
        prepare.prepare("oasis", tmp_path, tmp_path / "out")
    with pytest.raises(InputError, match="is not a folder"):
        prepare.prepare("oasis", tmp_path / "none", tmp_path / "out")


def found(name, root, *files):
    """{id: (image, label map or None)} that the layout finds among these (empty) files, relative to the folder."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return {id: tuple(path and path.relative_to(root).as_posix() for path in paths)
            for id, (*paths, _) in prepare.LAYOUTS[name][0](root).items()}


def anat(*names, folder="."):
    """The paths of images in the anat folders of their subjects and sessions."""
    return [f"{folder}/{'/'.join(part for part in name.split('_') if part[:4] in ('sub-', 'ses-'))}/anat/{name}.nii.gz"
            for name in names]


def test_a_subject_does_not_get_the_labels_of_one_whose_name_begins_alike(tmp_path, without_affine):
    source = tmp_path / "source"
    for k in range(1, 12):
        pair(k, *(source / name for name in anat(f"sub-{k}_T1w", f"sub-{k}_dseg")))
    (source / "sub-1" / "anat" / "sub-1_dseg.nii.gz").unlink()
    prepare.prepare("bids", source, tmp_path / "out")
    labelled = {path.name for path in (tmp_path / "out").glob("*_seg.nii.gz")}
    assert labelled == {f"sub-{k}_seg.nii.gz" for k in range(2, 12)}


def test_sessions_and_runs_are_images_of_their_own_and_derivatives_are_not(tmp_path, capsys):
    got = found("bids", tmp_path, *anat(
        "sub-1_ses-1_T1w", "sub-1_ses-2_run-1_T1w", "sub-1_ses-2_run-2_T1w", "sub-10_T1w"), *anat(
        "sub-1_ses-1_dseg", "sub-1_ses-1_desc-aseg_dseg", "sub-1_ses-1_space-MNI_dseg", "sub-1_ses-1_desc-preproc_T1w",
        "sub-1_ses-2_dseg", "sub-1_ses-2_run-2_desc-manual_dseg", "sub-10_space-MNI_dseg", folder="derivatives/a"),
        "sourcedata/sub-2/anat/sub-2_T1w.nii.gz")
    assert got == {
        "sub-1_ses-1": ("sub-1/ses-1/anat/sub-1_ses-1_T1w.nii.gz",
                        "derivatives/a/sub-1/ses-1/anat/sub-1_ses-1_dseg.nii.gz"),
        "sub-1_ses-2_run-1": ("sub-1/ses-2/anat/sub-1_ses-2_run-1_T1w.nii.gz", None),
        "sub-1_ses-2_run-2": ("sub-1/ses-2/anat/sub-1_ses-2_run-2_T1w.nii.gz",
                              "derivatives/a/sub-1/ses-2/anat/sub-1_ses-2_run-2_desc-manual_dseg.nii.gz"),
        "sub-10": ("sub-10/anat/sub-10_T1w.nii.gz", None)}
    said = capsys.readouterr().out
    assert "T1w images of derivatives are not taken" in said and "2 of 4 images have no label map" in said


def test_of_derivatives_one_image_a_scan_is_taken_with_labels_in_its_space(tmp_path):
    got = found("bids", tmp_path, *anat(
        "sub-1_desc-preproc_T1w", "sub-1_space-MNI_desc-preproc_T1w", "sub-1_space-MNI_dseg", "sub-1_dseg",
        "sub-1_desc-aseg_dseg", "sub-2_space-MNI_desc-preproc_T1w", "sub-2_space-MNI_dseg", "sub-2_dseg",
        "sub-3_desc-brain_T1w", "sub-3_desc-brain_dseg", "sub-3_dseg"))
    assert {id: [path.rpartition("/")[2] for path in paths] for id, paths in got.items()} == {
        "sub-1": ["sub-1_desc-preproc_T1w.nii.gz", "sub-1_dseg.nii.gz"],
        "sub-2": ["sub-2_space-MNI_desc-preproc_T1w.nii.gz", "sub-2_space-MNI_dseg.nii.gz"],
        "sub-3": ["sub-3_desc-brain_T1w.nii.gz", "sub-3_desc-brain_dseg.nii.gz"]}


@pytest.mark.parametrize(("name", "files", "words"), [
    ("bids", ["a/sub-1_T1w.nii.gz", "b/sub-1_T1w.nii.gz"], "would both be sub-1"),
    ("bids", ["sub-1_T1w.nii", "sub-1_T1w.nii.gz"], "would both be sub-1"),
    ("bids", ["sub-a_T1w.nii.gz", "sub-A_T1w.nii.gz"], "case"),
    ("bids", ["sub-1_space-A_T1w.nii.gz", "sub-1_space-B_T1w.nii.gz"], "would both be sub-1"),
    ("bids", ["sub-1_desc-aseg_dseg.nii.gz", "sub-1_desc-aparc_dseg.nii.gz", "sub-1_T1w.nii.gz"], "both label maps"),
    ("bids", ["a/sub-1_dseg.nii.gz", "derivatives/sub-1_dseg.nii.gz", "sub-1_T1w.nii.gz"], "both label maps"),
    ("bids", ["sub-01-a_T1w.nii.gz"], "not a BIDS name"),
    ("bids", ["sub-1_sub-2_T1w.nii.gz"], "not a BIDS name"),
    ("bids", ["sub-1_first_T1w.nii.gz"], "not a BIDS name"),
    ("folder", ["1.nii.gz", "1_t1.nii.gz"], "would both be 1"),
    ("folder", ["a.mgz", "A.nii.gz"], "case"),
    ("folder", ["1_seg.mgz", "1_seg.nii", "1.nii.gz"], "both label maps"),
    ("malf", ["a/1000_3.nii.gz", "b/1000_3.nii.gz"], "would both be 1000"),
    ("ixi", ["IXI002-Guys-0828-T1.nii.gz", "IXI002-Guys-0828-T1_mask.nii.gz"], "would both be IXI002-Guys-0828"),
    ("ixi-pkl", ["Train/subject_1.pkl", "Val/subject_1.pkl"], "would both be subject_1"),
    ("lpba40", ["a/S01.delineation.skullstripped.img", "b/S01.delineation.skullstripped.nii.gz"], "would both be S01"),
    ("mindboggle", ["a/1/t1weighted_brain.nii.gz", "b/1/t1weighted_brain.nii.gz"], "would both be 1"),
])
def test_what_could_be_meant_in_two_ways_is_refused_with_the_names_of_the_files(name, files, words, tmp_path):
    with pytest.raises(InputError, match=words) as error:
        found(name, tmp_path, *files)
    named = str(error.value)
    assert all(str(tmp_path / file) in named for file in files[:2]) and "SOURCE" in named and "\n" not in named


def test_a_dot_in_a_name_does_not_end_it(tmp_path):
    files = ["site1.001.nii.gz", "site1.002_t1.nii", "site1.002_seg.mgz", "site1.nii.gz"]
    assert found("folder", tmp_path / "folder", *files) == {
        "site1": ("site1.nii.gz", None), "site1.001": ("site1.001.nii.gz", None),
        "site1.002": ("site1.002_t1.nii", "site1.002_seg.mgz")}
    lpba = [f"all/S0{k}.delineation.{kind}.img" for k in (1, 2) for kind in ("skullstripped", "structure.label")]
    assert found("lpba40", tmp_path / "lpba", *lpba) == {"S01": tuple(lpba[:2]), "S02": tuple(lpba[2:])}


def test_a_person_is_in_one_split(tmp_path, without_affine):
    for k in range(1, 9):
        for session in (1, 2):
            pair(k, *(tmp_path / name for name in anat(*(f"sub-{k}_ses-{session}_{kind}" for kind in ("T1w", "dseg")))))
    made = prepare.prepare("bids", tmp_path, tmp_path / "out")
    splits = json.loads((tmp_path / "out" / "splits.json").read_text())
    people = {split: set(map(person, ids)) for split, ids in splits.items()}
    assert len(made) == 16 and {split: len(ids) for split, ids in splits.items()} == {"train": 8, "val": 4, "test": 4}
    assert sum(map(len, people.values())) == len(set().union(*people.values())) == 8


def test_the_id_of_the_template_is_taken(tmp_path):
    for name in ("MNI152.nii.gz", "01.nii.gz"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"MNI152.nii.gz has the id of the MNI152 brain.*: rename it"):
        prepare.prepare("folder", tmp_path, tmp_path / "out")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the brains of the MICCAI 2012 challenge")
def test_native_brains_come_to_lie_on_each_other(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for id in ("1005", "1116"):
        for kind in ("t1", "seg"):
            (source / f"{id}_{kind}.nii.gz").symlink_to(SHARED / "native" / f"{id}_{kind}.nii.gz")
    prepare.prepare("malf", source, tmp_path / "out")
    labels = [load_labels(tmp_path / "out" / f"{id}_seg.nii.gz").data for id in ("1005", "1116")]
    assert labels[0].shape == prepare.SHAPE == load_image(tmp_path / "out" / "mni152_t1.nii.gz").data.shape
    # Affinely aligned by another program, as the shared folder has them, the two have a Dice of about .4.
    assert metrics.mean_dice(*labels, (0, 1, 42, 43, 46, 63, 64)) > 0.36
