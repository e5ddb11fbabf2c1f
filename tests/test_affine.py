import nibabel
import numpy as np
import pytest
from nibabel.affines import apply_affine
from nilearn.datasets import load_mni152_template

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.images.intensity import foreground
from drivenmorph_jax.images.volume import Volume, resample
from drivenmorph_jax.transforms import affine


@pytest.fixture(scope="module")
def template():
    image = load_mni152_template(resolution=3)
    return Volume(np.ascontiguousarray(image.get_fdata(dtype=np.float32)), image.affine, image.header, "mni")


def moved(template, angles, shift, scales=(1.0, 1.0, 1.0)):
    """(moving, T) with moving(T x) = template(x), on a larger grid that holds all of it."""
    transform = np.eye(4)
    transform[:3, :3] = nibabel.eulerangles.euler2mat(*np.deg2rad(angles)) @ np.diag(scales)
    transform[0, 1] += 0.04
    transform[:3, 3] = shift
    shape = tuple(int(1.8 * n) for n in template.data.shape)
    grid = template.affine.copy()
    grid[:3, 3] = -grid[:3, :3] @ (np.array(shape) - 1) / 2
    data = resample(template, shape, grid, np.linalg.inv(transform))
    return Volume(data, grid, template.header, "moved"), transform


def error(template, found, true):
    """Mean distance in mm over the brain."""
    x = apply_affine(template.affine, np.argwhere(foreground(template.data)))
    return np.linalg.norm(apply_affine(found, x) - apply_affine(true, x), axis=1).mean()


@pytest.mark.parametrize("angles, shift, scales", [
    ((5, -8, 6), (5, -7, 3), (1.08, 0.95, 1.03)),
    ((30, 0, 0), (40, 0, 0), (1, 1, 1)),
    ((0, 30, 0), (20, -20, -28), (1, 1, 1)),
])
def test_a_known_affine_is_recovered(template, angles, shift, scales):
    moving, true = moved(template, angles, shift, scales)
    assert error(template, np.eye(4), true) > 5
    assert error(template, affine.register_affine(template, moving), true) < 1


def test_the_same_input_gives_the_same_affine_and_contrast_does_not_matter(template):
    moving, true = moved(template, (8, 0, -5), (-10, 4, 6))
    brain = moving.data > 0.1
    inverted = Volume(np.where(brain, 1.2 - moving.data, 0).astype(np.float32), moving.affine, None, "inverted")
    first, second = (affine.register_affine(template, inverted) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert error(template, first, true) < 1


def test_failure_names_both_files_and_the_remedy(template, monkeypatch):
    def fail(*_):
        raise RuntimeError("All samples map outside moving image buffer")

    monkeypatch.setattr(affine, "_optimise", fail)
    with pytest.raises(InputError, match="mni could not be aligned to mni .*--no-affine"):
        affine.register_affine(template, template)
