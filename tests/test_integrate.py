import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm
from test_warp import smooth_field

from drivenmorph_jax.fields.integrate import exponential
from drivenmorph_jax.fields.inverse import inverse
from drivenmorph_jax.fields.warp import compose, warp

SHAPE = (24, 24, 24)
INSIDE = (slice(8, -8),) * 3
X = np.moveaxis(np.indices(SHAPE), 0, -1) - 11.5


def test_constant_velocity_is_a_translation():
    v = np.broadcast_to(np.float32([1.5, -2, 0.25]), (*SHAPE, 3))
    np.testing.assert_allclose(exponential(v), v, atol=1e-6)


@pytest.mark.parametrize("matrix", [
    np.array([[0, -0.3, 0], [0.3, 0, 0], [0, 0, 0]]), np.diag([0.2, -0.1, 0.05]),
    np.array([[0.1, 0.2, 0], [-0.1, 0, 0.1], [0, 0.1, -0.1]])], ids=["rotation", "stretch", "general"])
def test_linear_velocity_is_the_matrix_exponential_to_first_order_in_the_step(matrix):
    v = (X @ matrix.T).astype(np.float32)
    expected = X @ (expm(matrix) - np.eye(3)).T
    errors = [np.abs(np.asarray(exponential(v, steps)) - expected)[INSIDE].max() for steps in (3, 4, 5, 6)]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert 1.8 < coarse / fine < 2.2  # one squaring more halves the first step


def test_exponential_of_minus_v_is_the_inverse():
    v = smooth_field(SHAPE, 3.0)
    round_trip = np.linalg.norm(compose(exponential(v), exponential(-v)), axis=-1)[INSIDE]
    assert round_trip.mean() < 0.02 and np.linalg.norm(v, axis=-1)[INSIDE].mean() > 0.5


def test_flow_property():
    v = smooth_field(SHAPE, 2.0)
    half = exponential(v / 2, 6)
    np.testing.assert_allclose(compose(half, half), exponential(v, 7), atol=1e-5)


def test_inverse_undoes_a_field():
    u = smooth_field(SHAPE, 2.0)
    for error in (compose(u, inverse(u)), compose(inverse(u), u)):
        assert np.linalg.norm(error, axis=-1)[INSIDE].max() < 0.05


def test_gradient_of_the_exponential_along_a_direction():
    v, direction = smooth_field(SHAPE, 2.0), smooth_field(SHAPE, 1.0, 1)
    weight = smooth_field(SHAPE, 1.0, 2)

    def f(v):
        return (exponential(v, 4) * weight).sum()

    numeric = (f(v + 1e-2 * direction) - f(v - 1e-2 * direction)) / 2e-2
    assert float(jnp.vdot(jax.grad(f)(v), direction)) == pytest.approx(float(numeric), rel=0.02)


def test_batches_are_independent():
    v = np.stack([smooth_field(SHAPE, 2.0), smooth_field(SHAPE, 1.0, 1)])
    np.testing.assert_allclose(exponential(v)[1], exponential(v[1]), atol=1e-6)


@pytest.mark.parametrize("function", [lambda u: warp(u, u), exponential, inverse])
def test_a_second_call_compiles_nothing(function, caplog):
    # A loop outside a compiled function is compiled at every call, and what was compiled is kept: memory grew.
    u = jnp.full((5, 6, 7, 3), 0.3)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        function(u)
        assert "ompil" in caplog.text
        caplog.clear()
        function(u)
    assert "Compiling" not in caplog.text and "Finished XLA compilation" not in caplog.text
