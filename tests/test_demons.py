from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage
from test_warp import smooth_field

from drivenmorph_jax import demons
from drivenmorph_jax.integrate import exponential
from drivenmorph_jax.jacobian import jacobian_determinant
from drivenmorph_jax.warp import compose, warp

RNG = np.random.default_rng(0)
SHAPE = (6, 7, 8)


def normal(*shape, scale=1.0):
    return RNG.normal(size=shape, scale=scale).astype(np.float32)


def gradients(x):
    return np.stack([np.gradient(x, axis=axis) for axis in range(3)], axis=-1)  # (D, H, W, C, 3)


@pytest.mark.parametrize("floor", [0.0, 1e-2])
def test_force_is_the_damped_gauss_newton_step(floor):
    d, slope, w, step = normal(*SHAPE, 5), normal(*SHAPE, 5), np.abs(normal(*SHAPE, 5)), 1.5
    jacobian = gradients(slope)
    damping = (w * d**2).sum(-1) / (4 * step**2) + floor
    matrix = np.einsum("...k,...ki,...kj->...ij", w, jacobian, jacobian) + damping[..., None, None] * np.eye(3)
    right = np.einsum("...k,...k,...ki->...i", w, d, jacobian)
    expected = np.linalg.solve(matrix, right[..., None])[..., 0]
    np.testing.assert_allclose(demons.feature_force(d, slope, step, w, floor), expected, atol=2e-5)


def test_one_channel_is_the_classical_esm_force():
    fixed, moving, step = normal(*SHAPE, 1), normal(*SHAPE, 1), 2.0
    gradient = gradients((fixed + moving) / 2)[..., 0, :]
    difference = fixed - moving
    expected = difference * gradient / ((gradient**2).sum(-1, keepdims=True) + difference**2 / (4 * step**2))
    np.testing.assert_allclose(demons.symmetric_force(fixed, moving, step, floor=0.0), expected, atol=5e-4)
    gradient = gradients(fixed)[..., 0, :]
    expected = difference * gradient / ((gradient**2).sum(-1, keepdims=True) + difference**2 / (4 * step**2) + 1e-6)
    np.testing.assert_allclose(demons.thirion_force(fixed, moving, step), expected, atol=5e-4)


def test_a_single_gradient_loses_no_accuracy_where_images_nearly_agree():
    # lambda^2 is then far below the gradient squared: the adjugate's cancellation once made noise of this.
    x = normal(*SHAPE, 1, scale=0.1)
    gradient = gradients(x)[..., 0, :]
    for d in (1e-1, 1e-2, 1e-3):
        expected = d * gradient / ((gradient**2).sum(-1, keepdims=True) + d**2 / 16 + 1e-6)
        got = demons.symmetric_force(x + np.float32(d / 2), x - np.float32(d / 2), 2.0)
        np.testing.assert_allclose(got, expected, atol=1e-2 * np.abs(expected).max())


def test_the_force_moves_an_edge_the_right_way():
    x = np.arange(12, dtype=np.float32)[:, None, None, None] * np.ones((1, 6, 6, 1), np.float32)
    fixed, moving = x, x - 0.5  # M(x + u) = F(x) at u = .5
    p = demons.symmetric_force(fixed, moving, 5.0)
    np.testing.assert_allclose(p[3:-3, 2:-2, 2:-2], np.broadcast_to([0.5, 0, 0], p[3:-3, 2:-2, 2:-2].shape), atol=1e-2)


@pytest.mark.parametrize("channels", [1, 3, 8])
@pytest.mark.parametrize("step", [0.5, 2.0])
def test_no_input_makes_a_step_longer_than_the_bound(channels, step):
    for exponents in ((0, 0, 0), (6, 6, 0), (-6, 6, 3), (6, -6, -3), (-9, -9, -9), (3, 8, 3)):
        d, slope, w = (normal(*SHAPE, channels, scale=10.0**e) for e in exponents)
        p = np.asarray(demons.feature_force(d, slope, step, np.abs(w)))
        assert np.isfinite(p).all()
        assert np.linalg.norm(p, axis=-1).max() <= step * (1 + 1e-5)


def test_the_bound_is_the_solves_own_and_reached():
    # d = 2 L |J| makes the damped step as long as it can be; no clipping acts.
    step, slope = 2.0, np.arange(12, dtype=np.float32)[:, None, None, None] * np.ones((1, 6, 6, 1), np.float32)
    p = demons.feature_force(2 * step * np.ones_like(slope), slope, step, floor=0.0)
    np.testing.assert_allclose(p[..., 0], step, rtol=1e-5)


def test_flat_and_equal_images_give_no_force_and_finite_gradients():
    flat = np.ones((*SHAPE, 2), np.float32)

    def f(fixed, moving):
        p = demons.symmetric_force(fixed, moving, 2.0)
        return (p * p).sum() + p.sum()

    for fixed, moving in ((flat, flat), (flat, 0 * flat), (normal(*SHAPE, 2),) * 2):
        assert np.isfinite(f(fixed, moving))
        for g in jax.grad(f, argnums=(0, 1))(fixed, moving):
            assert np.isfinite(g).all()
    assert not np.any(demons.symmetric_force(flat, flat, 2.0))


def test_force_under_vmap_is_the_force_of_each():
    fixed, moving = normal(2, *SHAPE, 3), normal(2, *SHAPE, 3)
    force = partial(demons.symmetric_force, max_step=2.0)
    np.testing.assert_allclose(jax.vmap(force)(fixed, moving), force(fixed, moving), atol=1e-6)
    np.testing.assert_allclose(force(fixed, moving)[1], force(fixed[1], moving[1]), atol=1e-6)


@pytest.mark.parametrize("length", [0.0, 1e-8, 0.5, 2.0, 1e6])
def test_clip_and_squash_keep_direction_and_bound(length):
    p = np.float32([[length * 0.6, 0, -length * 0.8]])
    clipped, squashed = demons.clip_length(p, 2.0), demons.squash(p, 2.0)
    np.testing.assert_allclose(np.linalg.norm(clipped), min(length, 2.0), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(squashed), length / np.sqrt(1 + length**2 / 4), rtol=1e-5)


@pytest.mark.parametrize("sigma", [0.0, 0.7, 1.5])
def test_smoothing_is_scipys_inside(sigma):
    x = normal(24, 24, 24, 2)
    expected = ndimage.gaussian_filter(x, (sigma, sigma, sigma, 0), truncate=8)
    inside = (slice(8, -8),) * 3
    np.testing.assert_allclose(demons.gaussian_smooth(x, sigma)[inside], expected[inside], atol=1e-4)


def test_smoothing_takes_weighted_means():
    x = normal(9, 10, 11, 3, scale=5)
    x /= np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1)
    np.testing.assert_allclose(demons.gaussian_smooth(np.ones_like(x), 2.0), 1, atol=1e-5)
    assert np.linalg.norm(demons.gaussian_smooth(x, 0.5), axis=-1).max() <= 1 + 1e-5


def test_bracket_of_linear_fields_is_the_commutator():
    x = np.moveaxis(np.indices((6, 6, 6)), 0, -1) - 2.5
    a, b = RNG.normal(size=(2, 3, 3))
    v, u = (x @ a.T).astype(np.float32), (x @ b.T).astype(np.float32)
    # Dv u - Du v = A B x - B A x
    np.testing.assert_allclose(demons.lie_bracket(v, u), x @ (a @ b - b @ a).T, atol=1e-4)


def test_bch_approximates_the_composition_and_its_sign_is_right():
    shape, inside = (28, 28, 28), (slice(6, -6),) * 3
    v, u = smooth_field(shape, 3.0, 1), smooth_field(shape, 3.0, 2)
    true = compose(exponential(v), exponential(u))  # exp(v) o exp(u)

    def error(z):
        return np.linalg.norm(exponential(z) - true, axis=-1)[inside].mean()

    assert error(demons.bch(v, u)) < 0.5 * error(v + u)
    assert error(demons.bch(v, u)) < 0.25 * error(demons.bch(u, v))  # the other order is the other sign


def test_updates_come_with_their_inverse():
    shape = (20, 20, 20)
    u = u_inverse = np.zeros((*shape, 3), np.float32)
    for seed in range(3):
        delta = smooth_field(shape, 1.5, seed)
        u, u_inverse = demons.compositional_update(u, delta), demons.inverse_update(u_inverse, delta)
    error = np.linalg.norm(compose(u, u_inverse), axis=-1)[4:-4, 4:-4, 4:-4]
    assert np.linalg.norm(u, axis=-1).max() > 2 and error.mean() < 0.03


def pair(shape=(32, 40, 36), largest=4.0):
    """A blobby image, and it seen through a known diffeomorphism: fixed = moving o phi."""
    texture = ndimage.gaussian_filter(np.random.default_rng(5).normal(size=shape), 2)
    x = np.moveaxis(np.indices(shape), 0, -1)
    ball = 1 / (1 + np.exp((np.linalg.norm((x - np.array(shape) / 2) / np.array(shape), axis=-1) - 0.35) * 40))
    moving = (ball * (0.6 + 0.2 * texture / texture.std())).astype(np.float32)[..., None]
    u = np.asarray(exponential(ndimage.gaussian_filter(smooth_field(shape, 1.0, 3), (2, 2, 2, 0)) * largest * 1.5))
    return np.asarray(warp(moving, u)), moving, u, ball > 0.5


@pytest.mark.parametrize("force", [demons.thirion_force, demons.symmetric_force])
@pytest.mark.parametrize("update", ["compositional", "log"])
def test_demons_finds_a_known_deformation(force, update):
    fixed, moving, true, brain = pair()
    field = demons.demons(fixed, moving, force=force, iterations=(40, 30, 20), update=update)
    u = np.asarray(exponential(field) if update == "log" else field)
    before, after = ((x - true)[brain] for x in (0 * u, u))
    assert np.linalg.norm(after, axis=-1).mean() < 0.5 * np.linalg.norm(before, axis=-1).mean()
    assert ((warp(moving, u) - fixed) ** 2).mean() < 0.1 * ((moving - fixed) ** 2).mean()
    assert np.asarray(jacobian_determinant(u))[brain].min() > 0


def test_demons_goes_on_from_an_initial_field():
    fixed, moving, true, _ = pair()
    u = demons.demons(fixed, moving, iterations=(5,), initial=jnp.asarray(true))
    assert ((warp(moving, u) - fixed) ** 2).mean() < 0.05 * ((moving - fixed) ** 2).mean()


def test_a_channel_twice_is_the_channel_once():
    fixed, moving, _, _ = pair()
    once = demons.symmetric_force(fixed, moving, 2.0, floor=0.0)
    twice = demons.symmetric_force(np.repeat(fixed, 2, -1), np.repeat(moving, 2, -1), 2.0, floor=0.0)
    np.testing.assert_allclose(twice, once, atol=1e-4)
