"""A result in a notebook: the state of its widget, which is all that a notebook sends to the browser."""

import sys

import nibabel as nib
import numpy as np
import pytest
from test_view import AFFINE, SHAPE

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.evaluation import notebook

X = np.moveaxis(np.indices(SHAPE), 0, -1)
BRAIN = np.linalg.norm(X - np.array(SHAPE) / 2, axis=-1) < 13
IMAGE = np.where(BRAIN, 100 + 20 * np.sin(X).sum(-1), 0).astype(np.float32)
MAPS = {"force": lambda: np.broadcast_to(np.float32([0, 3, 4]), (*SHAPE, 3)),
        "jacobian": lambda: np.full(SHAPE, 2.0, np.float32), "labels": lambda: np.where(BRAIN & (X[..., 0] > 15), 7, 0)}


@pytest.fixture(scope="module")
def shown():
    """(choice of the map, the three widgets of NiiVue, their text)."""
    pytest.importorskip("ipywidgets", reason="needs the package ipyniivue with what it requires")
    found = notebook.widget({"fixed": IMAGE, "warped": 2 * IMAGE, "moving": 3 * IMAGE}, MAPS, AFFINE)
    choice, panels, words = found.children
    return choice, [panel.children[1] for panel in panels.children], words


def voxels(volume):
    image = nib.Nifti1Image.from_bytes(volume.data)
    return image.get_fdata(), image.affine


def test_three_panels_with_one_crosshair(shown):
    _, views, _ = shown
    for times, view in enumerate(views, 1):
        x, affine = voxels(view.volumes[0])
        place = np.rint(np.linalg.solve(AFFINE, affine[:, 3])[:3]).astype(int)  # of the box
        part = tuple(slice(a, a + n) for a, n in zip(place, x.shape, strict=True))
        np.testing.assert_allclose(x, times * IMAGE[part], atol=0.01 * times)
        assert np.count_nonzero(IMAGE[part]) == np.count_nonzero(IMAGE)
        assert view.volumes[0].cal_max > view.volumes[0].cal_min
        assert view.other_nv == [other for other in views if other is not view] and view.sync_opts["crosshair"]


def test_a_map_lies_over_the_fixed_and_the_warped_image(shown):
    choice, views, words = shown
    assert [value for _, value in choice.options] == ["", *MAPS]
    for name, wanted, high in (("force", 5, 10), ("jacobian", 1, 2), ("labels", 1, 1)):
        choice.value = name
        assert [len(view.volumes) for view in views] == [2, 2, 1]
        one = views[1].volumes[1]
        assert voxels(one)[0].max() == pytest.approx(wanted, rel=1e-4) and 0 < one.cal_min < one.cal_max == high
        assert bool(one.colormap_negative) == (name == "jacobian")
        assert ("mm" in words.value) == (name == "force")
    choice.value = ""
    assert [len(view.volumes) for view in views] == [1, 1, 1] and words.value == ""


def test_without_the_package_one_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipyniivue", None)
    with pytest.raises(InputError, match="pip install ipyniivue=="):
        notebook.widget({"fixed": IMAGE}, {}, AFFINE)
