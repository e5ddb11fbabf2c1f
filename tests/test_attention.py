from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drivenmorph_jax.network.attention import CrossAttention, SelfAttention, neighbourhood_attention, window_attention

RNG = np.random.default_rng(0)


def heads_of(*shape):
    return jnp.asarray(RNG.normal(size=shape).astype(np.float32))


def brute_force(q, k, v, radius):
    """The definition, voxel by voxel: alpha = softmax q(x) . k(x + delta), keys and values repeated at the edge."""
    b, *space, heads, _ = q.shape
    attended, offset = np.zeros_like(v), np.zeros((b, *space, 3), np.float32)
    shifts = list(product(range(-radius, radius + 1), repeat=3))
    for n, *x, h in product(range(b), *map(range, space), range(heads)):
        near = [tuple(np.clip(np.add(x, d), 0, np.array(space) - 1)) for d in shifts]
        logits = np.array([q[(n, *x, h)] @ k[(n, *y, h)] for y in near])
        alpha = np.exp(logits - logits.max())
        alpha /= alpha.sum()
        attended[(n, *x, h)] = sum(a * v[(n, *y, h)] for a, y in zip(alpha, near, strict=True))
        offset[(n, *x)] += alpha @ np.array(shifts) / heads
    return attended, offset


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("radius, shape", [(1, (2, 4, 3, 5, 2, 3)), (2, (1, 4, 5, 4, 1, 4))])
def test_neighbourhood_attention_is_its_definition(compile_for, backend, radius, shape):
    compile_for(backend)
    q, k, v = heads_of(*shape), heads_of(*shape), heads_of(*shape[:-1], 2)
    attended, offset = jax.jit(neighbourhood_attention, static_argnums=3)(q, k, v, radius)
    expected, expected_offset = brute_force(*(np.asarray(x) for x in (q, k, v)), radius)
    np.testing.assert_allclose(attended, expected, atol=1e-5)
    np.testing.assert_allclose(offset, expected_offset, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
def test_a_softmax_at_any_temperature_and_in_any_type(compile_for, backend, dtype):
    compile_for(backend)

    @jax.jit  # once for all temperatures
    def attended_offset_gradients(q, k, v):
        (attended, offset), back = jax.vjp(lambda *x: neighbourhood_attention(*x, 1), q, k, v)
        return attended, offset, back((jnp.ones_like(attended), jnp.ones_like(offset)))

    # Keys opposed to the queries but for one voxel: below a bound that is the same for all, every weight would vanish.
    towards = heads_of(1, 4, 4, 4, 1, 8)
    towards /= jnp.linalg.norm(towards, axis=-1, keepdims=True)
    mean = towards.mean((1, 2, 3), keepdims=True)
    k = jnp.broadcast_to(-mean, towards.shape)
    k = (k / jnp.linalg.norm(k, axis=-1, keepdims=True)).at[0, 0, 0, 0].set(towards[0, 0, 0, 0]).astype(dtype)
    q, v = jnp.broadcast_to(mean / jnp.linalg.norm(mean), towards.shape), heads_of(1, 4, 4, 4, 1, 8).astype(dtype)
    for temperature in (1.0, 44.0, 50.0, 1000.0):
        arrays = (temperature * q).astype(dtype), k, v
        attended, offset, gradients = attended_offset_gradients(*arrays)
        expected, expected_offset = brute_force(*(np.asarray(x, np.float32) for x in arrays), 1)
        assert attended.dtype == dtype
        np.testing.assert_allclose(np.asarray(attended, np.float32), expected,
                                   atol=3e-2 if dtype == jnp.bfloat16 else 4e-3)
        np.testing.assert_allclose(offset, expected_offset, atol=2e-3)
        for x in gradients:
            assert np.isfinite(np.asarray(x, np.float32)).all()


@pytest.mark.parametrize("radius", [1, 2])
@pytest.mark.parametrize("backend", ["gpu", "tpu"])
def test_derivative_of_what_a_gpu_or_tpu_computes_is_that_of_the_others(computed_on, backend, radius):
    arrays = heads_of(2, 4, 3, 5, 2, 3), heads_of(2, 4, 3, 5, 2, 3), heads_of(2, 4, 3, 5, 2, 4)
    g = heads_of(2, 4, 3, 5, 2, 4), heads_of(2, 4, 3, 5, 3)
    text = computed_on(backend, lambda *arrays: neighbourhood_attention(*arrays, radius), arrays, g, 2e-5)
    assert backend == "tpu" or ("while" not in text and "scan" not in text)


def test_gradient_of_neighbourhood_attention_along_a_direction():
    arrays = tuple(heads_of(1, 4, 4, 4, 2, 3) for _ in range(3))
    direction = tuple(heads_of(1, 4, 4, 4, 2, 3) for _ in range(3))
    weight = heads_of(1, 4, 4, 4, 2, 3)

    @jax.jit
    def f(arrays):
        attended, offset = neighbourhood_attention(*arrays, 1)
        return (attended * weight).sum() + (offset**2).sum()

    def moved(t):
        return f(jax.tree.map(lambda x, d: x + t * d, arrays, direction))

    slope = sum(np.vdot(g, d) for g, d in zip(jax.jit(jax.grad(f))(arrays), direction, strict=True))
    assert float(slope) == pytest.approx(float((moved(1e-2) - moved(-1e-2)) / 2e-2), rel=1e-2)


@pytest.mark.parametrize("space", [(4, 4, 4), (5, 3, 6)])
def test_window_attention_is_dense_attention_in_each_window(space):
    window = 2
    q, k, v = (heads_of(1, *space, 2, 3) for _ in range(3))
    out = np.asarray(jax.jit(window_attention, static_argnums=3)(q, k, v, window))
    for corner in product(*(range(0, n, window) for n in space)):
        part = (0, *(slice(c, c + window) for c in corner))
        a, b, c = (np.asarray(x[part]).reshape(-1, 2, 3) for x in (q, k, v))
        alpha = np.exp(np.einsum("qhc,khc->hqk", a, b))
        alpha /= alpha.sum(-1, keepdims=True)
        np.testing.assert_allclose(out[part].reshape(-1, 2, 3), np.einsum("hqk,khc->qhc", alpha, c), atol=1e-5)


def test_cross_attention_finds_where_the_moving_image_has_it():
    fixed = heads_of(1, 8, 8, 8, 16)
    moving = jnp.roll(fixed, 1, axis=2)  # what is at x lies at x + (0, 1, 0)
    module = CrossAttention(radius=1, heads=1)
    (attended, offset), _ = jax.jit(module.init_with_output)(jax.random.key(0), fixed, moving)
    np.testing.assert_allclose(offset[0, 2:-2, 2:-2, 2:-2].mean((0, 1, 2)), [0, 1, 0], atol=0.1)
    error = lambda x: float(((x - fixed)[:, 2:-2, 2:-2, 2:-2] ** 2).mean())  # noqa: E731
    assert error(attended) < 0.1 * error(moving)


def test_equal_features_have_no_offset():
    x = heads_of(1, 6, 6, 6, 8)
    module = CrossAttention(radius=1, heads=2)
    (_, offset), _ = jax.jit(module.init_with_output)(jax.random.key(0), x, x)
    assert np.abs(np.asarray(offset).mean((0, 1, 2, 3))).max() < 0.05


@pytest.mark.parametrize("kind", [{"radius": 1}, {"window": 3}])
def test_self_attention_in_bfloat16_is_near_float32(kind):
    tokens = heads_of(1, 6, 6, 6, 8)
    module = SelfAttention(heads=2, **kind)
    exact, params = jax.jit(module.init_with_output)(jax.random.key(0), tokens)
    near = jax.jit(SelfAttention(heads=2, dtype=jnp.bfloat16, **kind).apply)(params, tokens)
    assert exact.shape == tokens.shape
    assert float(jnp.abs(near.astype(jnp.float32) - exact).max()) < 0.1 * float(jnp.abs(exact).max())
