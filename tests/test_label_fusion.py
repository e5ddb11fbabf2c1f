"""Label fusion: votes against SimpleITK, joint weights against the linear system of their definition."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from drivenmorph_jax.images.volume import canonical, on_grid
from drivenmorph_jax.labelling import fusion

SHAPE = (8, 12, 16)


def random_atlases(number=5, seed=0):
    """A scan, registered atlases that resemble it, and labels on which they differ."""
    rng = np.random.default_rng(seed)
    scan = rng.random(SHAPE, np.float32)
    images = scan + 0.2 * rng.normal(size=(number, *SHAPE)).astype(np.float32)
    return scan, images, rng.integers(0, 4, (number, *SHAPE)).astype(np.uint8)


def test_the_majority_is_that_of_simpleitk(monkeypatch):
    monkeypatch.setattr(fusion, "SMOOTH", 0)
    scan, images, labels = random_atlases()
    found, confidence = fusion.fused(scan, images, labels, np.eye(4), on_grid(SHAPE, np.eye(4)), "majority")
    voted = sitk.GetArrayFromImage(sitk.LabelVoting([sitk.GetImageFromArray(x) for x in labels], 99))
    decided = voted != 99
    assert 0.3 < decided.mean() < 1
    np.testing.assert_array_equal(found[decided], voted[decided])
    counts = (labels == found).sum(0)
    assert (counts == np.max([(labels == k).sum(0) for k in range(4)], 0)).all()
    np.testing.assert_allclose(confidence, counts / len(labels), atol=1e-6)


@pytest.mark.parametrize("name", ["joint", "local"])
def test_weights_are_those_of_their_definition(name):
    """Images that repeat every block have one patch everywhere, and so one vector of weights."""
    rng = np.random.default_rng(1)
    tile, tiles = rng.random((2, 2, 2)), rng.random((4, 2, 2, 2))
    times = [n // 2 for n in SHAPE]
    scan, images = (np.tile(x, times).astype(np.float32) for x in (tile, tiles[:, :, :, :]))
    labels = np.arange(4, dtype=np.uint8)[:, None, None, None] + np.zeros((4, *SHAPE), np.uint8)
    weights = fusion.FUSIONS[name](scan, images, labels)
    patches = []
    for x in (scan, *images):
        patch = x[1:5, 3:7, 3:7].astype(float).ravel()  # that of the block at 2, 4, 4
        patch -= patch.mean()
        patches.append(patch / np.linalg.norm(patch))
    error = np.abs(np.array(patches[1:]) - patches[0])
    if name == "joint":
        wanted = np.linalg.solve((error @ error.T) ** fusion.BETA + fusion.ALPHA * np.eye(4), np.ones(4))
    else:
        wanted = 1 / (error**2).sum(1)
    inner = weights[:, 4:-4, 4:-4, 4:-4]
    np.testing.assert_allclose(inner, np.broadcast_to((wanted / wanted.sum())[:, None, None, None], inner.shape),
                               atol=2e-4)
    np.testing.assert_allclose(weights.sum(0), 1, atol=1e-5)


def test_the_atlas_that_looks_like_the_scan_wins_where_others_have_the_majority():
    scan, images, labels = random_atlases(3)
    images = scan + 3 * (images - scan)  # their errors are larger than ALPHA allows for
    images[0], labels[:] = scan, np.array([2, 1, 1], np.uint8)[:, None, None, None]
    volume = on_grid(SHAPE, np.eye(4))
    for name, label in (("majority", 1), ("local", 2), ("joint", 2)):
        assert (fusion.fused(scan, images, labels, np.eye(4), volume, name)[0] == label).all()


def test_votes_are_interpolated_linearly_on_the_grid_of_the_scan(monkeypatch):
    monkeypatch.setattr(fusion, "SMOOTH", 0)
    labels = np.zeros((2, *SHAPE), np.uint8)
    labels[:, 3:] = 5
    half = np.diag([0.5, 1, 1, 1])
    half[0, 3] = 0.25
    found, confidence = fusion.winners(np.full(labels.shape, 0.5), labels, np.eye(4), on_grid((14, 12, 16), half))
    x = 0.25 + 0.5 * np.arange(14)
    votes = np.clip(x - 2, 0, 1)  # of label 5, whose first voxel is at 3
    for line, wanted in ((found, np.where(votes > 0.5, 5, 0)), (confidence, np.maximum(votes, 1 - votes))):
        np.testing.assert_allclose(line, np.broadcast_to(wanted[:, None, None], line.shape), atol=1e-6)


def test_a_scan_of_another_orientation_gets_the_same_labels():
    scan, images, labels = random_atlases()
    grid = np.diag([2.0, 2, 2, 1])
    there = fusion.fused(scan, images, labels, grid, on_grid(SHAPE, grid))
    affine = np.array([[0, 0, -2.0, 2 * (SHAPE[0] - 1)], [2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 1]])  # A, S, L
    turned = on_grid((SHAPE[1], SHAPE[2], SHAPE[0]), affine)
    for wanted, got in zip(there, fusion.fused(scan, images, labels, grid, turned), strict=True):
        np.testing.assert_allclose(nib.as_closest_canonical(nib.Nifti1Image(got, affine)).get_fdata(), wanted,
                                   atol=1e-5)
    assert canonical(turned).data.shape == SHAPE
