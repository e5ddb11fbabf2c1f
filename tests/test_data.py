import json
from pathlib import Path

import jax
import nibabel as nib
import numpy as np
import pytest
from ml_collections import ConfigDict

from drivenmorph_jax.data import Subject, load, training_batches
from drivenmorph_jax.data.folder import drawn_splits
from drivenmorph_jax.errors import InputError

SHAPE = (8, 10, 6)
MALF = Path(__file__).resolve().parents[2] / "shared" / "data" / "malf"


def write(folder, id, shape=SHAPE, affine=None, seg=True):
    """A scan stored with a negative first axis (LAS), whose label map is its intensity."""
    data = np.random.default_rng(int(id)).integers(0, 200, shape).astype(np.int16)
    affine = np.diag([-2.0, 2.0, 2.0, 1.0]) if affine is None else affine
    nib.save(nib.Nifti1Image(data, affine), folder / f"{id}_t1.nii.gz")
    if seg:
        nib.save(nib.Nifti1Image(data, affine), folder / f"{id}_seg.nii.gz")
    return data


def config(root, **changes):
    return ConfigDict(dict(name="folder", root=str(root), exclude=(7,), splits=None) | changes)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "scans"
    root.mkdir()
    for id in range(10, 17):
        write(root, str(id))
    return root


def ids(subjects):
    return {subject.id for subject in subjects}


def test_folder_gives_canonical_images_and_labels(folder):
    data = write(folder, "10")
    table = "Label Number,Label Name,Class\n4,3rd Ventricle,CSF\n11,4th,CSF\n"
    (folder.parent / "labels.csv").write_text(table)
    (folder / "splits.json").write_text(json.dumps({"train": ["10", 11], "test": ["12", "13"]}))
    found = load(config(folder))
    subject = found.train[0]
    np.testing.assert_array_equal(subject.labels, data[::-1])
    assert subject.labels.dtype == np.int32 and subject.image.dtype == np.float32
    assert subject.image.min() >= 0 and subject.image.max() == pytest.approx(1)
    assert np.corrcoef(subject.image.ravel(), data[::-1].ravel())[0, 1] > 0.99
    np.testing.assert_allclose(subject.affine, nib.as_closest_canonical(
        nib.load(folder / "10_t1.nii.gz")).affine)
    assert (ids(found.train), found.val, ids(found.test)) == ({"10", "11"}, (), {"12", "13"})
    assert (found.name, found.spacing, found.exclude) == ("scans", 2.0, (0, 7))
    assert found.label_names == {4: "3rd Ventricle", 11: "4th"}


def test_folder_without_splits_or_labels(folder):
    (folder / "12_seg.nii.gz").unlink()
    first, again = load(config(folder)), load(config(folder), splits=("val", "test"))
    assert ids(first.val) == ids(again.val) and ids(first.test) == ids(again.test) and again.train == ()
    assert [len(first.train), len(first.val), len(first.test)] == [3, 2, 2]
    everyone = first.train + first.val + first.test
    assert ids(everyone) == {str(id) for id in range(10, 17)}
    assert [s.id for s in everyone if s.labels is None] == ["12"] and first.label_names == {}


def test_a_subject_that_cannot_be_read_is_refused_or_named_and_left_out(folder, capsys):
    (folder / "12_seg.nii.gz").write_bytes((folder / "12_seg.nii.gz").read_bytes()[:80])
    with pytest.raises(InputError, match="12_seg.nii.gz"):
        load(config(folder))
    found = load(config(folder, skip_bad=True))
    assert ids(found.train + found.val + found.test) == {str(id) for id in range(10, 17)} - {"12"}
    assert "12 is left out: " in capsys.readouterr().err


def test_splits_file_may_lie_in_the_parent_or_be_named(folder):
    (folder.parent / "splits.json").write_text(json.dumps({"train": ["10", "11"]}))
    (folder.parent / "other.json").write_text(json.dumps({"train": ["14", "15"]}))
    assert ids(load(config(folder)).train) == {"10", "11"}
    assert ids(load(config(folder, splits=str(folder.parent / "other.json"))).train) == {"14", "15"}


def test_the_draw_is_by_person_and_as_before_where_every_image_has_its_own():
    drawn = {"val": ["12", "14"], "test": ["13", "16"], "train": ["15", "10", "11"]}  # of version 0.1.0
    assert drawn_splits([str(id) for id in range(10, 17)]) == drawn
    assert drawn_splits([f"sub-{id}.a_t1" for id in range(10, 17)]) == {
        split: [f"sub-{id}.a_t1" for id in ids] for split, ids in drawn.items()}
    for image in ("sub-{}_ses-1", "sub-{}_ses-2", "sub-{}_ses-2_run-1_T1w", "sub-{}_follow_up", "sub-{}"):
        assert drawn_splits([form.format(id) for id in range(10, 17) for form in ("sub-{}_acq-a", image)]) == {
            split: [form.format(id) for id in ids for form in ("sub-{}_acq-a", image)] for split, ids in drawn.items()}


def broken(folder, fault):
    """The folder with one fault, and the words its error must hold."""
    if fault == "two splits for a person":
        for id in ("sub-1_ses-1", "sub-1_ses-2"):
            (folder / f"{id}_t1.nii.gz").symlink_to(folder / "10_t1.nii.gz")
        (folder / "splits.json").write_text('{"train": ["10", "sub-1_ses-1"], "test": ["11", "sub-1_ses-2"]}')
        return config(folder), "splits.json has sub-1_ses-1 in train and sub-1_ses-2 in test"
    if fault == "missing root":
        return config(folder / "absent"), "absent is not a folder"
    if fault == "empty":
        (folder / "none").mkdir()
        return config(folder / "none"), "none holds 0 files"
    if fault == "one subject":
        (folder / "one").mkdir()
        write(folder / "one", "10")
        return config(folder / "one"), "at least 2 subjects"
    if fault == "absent splits":
        return config(folder, splits="nowhere.json"), "nowhere.json does not exist"
    if fault == "shape":
        write(folder, "14", shape=(8, 10, 7))
        return config(folder), "14_t1.nii.gz is not on the grid"
    if fault == "affine":
        write(folder, "14", affine=np.diag([-2.0, 2.0, 2.5, 1.0]))
        return config(folder), "is not on the grid"
    if fault == "anisotropic":
        for id in range(10, 17):
            write(folder, str(id), affine=np.diag([-1.0, 1.0, 3.0, 1.0]))
        return config(folder), "1 x 1 x 3 mm"
    if fault == "labels table":
        (folder / "labels.csv").write_text("name,number\n")
        return config(folder), "labels.csv is not a label table"
    text = {"not json": "{train", "not a table": '["10"]', "unknown id": '{"train": ["10", "99"]}',
            "two splits": '{"train": ["10", "11"], "test": ["11"]}', "nobody": "{}"}[fault]
    (folder / "splits.json").write_text(text)
    return config(folder), {"unknown id": "99_t1.nii.gz is missing", "two splits": "11 more than once"}.get(
        fault, "splits.json")


@pytest.mark.parametrize("fault", ["missing root", "empty", "one subject", "absent splits", "shape", "affine",
                                   "anisotropic", "labels table", "not json", "not a table", "unknown id",
                                   "two splits", "two splits for a person", "nobody"])
def test_a_broken_folder_is_one_sentence(folder, fault):
    faulty, words = broken(folder, fault)
    with pytest.raises(InputError) as error:
        load(faulty)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.skipif(not MALF.is_dir(), reason="the 27 labelled OASIS brains are not here")
def test_real_brains():
    found = load(config(MALF / "aligned", exclude=(1, 42)), splits=("val",))
    assert ids(found.val) == {"1012", "1023", "1107"} and found.train == ()
    assert found.spacing == pytest.approx(1) and found.label_names[4] == "3rd Ventricle"
    for subject in found.val:
        stored = nib.load(MALF / "aligned" / f"{subject.id}_seg.nii.gz")
        np.testing.assert_array_equal(subject.labels, np.asarray(stored.dataobj))
        assert np.corrcoef(subject.image.ravel() > 0.1, subject.labels.ravel() > 0)[0, 1] > 0.8


def coded(count, shape=(4, 6, 4), labels=True):
    """Subjects that can be told apart in a batch: subject n has the labels n + 1, and an intensity ramp."""
    ramp = np.linspace(0, 0.5, shape[0], dtype=np.float32)[:, None, None]
    return [Subject(str(n), np.broadcast_to(ramp + np.float32(n / 20), shape).copy(),
                    np.full(shape, n + 1, np.int32) if labels else None, np.eye(4)) for n in range(count)]


def drawn(batches, count):
    """Pairs (fixed, moving), by label, of the next `count` batches."""
    found = []
    for _ in range(count):
        batch = next(batches)
        fixed, moving = (batch[f"{role}_labels"][:, 0, 0, 0].tolist() for role in ("fixed", "moving"))
        found += zip(fixed, moving, strict=True)
    return found


def test_batches_have_images_and_their_labels():
    subjects = coded(4)
    batch = next(training_batches(subjects, 3, seed=0, with_labels=True))
    for role in ("fixed", "moving"):
        assert batch[role].shape == (3, 4, 6, 4, 1) and batch[role].dtype == np.float32
        assert batch[f"{role}_labels"].shape == (3, 4, 6, 4) and batch[f"{role}_labels"].dtype == np.int32
        for image, labels in zip(batch[role], batch[f"{role}_labels"], strict=True):
            np.testing.assert_array_equal(image[..., 0], subjects[labels[0, 0, 0] - 1].image)
    assert set(next(training_batches(coded(4, labels=False), 3, seed=0))) == {"fixed", "moving", "pair", "key"}


def test_with_an_atlas_it_moves_in_every_pair():
    *subjects, atlas = coded(4)
    batches = training_batches(subjects, 3, seed=0, atlas=atlas, with_labels=True)
    assert sorted(drawn(batches, 1)) == sorted(drawn(batches, 1)) == [(1, 4), (2, 4), (3, 4)]


def test_an_epoch_holds_every_ordered_pair_once_in_an_order_of_its_own():
    batches = training_batches(coded(4), 4, seed=0, with_labels=True)
    first, second = drawn(batches, 3), drawn(batches, 3)
    every = sorted((a, b) for a in range(1, 5) for b in range(1, 5) if a != b)
    assert sorted(first) == sorted(second) == every
    assert first != second
    assert first == drawn(training_batches(coded(4), 4, seed=0, with_labels=True), 3)
    assert first != drawn(training_batches(coded(4), 4, seed=1, with_labels=True), 3)


def test_restored_iterator_continues_bit_for_bit():
    def batches():
        return training_batches(coded(5), 3, seed=2)
    uninterrupted = batches()
    for _ in range(9):  # past the first epoch
        next(uninterrupted)
    state = json.loads(json.dumps(uninterrupted.get_state()))  # as a checkpoint holds it
    resumed = batches()
    resumed.set_state(state)
    for _ in range(9):
        expected, found = next(uninterrupted), next(resumed)
        for role in expected:
            np.testing.assert_array_equal(found[role], expected[role])


def test_processes_share_the_sequence_of_one(monkeypatch):
    whole = drawn(training_batches(coded(4), 2, seed=0, with_labels=True), 12)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    for process in range(3):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        part = drawn(training_batches(coded(4), 2, seed=0, with_labels=True), 4)
        assert part == whole[process::3]


def test_downsample_averages_images_and_strides_labels():
    rng = np.random.default_rng(0)
    image = rng.random((4, 6, 4), np.float32)
    labels = rng.integers(0, 9, (4, 6, 4)).astype(np.int32)
    subjects = [Subject(id, image, labels, np.eye(4)) for id in "ab"]
    batch = next(training_batches(subjects, 1, seed=0, downsample=2, with_labels=True))
    np.testing.assert_allclose(batch["fixed"][0, 1, 2, 0, 0], image[2:4, 4:6, 0:2].mean(), rtol=1e-6)
    np.testing.assert_array_equal(batch["moving_labels"][0], labels[1::2, 1::2, 1::2])


@pytest.mark.parametrize(("subjects", "options", "words"), [
    (coded(1), {}, "at least 2 subjects"),
    (coded(2), {"downsample": 3}, "downsample is 3"),
    (coded(2, labels=False), {"with_labels": True}, "0 has no label map"),
])
def test_pairs_that_cannot_be_made(subjects, options, words):
    with pytest.raises(InputError, match=words):
        training_batches(subjects, 1, seed=0, **options)
