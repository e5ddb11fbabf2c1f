import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from drivenmorph_jax.fields import grid

RNG = np.random.default_rng(0)


def test_identity_grid_holds_coordinates():
    x = grid.identity_grid((3, 4, 5))
    assert x.shape == (3, 4, 5, 3) and x.dtype == jnp.float32
    np.testing.assert_array_equal(x[2, 1, 4], [2, 1, 4])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_adjoint_of_the_difference_is_its_transpose(axis):
    x, y = np.random.default_rng(0).normal(size=(2, 4, 5, 6, 2)).astype(np.float32)
    adjoint = grid.difference_adjoint(y, axis)
    np.testing.assert_allclose((x * adjoint).sum(), (np.gradient(x, axis=axis) * y).sum(), rtol=1e-4)
    # Where y is one at a voxel, its derivative's weights.
    unit = np.zeros((4, 5, 6, 2), np.float32)
    unit[0, 2, 5, 1] = 1
    matrix = np.gradient(np.eye(unit.shape[axis], dtype=np.float32), axis=0)
    expected = np.zeros_like(unit)
    expected[tuple(slice(None) if k == axis else n for k, n in enumerate((0, 2, 5, 1)))] = matrix[(0, 2, 5)[axis]]
    np.testing.assert_allclose(grid.difference_adjoint(unit, axis), expected)


def test_difference_is_numpy_gradient():
    x = RNG.normal(size=(5, 6, 7, 2)).astype(np.float32)
    for axis in range(3):
        np.testing.assert_allclose(grid.difference(x, axis), np.gradient(x, axis=axis), atol=1e-6)


def test_average_pool_is_the_mean_of_blocks():
    x = RNG.normal(size=(2, 4, 6, 8, 3)).astype(np.float32)
    out = grid.average_pool(x, 2)
    np.testing.assert_allclose(out[1, 1, 2, 3], x[1, 2:4, 4:6, 6:8].mean((0, 1, 2)), atol=1e-6)
    with pytest.raises(ValueError, match="multiples"):
        grid.average_pool(x, 4)


@pytest.mark.parametrize("shape", [(16, 24, 8), (4, 6, 2), (12, 12, 12)])
def test_a_resized_field_is_the_same_motion_in_millimetres(shape):
    # u = A x about the box, linear: fine and coarse coordinates obey f + 1/2 = r (c + 1/2)
    old = (8, 12, 4)
    matrix = RNG.normal(size=(3, 3)) * 0.1
    ratio = np.array(shape) / old

    def field(shape, scale):  # of physical coordinates y = scale^-1 (x + 1/2), in voxels of the grid
        y = (np.moveaxis(np.indices(shape), 0, -1) + 0.5) / scale
        return ((y @ matrix.T) * scale).astype(np.float32)

    out = np.asarray(grid.resize_field(field(old, np.ones(3)), shape))
    inside = tuple(slice(int(np.ceil(r)), n - int(np.ceil(r))) for r, n in zip(ratio, shape, strict=True))
    np.testing.assert_allclose(out[inside], field(shape, ratio)[inside], atol=1e-5)


@pytest.mark.parametrize("coarse, fine", [((5, 6, 4), (10, 12, 8)), ((5, 6), (20, 24)), ((7, 15, 6), (17, 31, 13))])
def test_coarsening_gives_back_what_was_refined_and_else_what_is_nearest(coarse, fine):
    field = RNG.normal(size=(2, *coarse, len(coarse))).astype(np.float32)
    np.testing.assert_allclose(grid.coarsen_field(grid.resize_field(field, fine), coarse), field, atol=1e-5)

    def rest(field):
        return ((grid.resize_field(field, fine) - u) ** 2).sum()

    u = RNG.normal(size=(2, *fine, len(fine))).astype(np.float32)
    np.testing.assert_allclose(jax.grad(rest)(grid.coarsen_field(u, coarse)), 0, atol=1e-4)


def test_along_axes_filters_each_axis():
    x = RNG.normal(size=(2, 6, 7, 8, 3)).astype(np.float32)
    kernel = np.array([0.25, 0.5, 0.25])
    matrices = [sum(k * np.eye(n, k=i - 1) for i, k in enumerate(kernel)) for n in x.shape[1:4]]
    expected = x
    for axis in (1, 2, 3):
        expected = ndimage.convolve1d(expected, kernel, axis, mode="constant")
    np.testing.assert_allclose(grid.along_axes([jnp.asarray(m) for m in matrices], x), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(5,), (4, 7), (3, 4, 5)])
def test_doubling_is_jaxs_linear_resize_in_any_number_of_dimensions(shape):
    x = RNG.normal(size=(2, *shape, 3)).astype(np.float32)
    double = tuple(2 * n for n in shape)
    expected = jax.image.resize(x, (2, *double, 3), "linear")
    np.testing.assert_allclose(grid.resize(x, double), expected, atol=1e-5)


def test_planes_are_pooled_and_differentiated_as_volumes_are():
    x = RNG.normal(size=(6, 8, 2)).astype(np.float32)
    np.testing.assert_allclose(grid.average_pool(x, 2, dims=2)[1, 3], x[2:4, 6:8].mean((0, 1)), atol=1e-6)
    np.testing.assert_allclose(grid.difference(x, 1, dims=2), np.gradient(x, axis=1), atol=1e-6)
    assert grid.resize_field(jnp.ones((6, 8, 2)), (12, 4)).shape == (12, 4, 2)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_box_sums_are_scipys(axis):
    x = np.random.default_rng(0).random((7, 9, 8)).astype(np.float32)
    expected = 5 * ndimage.uniform_filter1d(x, 5, axis, mode="constant")
    np.testing.assert_allclose(grid.box_sum(x, 2, [axis]), expected, atol=1e-5)
