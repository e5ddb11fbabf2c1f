import numpy as np
import pytest

from drivenmorph_jax.evaluation import metrics
from drivenmorph_jax.fields.jacobian import jacobian_determinant

X = np.moveaxis(np.indices((12, 14, 16)), 0, -1).astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
def test_linear_map_has_its_determinant_everywhere(seed):
    matrix = np.random.default_rng(seed).normal(0, 0.5, (3, 3))
    out = jacobian_determinant((X @ matrix.T).astype(np.float32))
    assert out.shape == X.shape[:3]
    np.testing.assert_allclose(out, np.linalg.det(np.eye(3) + matrix), atol=1e-4)


def test_linear_map_of_the_plane():
    matrix = np.array([[0.2, -0.7], [0.4, 0.1]])
    out = jacobian_determinant((X[:, :, 0, :2] @ matrix.T).astype(np.float32))
    np.testing.assert_allclose(out, np.linalg.det(np.eye(2) + matrix), atol=1e-4)


def test_closed_form_of_a_curved_field():
    # phi = (x + .01 x^2, y + .1 sin(.5 z), z): det = 1 + .02 x, and central differences are exact on parabolas
    u = np.stack([0.01 * X[..., 0] ** 2, 0.1 * np.sin(0.5 * X[..., 2]), 0 * X[..., 0]], -1)
    np.testing.assert_allclose(jacobian_determinant(u)[1:-1], (1 + 0.02 * X[..., 0])[1:-1], atol=1e-5)


def test_a_reflection_folds():
    assert (np.asarray(jacobian_determinant(X * np.float32([-2, 0, 0]))) < 0).all()


def test_agrees_with_the_metric_inside():
    u = np.random.default_rng(0).normal(0, 0.2, (2, 10, 11, 12, 3)).astype(np.float32)
    np.testing.assert_allclose(jacobian_determinant(u)[1][2:-2, 2:-2, 2:-2], metrics.jacobian(u[1]), atol=1e-5)
