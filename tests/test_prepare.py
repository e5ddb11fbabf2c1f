"""Miniature copies of every layout, made here."""

import json
import pickle
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from matplotlib import image as pictures

from drivenmorph_jax.data import prepare
from drivenmorph_jax.data.folder import folder_dataset
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
