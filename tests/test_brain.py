"""Whole heads: the networks against torch's, the masks against deepbet's, and which images count as heads."""

import os
import re
import sys
import zipfile
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import jax
import nibabel as nib
import numpy as np
import pytest
from nilearn.datasets import load_mni152_template
from scipy import ndimage

from drivenmorph_jax.brain import extraction, linknet, parameters
from drivenmorph_jax.brain.extraction import extract
from drivenmorph_jax.brain.recognition import is_head, surface
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.images.reading import load_image
from drivenmorph_jax.images.volume import Volume, canonical

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
HEADS = ("subject_t1", "subject_pd", "colin27_t1", "patient_t2")
STRIPPED = ("heads/mni152_brain", "heads/colin27_brain",
            *(f"contrasts/patient1_{contrast}" for contrast in ("t1", "t1c", "t2", "flair")))
MALF = sorted(SHARED.glob("malf/*/*_t1.nii.gz"))

images = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is missing")
networks = pytest.mark.skipif(not list(metadata.distributions(name="deepbet")),
                              reason=f"deepbet is not installed: {parameters.INSTALL}")


def read(name):
    return load_image(SHARED / f"{name}.nii.gz")


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def waves(n=64):
    """A ball with waves, with the mean and the deviation that the networks expect."""
    i = np.indices((n, n, n), dtype=np.float32) / n - 0.5
    r = np.sqrt(i[0] ** 2 + (0.8 * i[1]) ** 2 + (1.1 * i[2]) ** 2)
    x = np.cos(9 * r) + 0.5 * np.sin(20 * i[0]) * np.cos(17 * i[1]) * np.cos(13 * i[2])
    return (0.449 + 0.226 * x).astype(np.float32)


def torch_network(name):
    torch = pytest.importorskip("torch", reason="torch, which runs deepbet's own networks, is not installed")
    folder = next(f for f in metadata.distribution("deepbet").files if f.name == name).locate()
    network = torch.jit.load(str(folder)).eval()

    def probability(x):
        with torch.no_grad():
            return network(torch.from_numpy(x)[None, None])[0, 1].numpy()
    return probability


@networks
@pytest.mark.parametrize("name", ["bbox_model.pt", "model.pt"])
def test_a_network_is_that_of_torch(name):
    wanted = torch_network(name)(waves())
    found = jax.nn.sigmoid(linknet.logit(linknet.prepared(parameters.load(name)), waves()))
    np.testing.assert_allclose(found, wanted, atol=1e-3)


# Of torch 2.14 on CPU: mean and deviation of the probability, and the probability at voxels (32, 32, 0), (.., 8) ...
TORCH = {"bbox_model.pt": (0.1700024, 0.36665377, [2.7295266e-05, 2.9512141e-02, 5.9578996e-14, 9.1986674e-01,
                                                   8.9402157e-01, 9.9993694e-01, 1.0, 4.9535714e-08]),
         "model.pt": (0.3844542, 0.47835758, [8.3409584e-01, 9.9979788e-01, 3.9521288e-03, 9.4109446e-01,
                                              5.0564152e-01, 4.2092119e-04, 1.1057698e-05, 2.4924007e-06])}


@networks
@pytest.mark.parametrize("name", TORCH)
def test_a_network_gives_the_numbers_that_torch_gave(name):
    mean, deviation, line = TORCH[name]
    found = np.asarray(jax.nn.sigmoid(linknet.logit(linknet.prepared(parameters.load(name)), waves())))
    assert found.mean() == pytest.approx(mean, abs=1e-4)
    assert found.std() == pytest.approx(deviation, abs=1e-4)
    np.testing.assert_allclose(found[32, 32, ::8], line, atol=1e-3)


@pytest.fixture(scope="module")
def fast_code():
    """The networks are as large here as for a user, so their code is compiled as for one, which takes longer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", re.sub(r"--xla_backend_optimization_level=\d", "", os.environ["XLA_FLAGS"]))
        yield


@images
@networks
@pytest.mark.parametrize("name", HEADS[:3])
def test_the_mask_is_that_of_deepbet(name, fast_code):
    pytest.importorskip("torch", reason="torch, which runs deepbet's own networks, is not installed")
    deepbet = pytest.importorskip("deepbet", reason="deepbet's own dependencies are not installed")
    _, mask, _ = deepbet.BrainExtraction(no_gpu=True).run(nib.load(SHARED / f"heads/{name}.nii.gz"))
    assert dice(extract(read(f"heads/{name}")), np.asarray(mask.dataobj) > 0) >= 0.999


@images
@networks
@pytest.mark.parametrize("inverted", [False, True])
def test_the_brain_of_colin27_is_found_in_another_orientation_and_contrast(inverted, fast_code):
    head, brain = read("heads/colin27_t1"), extraction.largest(read("heads/colin27_brain").data > 0)
    values = np.where(head.data > 20, np.maximum(200 - head.data, 0), 0) if inverted else head.data
    voxels = np.array([[0, 1, 0, 0], [0, 0, 1, 0], [-1, 0, 0, head.data.shape[2] - 1], [0, 0, 0, 1.0]])
    turned = replace(head, data=np.ascontiguousarray(values.transpose(2, 0, 1)[::-1]), affine=head.affine @ voxels)
    mask = extract(turned)[::-1].transpose(1, 2, 0)
    # The mask of deepbet ends at the dura. The published brain ends at the pia.
    assert (mask & brain).sum() / brain.sum() > 0.98
    assert dice(mask, brain) > 0.91
    if not inverted:
        assert dice(extraction.tightened(mask, head), brain) > 0.97


@networks
def test_an_image_without_a_brain_is_refused():
    empty = Volume(np.ones((40, 40, 40), np.float32), np.eye(4), nib.Nifti1Header(), "empty.nii.gz")
    with pytest.raises(InputError, match=r"^no brain is found in empty.nii.gz; [^.]*$"):
        extract(empty)


def test_without_the_package_one_sentence_says_what_to_install(monkeypatch, tmp_path):
    def missing(name):
        raise metadata.PackageNotFoundError(name)
    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(InputError, match=r"missing: pip install --no-deps deepbet==1\.0\.2$"):
        parameters.load("model.pt")
    found = type("Package", (), {"version": "0.0.9", "files": []})()
    monkeypatch.setattr(metadata, "distribution", lambda name: found)
    with pytest.raises(InputError, match=r"version 0\.0\.9, not 1\.0\.2: pip install"):
        parameters.load("model.pt")
    found.version = parameters.VERSION
    with pytest.raises(InputError, match="model.pt of the package deepbet 1.0.2 is missing or damaged; install"):
        parameters.load("model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("model/data/0", b"0000")
    file = {"parts": ("data", "models", "model.pt"), "locate": lambda self: tmp_path / "model.pt"}
    found.files = [type("File", (), file)()]
    with pytest.raises(InputError, match="model.pt of the package deepbet 1.0.2 is missing or damaged; install"):
        parameters.load("model.pt")


@networks
def test_parameters_are_read_without_the_package():
    assert sum(x.size for x in parameters.load("model.pt").values()) == 2_126_258
    assert "deepbet" not in sys.modules or "torch" in sys.modules


@pytest.mark.parametrize(("n", "m"), [(100, 128), (256, 256), (300, 128), (128, 37)])
def test_resizing_takes_the_voxel_whose_centre_is_nearest(n, m):
    x = np.arange(n, dtype=np.float32)[:, None, None]
    centres = (np.arange(m) + 0.5) * n / m - 0.5
    assert np.abs(extraction.resized(x, (m, 1, 1))[:, 0, 0] - centres).max() <= 0.5 + 1e-5
    np.testing.assert_array_equal(extraction.resized(x, (n, 1, 1)), x)


def test_the_largest_part_is_kept_and_filled():
    mask = np.zeros((12, 12, 12), bool)
    mask[1:8, 1:8, 1:8] = True
    mask[3:5, 3:5, 3:5] = False
    mask[10, 10, 10] = True
    kept = extraction.filled(extraction.largest(mask))
    assert kept.sum() == 343 and not kept[10, 10, 10]
    assert not extraction.largest(np.zeros((3, 3, 3), bool)).any()


@images
@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_recognised(name):
    head = canonical(read(f"heads/{name}"))
    assert surface(head).share > 0.4  # the limit is .15
    for changed in (head.data * 1e-4, head.data + 500, head.data / head.data.std() - 1, rician(head.data, 0.05)):
        assert is_head(replace(head, data=changed.astype(np.float32)))
    d, h, w = head.data.shape
    for part in (np.s_[:, :, w // 3:], np.s_[:, :, :2 * w // 3], np.s_[:d // 2], np.s_[:, :h // 2],
                 np.s_[d // 8:-d // 8]):
        assert is_head(replace(head, data=head.data[part]))
    shown = ndimage.gaussian_filter(head.data, 2 / head.spacing)
    assert is_head(replace(head, data=np.where(shown > 0.1 * np.percentile(shown, 99), head.data, 0)))


@images
@pytest.mark.parametrize("name", STRIPPED)
def test_a_stripped_brain_is_not_taken_for_a_head(name):
    brain = canonical(read(name))
    assert surface(brain).share < 0.05
    top = brain.data.max()
    for changed in (brain.data * 1e-4, brain.data + 500, rician(brain.data, 0.05),
                    np.where(brain.data > 0, brain.data, -9),
                    np.where(brain.data > 0, 1.05 * top - brain.data, 0), np.maximum(brain.data - 0.2 * top, 0)):
        assert not is_head(replace(brain, data=changed.astype(np.float32)))
    d, h, w = brain.data.shape
    for part in (np.s_[:, :, w // 3:], np.s_[:d // 2], np.s_[:, :h // 2], np.s_[2 * d // 5:3 * d // 5]):
        assert not is_head(replace(brain, data=brain.data[part]))
    for size in (0.1, 0.4):  # the brain of an animal
        assert not is_head(replace(brain, affine=brain.affine @ np.diag([size, size, size, 1])))


@images
def test_no_brain_of_the_challenge_is_taken_for_a_head():
    shares = [surface(load_image(path)).share for path in MALF]
    assert len(shares) > 27 and max(shares) < 0.05


def test_the_embedded_template_is_not_taken_for_a_head():
    assert not is_head(load_image(load_mni152_template(resolution=1)))


@pytest.mark.parametrize("kind", ["noise", "smooth", "ball", "ramp", "shell", "empty", "few"])
@pytest.mark.parametrize("spacing", [0.5, 1.0, 3.0])
def test_what_is_no_brain_is_not_taken_for_a_head(kind, spacing):
    rng, n = np.random.default_rng(0), 5 if kind == "few" else 48
    i = np.stack(np.meshgrid(*[np.linspace(-1, 1, n)] * 3, indexing="ij"))
    r = np.sqrt((i**2).sum(0))
    x = {"noise": rng.random(r.shape), "smooth": ndimage.gaussian_filter(rng.random(r.shape), 3), "ball": r < 0.7,
         "ramp": i[0] + 1, "shell": (r > 0.6) & (r < 0.8), "empty": 0 * r, "few": rng.random(r.shape)}[kind]
    assert not is_head(Volume(x.astype(np.float32), np.diag([spacing] * 3 + [1]), nib.Nifti1Header(), kind))


def rician(x, level):
    noise = level * np.percentile(x[x > 0], 98) * np.random.default_rng(0).standard_normal((2, *x.shape))
    return np.hypot(x + noise[0], noise[1])
