from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from ml_collections import ConfigDict
from test_model import ONE_LEVEL, SHAPE, images, made
from test_warp import smooth_field

from configs.smoke import get_config
from drivenmorph_jax.fields.integrate import exponential
from drivenmorph_jax.fields.warp import compose
from drivenmorph_jax.network import losses

RNG = np.random.default_rng(0)


def brute_lncc(a, b, window):
    r, out = window // 2, np.zeros(a.shape)
    for x in np.ndindex(a.shape):
        box = tuple(slice(max(i - r, 0), i + r + 1) for i in x)
        p, q = a[box].astype(np.float64), b[box].astype(np.float64)
        out[x] = np.cov(p.ravel(), q.ravel(), bias=True)[0, 1] ** 2 / (p.var() * q.var() + 1e-7)
    return out.mean()


@pytest.mark.parametrize("window", [3, 5])
def test_lncc_is_the_squared_correlation_in_each_box(window):
    a, b = RNG.random((2, 6, 7, 8)).astype(np.float32)
    got = losses.lncc(a[None, ..., None], b[None, ..., None], window)
    assert float(got) == pytest.approx(brute_lncc(a, b, window), abs=1e-4)


def test_lncc_does_not_see_gain_and_offset_and_has_a_maximum_of_one():
    a, b = RNG.random((2, 1, 8, 8, 8, 1)).astype(np.float32)  # no box is flat
    assert float(losses.lncc(a, a, 5)) == pytest.approx(1, abs=1e-3)
    assert float(losses.lncc(a, 1 - 0.5 * a, 5)) == pytest.approx(1, abs=1e-3)
    assert float(losses.lncc(a, b, 5)) < 0.1


IMAGES = arrays(np.float32, (1, 5, 5, 5, 1), elements=st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, 1.0]),
                fill=st.floats(-1e6, 1e6, width=32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", losses.SIMILARITIES)
def test_no_image_gives_a_loss_or_a_gradient_that_is_not_finite(kind, dtype):
    @jax.jit
    def both(a, b):
        return jax.value_and_grad(lambda a, b: losses.dissimilarity(a.astype(dtype), b.astype(dtype), kind, 3).astype(
            jnp.float32), argnums=(0, 1))(a, b)

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(IMAGES, IMAGES)
    def holds(a, b):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(both(a, b)))
        value = float(both(a, b)[0])
        assert -1e-3 <= value and (kind == "mse" or value <= 1.001)

    holds()


@pytest.mark.parametrize("value", [0, 1, 65536, 148471, 1e6 / 3])
def test_a_flat_image_correlates_with_none_however_large_its_value(value):
    flat, noise = jnp.full(SHAPE, value, jnp.float32), images()[0]
    assert float(losses.lncc(flat, noise, 5)) == float(losses.lncc(flat, 2.0 * flat + 1, 5)) == 0


def test_flat_images_give_finite_numbers_and_gradients():
    flat = jnp.ones(SHAPE)
    for a, b in ((flat, flat), (0 * flat, flat), (images()[0], flat)):
        value, g = jax.value_and_grad(losses.lncc)(a, b, 5)
        assert np.isfinite(value) and np.isfinite(g).all()


def test_smoothness_of_a_linear_velocity_is_its_squared_gradient():
    matrix = RNG.normal(size=(3, 3))
    v = (np.moveaxis(np.indices((6, 7, 8)), 0, -1) @ matrix.T).astype(np.float32)[None]
    assert float(losses.smoothness(v)) == pytest.approx((matrix**2).sum(), rel=1e-4)


def test_soft_dice_of_sharp_maps_is_one_minus_dice():
    a, b = RNG.integers(0, 4, (2, 1, 6, 6, 6))
    one_hot = [(x[..., None] == np.arange(4)).astype(np.float32) for x in (a, b)]
    dice = np.mean([2 * ((a == k) & (b == k)).sum() / ((a == k).sum() + (b == k).sum()) for k in range(4)])
    assert float(losses.soft_dice(*one_hot)) == pytest.approx(1 - dice, abs=1e-5)


def test_what_remains_is_what_comes_after():
    shape = (20, 20, 20)
    before, after = smooth_field(shape, 2.0, 1), smooth_field(shape, 2.0, 2)
    u_before, u_after = exponential(before), exponential(after)
    total = compose(u_before, u_after)  # phi_before o phi_after
    got = losses.remaining_displacement(exponential(-before), total)
    assert np.abs(got - u_after)[4:-4, 4:-4, 4:-4].mean() < 0.03


def test_alignment_is_one_minus_the_cosine_where_something_remains():
    remaining = smooth_field((8, 8, 8), 4.0)
    length = np.linalg.norm(remaining, axis=-1, keepdims=True)
    assert float(losses.force_alignment(50 * remaining / length, remaining)) == pytest.approx(0, abs=1e-3)
    assert float(losses.force_alignment(-50 * remaining / length, remaining)) == pytest.approx(2, abs=1e-2)
    assert float(losses.force_alignment(0 * remaining, remaining)) == pytest.approx(1, abs=1e-2)
    turned = np.cross(remaining, [1.0, 0, 0])
    assert float(losses.force_alignment(turned, remaining)) == pytest.approx(1, abs=1e-2)


def test_supervision_teaches_the_force_and_not_the_target():
    force, remaining = smooth_field((8, 8, 8), 1.0, 1), smooth_field((8, 8, 8), 4.0, 2)
    to_force, to_target = jax.grad(losses.force_alignment, argnums=(0, 1))(force, remaining)
    assert np.any(to_force) and not np.any(to_target)


@pytest.mark.parametrize("similarity", ["lncc", "mse"])
def test_every_part_of_the_loss_counts_and_its_gradient_is_right(similarity):
    # In float64: rounding through two updates is as large as the differences that follow.
    with jax.enable_x64(True):
        check_loss(similarity)


def check_loss(similarity):
    net, params, fixed, moving = made(0.05, **ONE_LEVEL)
    config = {**get_config().loss, "similarity": similarity, "dice": 0.3, "window": 5}
    labels = [(x[..., 0] > 0.5).astype(jnp.float32)[..., None] for x in (fixed, moving)]
    batch = {"fixed": fixed, "moving": moving, "fixed_labels": labels[0], "moving_labels": labels[1]}

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)  # one program for all that follows
    def loss(params, force):
        return losses.total_loss(ConfigDict({**config, "force": force}), net.apply(params, fixed, moving), batch)

    (value, parts), _ = loss(params, config["force"])
    weighted = parts["similarity"] + sum(config[k] * parts[k] for k in ("smoothness", "level", "force", "dice"))
    assert float(value) == pytest.approx(float(weighted), rel=1e-5)
    assert all(float(part) > 0 for part in parts.values())

    # Without the alignment of the force: its target is held constant, so its gradient is not the slope of its value.
    _, gradient = loss(params, 0.0)
    norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(gradient)))
    step = 1e-4 / norm
    up, down = (loss(jax.tree.map(lambda p, g, h=h: p + h * g, params, gradient), 0.0)[0][0] for h in (step, -step))
    assert float(up - down) / (2 * step * norm**2) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("window", [0, 8])
def test_a_window_without_a_middle_voxel_is_refused(window):
    image = np.zeros((1, 9, 9, 9, 1), np.float32)
    with pytest.raises(ValueError, match=f"window is {window}: a box around a voxel has an odd number"):
        losses.lncc(image, image, window)
