import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from drivenmorph_jax.demons import forces
from drivenmorph_jax.demons.forces import clip_length, squash
from drivenmorph_jax.fields.grid import average_pool, difference

# As whole programs: by itself, every operation on a new shape is compiled, which takes ten times as long.
feature_force = jax.jit(forces.feature_force, static_argnames=("max_step", "floor"))
thirion_force = jax.jit(forces.thirion_force, static_argnames="max_step")
symmetric_force = jax.jit(forces.symmetric_force, static_argnames="max_step")
lncc_force = jax.jit(forces.lncc_force, static_argnames=("max_step", "radius", "block", "floor", "power"))
mind = jax.jit(forces.mind)

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
    np.testing.assert_allclose(feature_force(d, slope, step, w, floor), expected, atol=2e-5)


def test_what_a_gpu_computes_is_what_the_others_do_and_so_is_its_derivative(computed_on):
    d, slope, w = np.random.default_rng(1).normal(size=(3, *SHAPE, 5)).astype(np.float32)
    g = np.cos(gradients(d)[..., 0, :])
    arrays = d, slope, np.abs(w)
    text = computed_on("gpu", lambda d, slope, w: feature_force(d, slope, 1.5, w), arrays, g, 1e-4)
    assert "while" not in text and "scan" not in text


@pytest.mark.parametrize("space", [(5, 6), (4, 5, 6)])
def test_the_derivative_is_that_of_a_general_solver(space):
    rng, dims = np.random.default_rng(2), len(space)
    d, slope, w = rng.normal(size=(3, *space, 4)).astype(np.float32)
    g = rng.normal(size=(*space, dims)).astype(np.float32)

    def solved(d, slope, w, step, floor):
        jacobian = jnp.stack(jnp.gradient(slope, axis=tuple(range(dims))), -1)
        damping = (w * d**2).sum(-1) / (4 * step**2) + floor
        matrix = jnp.einsum("...k,...ki,...kj->...ij", w, jacobian, jacobian) + damping[..., None, None] * jnp.eye(dims)
        right = jnp.einsum("...k,...k,...ki->...i", w, d, jacobian)
        return jnp.linalg.solve(matrix, right[..., None])[..., 0]

    arguments = d, slope, np.abs(w), 1.5, 1e-2
    expected, found = (jax.jit(lambda arguments, of=of: jax.vjp(of, *arguments)[1](g))(arguments) for of in (
        solved, lambda d, slope, w, step, floor: forces.feature_force(d, slope, step, w, floor)))
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())


def test_one_channel_is_the_classical_esm_force():
    fixed, moving, step = normal(*SHAPE, 1), normal(*SHAPE, 1), 2.0
    gradient = gradients((fixed + moving) / 2)[..., 0, :]
    difference = fixed - moving
    expected = difference * gradient / ((gradient**2).sum(-1, keepdims=True) + difference**2 / (4 * step**2))
    got = feature_force(difference, (fixed + moving) / 2, step, floor=0.0)
    np.testing.assert_allclose(got, expected, atol=5e-4)
    gradient = gradients(fixed)[..., 0, :]
    expected = difference * gradient / ((gradient**2).sum(-1, keepdims=True) + difference**2 / (4 * step**2) + 1e-6)
    np.testing.assert_allclose(thirion_force(fixed, moving, step)[0], expected, atol=5e-4)


def test_a_single_gradient_loses_no_accuracy_where_images_nearly_agree():
    # lambda^2 is then far below the gradient squared: the adjugate's cancellation once made noise of this.
    x = normal(*SHAPE, 1, scale=0.1)
    gradient = gradients(x)[..., 0, :]
    for d in (1e-1, 1e-2, 1e-3):
        expected = d * gradient / ((gradient**2).sum(-1, keepdims=True) + d**2 / 16 + 1e-6)
        got, _ = symmetric_force(x + np.float32(d / 2), x - np.float32(d / 2), 2.0)
        np.testing.assert_allclose(got, expected, atol=1e-2 * np.abs(expected).max())


def test_the_force_moves_an_edge_the_right_way():
    x = np.arange(12, dtype=np.float32)[:, None, None, None] * np.ones((1, 6, 6, 1), np.float32)
    fixed, moving = x, x - 0.5  # M(x + u) = F(x) at u = .5
    p, _ = symmetric_force(fixed, moving, 5.0)
    np.testing.assert_allclose(p[3:-3, 2:-2, 2:-2], np.broadcast_to([0.5, 0, 0], p[3:-3, 2:-2, 2:-2].shape), atol=1e-2)


@pytest.mark.parametrize("channels", [1, 3, 8])
@pytest.mark.parametrize("step", [0.5, 2.0])
def test_no_input_makes_a_step_longer_than_the_bound(channels, step):
    for exponents in ((0, 0, 0), (6, 6, 0), (-6, 6, 3), (6, -6, -3), (-9, -9, -9), (3, 8, 3)):
        d, slope, w = (normal(*SHAPE, channels, scale=10.0**e) for e in exponents)
        p = np.asarray(feature_force(d, slope, step, np.abs(w)))
        assert np.isfinite(p).all()
        assert np.linalg.norm(p, axis=-1).max() <= step * (1 + 1e-5)


def test_the_bound_is_the_solves_own_and_reached():
    # d = 2 L |J| makes the damped step as long as it can be; no clipping acts.
    step, slope = 2.0, np.arange(12, dtype=np.float32)[:, None, None, None] * np.ones((1, 6, 6, 1), np.float32)
    p = feature_force(2 * step * np.ones_like(slope), slope, step, floor=0.0)
    np.testing.assert_allclose(p[..., 0], step, rtol=1e-5)


def test_flat_and_equal_images_give_no_force_and_finite_gradients():
    flat = np.ones((*SHAPE, 2), np.float32)

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1))
    def f(fixed, moving):
        p, _ = symmetric_force(fixed, moving, 2.0)
        return (p * p).sum() + p.sum()

    for fixed, moving in ((flat, flat), (flat, 0 * flat), (normal(*SHAPE, 2),) * 2):
        for x in jax.tree.leaves(f(fixed, moving)):
            assert np.isfinite(x).all()
    assert not np.any(symmetric_force(flat, flat, 2.0)[0])


@pytest.mark.parametrize("force", [thirion_force, symmetric_force, lncc_force])
@pytest.mark.parametrize("shape", [(8, 12), (6, 8, 10)])
def test_forces_under_jit_and_vmap_are_the_force_of_each(force, shape):
    fixed, moving = normal(2, *shape, 1), normal(2, *shape, 1)
    force = partial(force, max_step=2.0)
    p, energy = jax.jit(jax.vmap(force))(fixed, moving)
    for k in range(2):
        one, its_energy = force(fixed[k], moving[k])
        np.testing.assert_allclose(p[k], one, atol=1e-5)
        np.testing.assert_allclose(energy[k], its_energy, rtol=1e-4)
        assert one.shape[-1] == len(shape)
    g = jax.jit(jax.grad(lambda m: (force(fixed[0], m)[0] ** 2).sum()))(moving[0])
    assert np.isfinite(g).all() and np.abs(g).max() > 0


@pytest.mark.parametrize("channels", [1, 3])
def test_a_slice_repeated_has_the_force_of_the_slice(channels):
    fixed, moving = normal(8, 9, channels), normal(8, 9, channels)
    flat, _ = symmetric_force(fixed, moving, 2.0)
    thick, _ = symmetric_force(*(np.repeat(x[None], 4, 0) for x in (fixed, moving)), 2.0)
    np.testing.assert_allclose(thick[2, ..., 1:], flat, atol=1e-4)
    np.testing.assert_allclose(thick[..., 0], 0, atol=1e-5)


def test_a_channel_twice_is_the_channel_once():
    fixed, d = np.random.default_rng(3).normal(size=(2, *SHAPE, 1)).astype(np.float32)
    d += 0.1 * np.sign(d)  # without damping the matrix of one channel has no inverse
    once, twice = (feature_force(np.repeat(d, n, -1), np.repeat(fixed, n, -1), 2.0, floor=0.0)
                   for n in (1, 2))
    np.testing.assert_allclose(twice, once, atol=1e-3)


def local_correlation(fixed, warped, radius, floor):
    """Mean squared correlation over windows of (2 radius + 1)^n, by SciPy; zeros beyond the border."""
    def mean(x):
        return ndimage.uniform_filter(x, 2 * radius + 1, mode="constant")

    f, m = (x[..., 0].astype(np.float64) for x in (fixed, warped))
    fm = mean(f * m) - mean(f) * mean(m)
    return (fm**2 / ((mean(f * f) - mean(f) ** 2 + floor) * (mean(m * m) - mean(m) ** 2 + floor))).mean()


@pytest.mark.parametrize("shape", [(12, 14), (8, 10, 12)])
def test_lncc_force_is_the_gradient_of_the_local_correlation(shape):
    fixed, warped = np.abs(normal(*shape, 1, scale=0.3)), np.abs(normal(*shape, 1, scale=0.3))
    p, energy = lncc_force(fixed, warped, 1.5, radius=1, block=1, floor=1e-3, power=1.0)
    assert energy == pytest.approx(1 - local_correlation(fixed, warped, 1, 1e-3), abs=1e-4)
    # Finite differences of SciPy's correlation, times the image gradient: along the force to a common factor.
    slope = np.stack([np.gradient(warped[..., 0], axis=axis) for axis in range(len(shape))], -1)
    found, expected = [], []
    for index in itertools.product(*(range(1, n, 5) for n in shape)):
        up, down = warped.copy(), warped.copy()
        up[index], down[index] = up[index] + 1e-3, down[index] - 1e-3
        g = (local_correlation(fixed, up, 1, 1e-3) - local_correlation(fixed, down, 1, 1e-3)) / 2e-3
        expected.append(g * slope[index])
        found.append(p[index])
    found, expected = np.ravel(found), np.ravel(expected)
    factor = (found @ expected) / (expected @ expected)
    assert factor > 0
    np.testing.assert_allclose(found, factor * expected, atol=2e-3)


@pytest.mark.parametrize("channels", [1, 3])
def test_lncc_force_on_blocks_is_the_gradient_of_its_own_energy(channels):
    fixed, warped = (np.abs(normal(8, 8, 12, channels, scale=0.3)) for _ in range(2))
    p, _ = lncc_force(fixed, warped, 1.0, radius=1, block=2, power=1.0)

    @jax.jit
    def descent(fixed, warped):
        g = -jax.grad(lambda m: lncc_force(fixed, m, 1.0, radius=1, block=2)[1])(warped)
        return average_pool(jnp.stack([(g * difference(warped, axis)).sum(-1) for axis in range(3)], -1))

    expected = np.array(descent(fixed, warped))
    expected /= np.linalg.norm(expected, axis=-1).max()
    np.testing.assert_allclose(p, expected, atol=1e-4)
    p, _ = lncc_force(fixed, warped, 2.0, radius=1, block=2)
    length = np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(p, 2 * expected * length**-0.3, atol=5e-3)


def test_lncc_force_does_not_mind_gain_and_offset_and_is_bounded():
    fixed, warped = normal(8, 8, 8, 1), normal(8, 8, 8, 1)
    p, energy = lncc_force(fixed, warped, 1.5, floor=0.0)
    q, same = lncc_force(3 * fixed + 1, warped, 1.5, floor=0.0)
    assert float(same) == pytest.approx(float(energy), abs=1e-2)
    assert np.linalg.norm(p, axis=-1).max() == pytest.approx(1.5, rel=1e-4)
    flat = np.ones_like(fixed)
    for a, b in ((flat, flat), (0 * flat, flat), (fixed, flat)):
        p, energy = lncc_force(a, b, 1.5)
        assert np.isfinite(p).all() and np.isfinite(energy)


def test_mind_is_heinrichs_formula_and_blind_to_inversion():
    image = normal(9, 10, 11, 1)
    padded = np.pad(image[..., 0], 1, mode="edge")
    distances = []
    for axis in range(3):
        for step in (-1, 1):
            moved = np.roll(padded, -step, axis)[1:-1, 1:-1, 1:-1]
            distances.append(ndimage.uniform_filter((image[..., 0] - moved) ** 2, 3, mode="constant"))
    distances = np.stack(distances, -1)
    expected = np.exp(-distances / distances.mean(-1, keepdims=True))
    expected /= expected.max(-1, keepdims=True)
    np.testing.assert_allclose(mind(image), expected, atol=1e-4)
    np.testing.assert_allclose(mind(5 - image), mind(image), atol=1e-4)
    np.testing.assert_array_equal(mind(np.ones((6, 7, 1), np.float32)), np.ones((6, 7, 4)))


@pytest.mark.parametrize("length", [0.0, 1e-8, 0.5, 2.0, 1e6])
def test_clip_and_squash_keep_direction_and_bound(length):
    p = np.float32([[length * 0.6, 0, -length * 0.8]])
    clipped, squashed = clip_length(p, 2.0), squash(p, 2.0)
    np.testing.assert_allclose(np.linalg.norm(clipped), min(length, 2.0), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(squashed), length / np.sqrt(1 + length**2 / 4), rtol=1e-5)
