"""The program `label`: atlases from a folder, labels and volumes of scans, and what it refuses."""

import csv
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from test_programs import refused, run

import drivenmorph_jax
import label as program
from drivenmorph_jax import demons
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.images.reading import load_image
from drivenmorph_jax.labelling import align
from drivenmorph_jax.labelling.label import label_files

FILES = {"labels.nii.gz", "confidence.nii.gz", "volumes.csv", "overview.png", "summary.json"}
VALUES = np.array([0, 3, 1009, 6])  # of nothing and of three shells


def brain(path, stretch, spacing=5.0, side=28):
    """An image of three shells, and their label map beside it."""
    x = (np.moveaxis(np.indices((side,) * 3), 0, -1) - side / 2) * spacing / 5 / [stretch, 1.1, 1]
    radius = np.linalg.norm(x, axis=-1)
    shells = np.select([radius < 4, radius < 7, radius < 10], [1, 2, 3], 0)
    affine = np.diag([-spacing, spacing, spacing, 1])
    for ending, data in (("t1", np.array([0, 300, 900, 600])[shells]), ("seg", VALUES[shells])):
        nib.save(nib.Nifti1Image(data.astype(np.int16), affine), f"{path}_{ending}.nii.gz")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with three atlases, their names, and two scans on other grids."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "atlases").mkdir()
    for k, stretch in enumerate((0.9, 1, 1.2)):
        brain(folder / "atlases" / f"a{k}", stretch)
    brain(folder / "one", 1.1)
    brain(folder / "two", 1.05, 4.0, 32)
    (folder / "atlases" / "labels.csv").write_text("number,name\n3,core\n1009,shell\n")
    return folder


@pytest.fixture(scope="module")
def labelled(folder):
    """The folders of the results of both scans, registered quickly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(align, "DEMONS", demons.INTENSITY | {"iterations": (30, 0, 0)})
        return list(label_files([folder / f"{name}_t1.nii.gz" for name in ("one", "two")], folder / "atlases",
                                folder / "out"))


def voxels(path):
    return np.asarray(nib.load(path).dataobj)


def test_the_volumes_of_all_scans_come_to_one_table(labelled, folder):
    head, *rows = (folder / "out" / "volumes.csv").read_text().splitlines()
    wanted = []
    for out in labelled:
        own, *lines = (out / "volumes.csv").read_text().splitlines()
        wanted += [f"{out.name},{line}" for line in lines]
    assert head == f"image,{own}" and rows == wanted and len(rows) == 2 * len(VALUES[1:])


def test_labels_lie_on_the_scan_and_are_those_of_its_shells(labelled, folder):
    for name, out in zip(("one", "two"), labelled, strict=True):
        assert {path.name for path in out.iterdir()} == FILES
        truth, found, sure = nib.load(folder / f"{name}_seg.nii.gz"), *(
            nib.load(out / f"{file}.nii.gz") for file in ("labels", "confidence"))
        for image in (found, sure):
            assert image.shape == truth.shape
            np.testing.assert_array_equal(image.affine, truth.affine)
        truth, found, sure = (np.asarray(x.dataobj) for x in (truth, found, sure))
        assert set(np.unique(found)) == set(VALUES)
        for value in VALUES[1:]:
            a, b = truth == value, found == value
            assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.85
        assert sure.min() > 0.2 and sure.max() <= 1 and sure[0, 0, 0] == 1
        right = truth == found
        assert sure[right].mean() > sure[~right].mean() + 0.05  # it says where the labels may be wrong


def test_volumes_are_those_of_the_label_map(labelled):
    for out, size in zip(labelled, (0.125, 0.064), strict=True):
        with (out / "volumes.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [(row["label"], row["name"]) for row in rows] == [("3", "core"), ("6", ""), ("1009", "shell")]
        found, sure = (voxels(out / f"{name}.nii.gz") for name in ("labels", "confidence"))
        for row in rows:
            inside = found == int(row["label"])
            assert float(row["ml"]) == pytest.approx(inside.sum() * size, abs=1e-3)
            assert float(row["confidence"]) == pytest.approx(sure[inside].mean(), abs=1e-3)
        summary = json.loads((out / "summary.json").read_text())
        assert summary["ids"] == ["a0", "a1", "a2"] and summary["fusion"] == "joint"
        assert summary["seconds"]["demons"] > 0 and not summary["stripped"]


def test_what_is_labelled_is_not_labelled_again(labelled, folder, monkeypatch, capsys):
    arguments = ["--image", folder / "one_t1.nii.gz", folder / "two_t1.nii.gz", "--atlases", folder / "atlases",
                 "--out", folder / "out"]
    monkeypatch.setattr("drivenmorph_jax.labelling.label.label", None)  # it would be called in vain
    assert run(program, arguments, monkeypatch, capsys) == (0, "")
    with pytest.raises(TypeError):
        run(program, [*arguments, "--fusion", "local"], monkeypatch, capsys)


def test_of_several_images_a_broken_one_is_named_and_the_others_are_labelled(labelled, folder, monkeypatch, capsys):
    monkeypatch.setattr("drivenmorph_jax.labelling.label.label", lambda path, *_, **__: load_image(path))
    broken = folder / "broken.nii.gz"
    broken.write_bytes((folder / "one_t1.nii.gz").read_bytes()[:300])
    before = (folder / "out" / "volumes.csv").read_text()
    code, told = run(program, ["--atlases", folder / "atlases", "--out", folder / "out", "--image", broken,
                               folder / "one_t1.nii.gz", folder / "two_t1.nii.gz"], monkeypatch, capsys)
    assert code == 4 and told.count("broken.nii.gz") == 1 and told.startswith("skipped: ")
    assert (folder / "out" / "volumes.csv").read_text() == before and not (folder / "out" / "broken").exists()


def test_what_cannot_be_used_is_told_in_one_sentence(folder, tmp_path, monkeypatch, capsys):
    atlases = shutil.copytree(folder / "atlases", tmp_path / "atlases")
    scan = folder / "one_t1.nii.gz"

    def told(image=scan, atlases=atlases, *more):
        return run(program, ["--image", image, "--atlases", atlases, "--out", tmp_path / "out", *more], monkeypatch,
                   capsys)

    refused(*told(atlases=tmp_path / "nowhere"), "nowhere", "not a folder")
    refused(*told(image=tmp_path / "none.nii.gz"), "none.nii.gz", "does not exist")
    refused(*told(image=atlases / "a1_t1.nii.gz"), "is the atlas a1")
    refused(*told(image=shutil.copy(atlases / "a1_t1.nii.gz", tmp_path / "copy.nii.gz")), "is the atlas a1")
    brain(atlases / "a1", 1, 4.0)
    refused(*told(), "a1_t1.nii.gz is not on the grid of a0_t1.nii.gz")
    for id in ("a1", "a2"):
        (atlases / f"{id}_seg.nii.gz").unlink()
    refused(*told(), "holds 1 images", "at least 2")
    assert not (tmp_path / "out" / "labels.nii.gz").exists()
    other = tmp_path / "one_t1.nii"
    with pytest.raises(InputError, match="two images have one name"):
        list(label_files([scan, other], folder / "atlases", tmp_path / "out"))
    with pytest.raises(InputError, match="fusion is 'best': set it to 'joint' or 'local' or 'majority'"):
        drivenmorph_jax.label(scan, folder / "atlases", fusion="best")
