"""Damaged NIfTI files: each is read, or refused in one sentence; never another exception, never much memory.

FUZZ=2000 python -m pytest tests/test_fuzz.py    # as many files; 100 where it is not set
"""

import gzip
import os
import resource
import shutil
import time

import nibabel as nib
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy.ndimage import gaussian_filter
from test_programs import run

import register as register_program
from drivenmorph_jax.data.folder import IMAGE, LABELS, folder_dataset
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.evaluation.evaluate import evaluate_checkpoint
from drivenmorph_jax.images.intensity import normalise
from drivenmorph_jax.images.reading import load_image, load_labels
from drivenmorph_jax.images.volume import canonical
from drivenmorph_jax.registration.apply import apply_files
from drivenmorph_jax.transforms.transform import Transform

COUNT = int(os.environ.get("FUZZ", 100))
SHAPE = (12, 10, 8)
# Fields of the header where damage means something: offset, and the type of what is written there.
FIELDS = {"sizeof_hdr": (0, "<i4"), "dim": (40, "<i2", 8), "datatype": (70, "<i2"), "bitpix": (72, "<i2"),
          "pixdim": (76, "<f4", 8), "vox_offset": (108, "<f4"), "scl_slope": (112, "<f4"), "scl_inter": (116, "<f4"),
          "xyzt_units": (123, "u1"), "qform_code": (252, "<i2"), "sform_code": (254, "<i2"), "quatern": (256, "<f4", 6),
          "srow": (280, "<f4", 12), "intent": (68, "<i2"), "magic": (344, "u1", 4)}
STRANGE = {"i": (0, -1, 1, 2, 7, 16, 64, 255, 2**15 - 1, -2**15), "u": (0, 1, 2, 3, 255),
           "f": (0, -1, 1e-30, 1e30, np.nan, np.inf, -np.inf, 352, 1e9)}


def whole(rng):
    """The bytes of a good file: an image, a label map, or a displacement field."""
    data = rng.random(SHAPE).astype(np.float32)
    kind = rng.integers(3)
    if kind == 1:
        data = rng.integers(0, 5, SHAPE).astype(np.int16)
    image = nib.Nifti1Image(rng.standard_normal((*SHAPE, 1, 3)).astype(np.float32) if kind == 2 else data,
                            np.diag([1.0, 2, 1, 1]))
    if kind == 2:
        image.header.set_intent(1007)
    return bytearray(image.to_bytes())


def damaged(rng):
    """(bytes, ending) of a file with one to three faults."""
    data = whole(rng)
    voxels = len(data) - 352
    for _ in range(rng.integers(1, 4)):
        kind = rng.integers(6)
        if kind <= 2:
            offset, dtype, *count = FIELDS[str(rng.choice(list(FIELDS)))]
            size, place = np.dtype(dtype).itemsize, rng.integers(count[0]) if count else 0
            start = offset + size * int(place)
            with np.errstate(all="ignore"):
                value = np.array(rng.choice(STRANGE[np.dtype(dtype).kind])).astype(dtype)
            data[start:start + size] = value.tobytes()
        elif kind == 3:
            for place in rng.integers(0, len(data), 8):
                data[place] = rng.integers(256)
        elif kind == 4:
            del data[rng.integers(len(data)):]
            data = data or bytearray(1)
        elif len(data) > 352 + 64:
            fill = rng.choice([np.nan, np.inf, 0, 1e38, -5])
            data[352:352 + voxels // 4 * 4] = np.full(voxels // 4, fill, "<f4").tobytes()
    if rng.random() < 0.5:
        return bytes(data), ".nii"
    packed = bytearray(gzip.compress(bytes(data), 1))
    if rng.random() < 0.3:
        packed[rng.integers(len(packed))] ^= 255
    return bytes(packed), ".nii.gz"


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_read_or_refused_in_one_sentence(tmp_path):
    counts = {"read": 0, "refused": 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(COUNT):
        data, ending = damaged(np.random.default_rng(seed))
        path = tmp_path / f"a{ending}"
        path.write_bytes(data)
        start = time.perf_counter()
        for read in (load_image, load_labels, Transform.load):
            try:
                found = read(path)
            except InputError as error:
                assert str(path) in str(error) and "\n" not in str(error), seed
                counts["refused"] += 1
            except BaseException as error:
                raise AssertionError(f"seed {seed}: {read.__qualname__} raised {type(error).__name__}") from error
            else:
                counts["read"] += 1
                if read is load_image:
                    assert np.isfinite(normalise(found.data)).all(), seed
                    canonical(found)
        assert time.perf_counter() - start < 20, seed
    assert min(counts.values()) > COUNT / 20, counts
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    assert grown < 4, f"{grown:.1f} GiB"


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_image_transform_or_subject_leaves_a_whole_result_or_none(tmp_path, smooth_transform):
    """`apply.py` and the loader of a data folder, each with one damaged file among good ones."""
    good, out = tmp_path / "good.nii.gz", tmp_path / "out" / "moved.nii.gz"
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random(SHAPE).astype(np.float32), np.eye(4)), good)
    cohort = tmp_path / "cohort"
    cohort.mkdir()
    out.parent.mkdir()
    for id in "123":
        shutil.copy(good, cohort / f"{id}{IMAGE}")
    done = {"moved": 0, "refused": 0}
    for seed in range(COUNT // 3):
        data, ending = damaged(np.random.default_rng(seed))
        bad = tmp_path / f"bad{ending}"
        bad.write_bytes(data)
        start = time.perf_counter()
        for transform, moving in ((smooth_transform, bad), (bad, good)):
            try:
                list(apply_files(transform, out, [moving]))
            except InputError as error:
                assert "\n" not in str(error), seed
                done["refused"] += 1
            else:
                done["moved"] += 1
                assert np.isfinite(nib.load(out).get_fdata()).all(), seed
                out.unlink()
            assert not list(out.parent.iterdir()), seed
        (cohort / f"2{IMAGE}").write_bytes(data if ending == ".nii.gz" else gzip.compress(data, 1))
        try:
            folder_dataset(ConfigDict({"root": str(cohort)}))
        except InputError as error:
            assert str(cohort) in str(error) and "\n" not in str(error), seed
        assert time.perf_counter() - start < 20, seed
    assert min(done.values()) > COUNT / 30, done


@pytest.fixture
def smooth_transform(tmp_path):
    u = gaussian_filter(np.random.default_rng(0).standard_normal((*SHAPE, 3)), (2, 2, 2, 0)).astype(np.float32)
    image = nib.Nifti1Image(u[..., None, :], np.eye(4))
    image.header.set_intent(1007)
    nib.save(image, tmp_path / "displacement.nii.gz")
    return tmp_path / "displacement.nii.gz"


@pytest.mark.filterwarnings("ignore")
def test_register_with_a_damaged_file_ends_in_a_whole_result_or_one_sentence(tmp_path, monkeypatch, capsys):
    """`register.py` as a whole, with one damaged image, label map or mask; by Demons, which compiles fast."""
    good, out = tmp_path / "good.nii.gz", tmp_path / "out"
    nib.save(nib.Nifti1Image(gaussian_filter(np.random.default_rng(0).random(SHAPE), 1).astype(np.float32),
                             np.diag([1.0, 2, 1, 1])), good)

    def register(affine, **files):
        arguments = [x for name, path in ({"fixed": good, "moving": good} | files).items() for x in (f"--{name}", path)]
        arguments += ["--out", out, "--method", "demons", "--memory", "4GB", *([] if affine else ["--affine", "none"])]
        return run(register_program, arguments, monkeypatch, capsys)

    assert register(affine=False)[0] == 0  # compiles, which may take longer than any damaged file may
    shutil.rmtree(out)
    done = {"registered": 0, "refused": 0}
    for seed in (*range(COUNT // 5), 1369, 1437):  # voxels of 1e-17 and of 1e7 mm once took all memory
        data, ending = damaged(np.random.default_rng(seed))
        bad = tmp_path / f"bad{ending}"
        bad.write_bytes(data)
        damage = ("fixed", "moving", "moving_labels", "fixed_mask")[seed % 4]
        start = time.perf_counter()
        status, said = register(seed % 3 == 0, **{damage: bad})
        assert time.perf_counter() - start < 20, seed
        if status:
            assert status == 2 and said.startswith("error: ") and said.count("\n") == 1, (seed, said)
            assert not out.exists() or not list(out.iterdir()), seed
        else:
            assert np.isfinite(nib.load(out / "displacement.nii.gz").get_fdata()).all(), seed
            shutil.rmtree(out)
        done["refused" if status else "registered"] += 1
    assert min(done.values()), done


@pytest.mark.filterwarnings("ignore")
def test_eval_with_a_damaged_subject_ends_in_scores_or_one_sentence(smoke, brains, tmp_path):
    """`eval.py` behind its flags, with one damaged image or label map among four subjects."""
    cohort = shutil.copytree(brains, tmp_path / "cohort")
    (cohort / "splits.json").write_text('{"test": ["sub-000", "sub-001"]}')
    done = {"scored": 0, "refused": 0}
    for seed in range(max(4, COUNT // 100)):
        rng = np.random.default_rng(seed)
        kind = (IMAGE, LABELS)[seed % 2]
        path = cohort / f"sub-001{kind}"
        content = bytearray(gzip.decompress((brains / path.name).read_bytes()))
        # Every other time only voxels, so that the file can be read.
        for place in rng.integers(352 if seed // 2 % 2 else 0, len(content), 40):
            content[place] = rng.integers(256)
        path.write_bytes(gzip.compress(bytes(content), 1))
        out, start = tmp_path / f"out{seed}", time.perf_counter()
        try:
            summary = evaluate_checkpoint(smoke[0], out, root=cohort)
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error), seed
            assert not (out / "summary.json").exists(), seed
            done["refused"] += 1
        else:
            assert np.isfinite(summary["dice"]["mean"]) and np.isfinite(summary["sdlogj"]["mean"]), seed
            done["scored"] += 1
        assert time.perf_counter() - start < 60, seed
        shutil.copy(brains / path.name, path)
    assert min(done.values()), done
