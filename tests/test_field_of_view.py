import nibabel
import numpy as np
import pytest

from drivenmorph_jax.images.field_of_view import beyond, cut_faces, resample_known
from drivenmorph_jax.images.volume import Volume

SHAPE = 40, 44, 36


def ball(place, affine=None):
    """A ball of radius 12 voxels at a place of the grid."""
    x = np.moveaxis(np.indices(SHAPE), 0, -1) - np.array(place)
    data = (np.linalg.norm(x, axis=-1) < 12).astype(np.float32)
    return Volume(data, np.eye(4) if affine is None else affine, None, "ball")


def test_only_a_face_with_much_tissue_is_cut():
    assert np.isinf(cut_faces(ball((20, 22, 18)))).all()
    assert np.isinf(cut_faces(ball((20, 22, 11.9)))).all()  # touches the face in a speck
    assert cut_faces(ball((20, 22, 5))).tolist() == [[-np.inf, -np.inf, 0], [np.inf] * 3]
    assert cut_faces(ball((36, 22, 5))).tolist() == [[-np.inf, -np.inf, 0], [39, np.inf, np.inf]]


def test_the_distance_beyond_a_cut_face():
    assert beyond(ball((20, 22, 18)), SHAPE, np.eye(4)) is None
    grid = np.diag([2.0, 2, 2, 1])
    grid[:3, 3] = -10
    found, unknown = beyond(ball((36, 22, 5)), (30, 30, 30), grid)
    x, _, z = np.indices((30, 30, 30)) * 2 - 10
    true = np.hypot(np.maximum(x - 39, 0), np.maximum(-z, 0))
    there = np.hypot(np.minimum(x, 39) - 36, 22 - (2 * np.indices((30, 30, 30))[1] - 10)) < 10  # the ball at the face
    np.testing.assert_allclose(found, true, atol=1e-5)
    assert unknown[there & (z < 0)].all() and not unknown[true == 0].any()
    assert not unknown[:7, :, 25:].any()  # background is cut nowhere
    rim, _ = beyond(ball((20, 22, 5)), SHAPE, np.eye(4), rim=2.0)
    np.testing.assert_allclose(rim[20, 22, :4], [2, 1, 0, 0])


def test_an_oblique_grid_is_known_inside_and_unknown_beyond():
    turn = np.eye(4)
    turn[:3, :3] = nibabel.eulerangles.euler2mat(0.5, 0.3, -0.2) * 1.5
    volume = ball((20, 22, 3), turn)
    grid = np.diag([2.0, 2, 2, 1])
    grid[:3, 3] = -60
    distance, unknown = beyond(volume, (60, 60, 60), grid)
    places = nibabel.affines.apply_affine(np.linalg.inv(turn) @ grid, np.moveaxis(np.indices((60, 60, 60)), 0, -1))
    there = np.linalg.norm(places[..., :2] - (20, 22), axis=-1) < 10
    np.testing.assert_allclose(distance, 1.5 * np.maximum(-places[..., 2], 0), atol=1e-3)
    assert (unknown | ~there | (places[..., 2] >= -1e-2)).all() and not unknown[places[..., 0] < -8].any()


def test_a_cut_image_repeats_its_face_beyond():
    volume = ball((20, 22, 0))
    grid = np.eye(4)
    grid[2, 3] = -6
    data, known = resample_known(volume, (40, 44, 42), grid)
    np.testing.assert_array_equal(data[..., 6:], volume.data)
    np.testing.assert_array_equal(data[..., :6], np.repeat(volume.data[..., :1], 6, -1))
    assert known[..., 6:].all() and not known[12:28, 14:30, :6].any() and known[0, 0].all()
    assert resample_known(ball((20, 22, 18)), (40, 44, 42), grid)[1] is None


@pytest.mark.parametrize("low", [True, False])
def test_a_transform_moves_the_face(low):
    shift = np.eye(4)
    shift[2, 3] = 3 if low else -3
    volume = ball((20, 22, 0 if low else 35))
    found, _ = beyond(volume, SHAPE, np.eye(4), shift)
    z = np.arange(SHAPE[2]) + shift[2, 3]
    np.testing.assert_allclose(found[20, 22], np.maximum(-z if low else z - 35, 0))
