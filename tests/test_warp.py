import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.ndimage import gaussian_filter, map_coordinates
from test_training import finish, start

from drivenmorph_jax.fields import warp as warps

# As whole programs: by itself, every operation on a new shape is compiled, which takes ten times as long.
warp, compose, warp_nearest = jax.jit(warps.warp, static_argnums=2), jax.jit(warps.compose), jax.jit(warps.warp_nearest)
RNG = np.random.default_rng(0)


def scipy_warp(image, u, order):
    x = np.moveaxis(np.moveaxis(np.indices(u.shape[:3]), 0, -1) + u, -1, 0)
    return np.stack([map_coordinates(image[..., c], x, order=order, mode="nearest", prefilter=False)
                     for c in range(image.shape[-1])], axis=-1)


def smooth_field(shape, largest, seed=0):
    u = gaussian_filter(np.random.default_rng(seed).normal(size=(*shape, 3)), (3, 3, 3, 0))
    return (u * largest / np.abs(u).max()).astype(np.float32)


@pytest.mark.parametrize("channels", [1, 3, 16])
def test_warp_is_scipys_linear_interpolation_also_beyond_the_edge(channels):
    image = RNG.normal(size=(7, 8, 9, channels)).astype(np.float32)
    u = RNG.normal(size=(5, 6, 10, 3), scale=3).astype(np.float32)
    np.testing.assert_allclose(warp(image, u), scipy_warp(image, u, 1), atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2])
def test_warp_in_two_dimensions_is_scipys_and_has_its_derivative(channels):
    image = RNG.normal(size=(7, 9, channels)).astype(np.float32)
    u = RNG.normal(size=(5, 6, 2), scale=2).astype(np.float32)
    x = np.moveaxis(np.moveaxis(np.indices((5, 6)), 0, -1) + u, -1, 0)
    expected = np.stack([map_coordinates(image[..., c], x, order=1, mode="nearest") for c in range(channels)], -1)
    np.testing.assert_allclose(warp(image, u), expected, atol=1e-5)
    nearest = map_coordinates(image[..., 0], x, order=0, mode="nearest")
    np.testing.assert_array_equal(warp_nearest(image, u)[..., 0], nearest)
    inside = jnp.clip(u, -0.4, 0.4)[:4, :4]
    check_grads(lambda image, u: warp(image, u + jnp.array([1.1, 1.1])), (image, inside), 1, ("rev",), atol=2e-2,
                rtol=2e-2)


def test_warp_by_nothing_finite_reads_no_foreign_memory():
    image = RNG.normal(size=(5, 6, 7, 1)).astype(np.float32)
    for bad in (np.nan, np.inf, -np.inf):
        out = np.asarray(warp(image, np.full((5, 6, 7, 3), bad, np.float32)))
        assert not np.isfinite(out).any() or np.abs(out).max() <= np.abs(image).max()


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("channels", [1, 20])
@pytest.mark.parametrize("reach", [None, 1])
def test_what_a_tpu_computes_is_what_the_others_do_and_so_is_its_derivative(computed_on, dims, channels, reach):
    space = (6, 5, 7)[:dims]
    image = RNG.normal(size=(2, *space, channels)).astype(np.float32)
    u = RNG.uniform(-1, 1, size=(2, *space, dims)).astype(np.float32) * (reach or 4)
    u[:, 0] = 0.5  # some inside for certain
    g = RNG.normal(size=image.shape).astype(np.float32)
    text = computed_on("tpu", lambda image, u: warp(image, u, reach), (image, u), g, 1e-4)
    assert ("gather" in text, "scatter" in text) == (reach is None,) * 2
    # One for as many channels as a row holds, and none in the backward pass.
    assert text.count(" gather[") == (0 if reach else -(-channels // (128 >> dims)))


SPLIT = """
import math, re
import jax, numpy as np
from drivenmorph_jax.backends import compiling_for
from drivenmorph_jax.fields.warp import warp
from drivenmorph_jax.runtime import sharding
mesh = sharding.device_mesh(4)
split = sharding.split_batch(mesh)
image, u, g = (jax.random.normal(jax.random.key(i), (1, 8, 96, 8, c)) for i, c in enumerate((1, 3, 1)))
def gradient(image, u, g):
    return jax.vjp(warp, image, u)[1](g)
wanted = jax.jit(gradient)(image, u, g)
with compiling_for("tpu"):
    compiled = jax.jit(gradient, in_shardings=split, out_shardings=(split, split)).lower(image, u, g).compile()
for a, b in zip(compiled(*(jax.device_put(x, split) for x in (image, u, g))), wanted):
    np.testing.assert_allclose(a, b, atol=1e-4)
sent = re.findall(r"\\[([\\d,]+)\\]\\S* all-(?:gather|reduce)\\(", compiled.as_text())
print(u.size, *(math.prod(map(int, lengths.split(","))) for lengths in sent))
"""


def test_on_tpus_that_share_a_volume_a_slice_of_it_is_sent_at_a_time():
    whole, *sent = map(int, finish(start(4, SPLIT)).split())
    assert sent and max(sent) < whole / 2


def test_on_a_tpu_values_keep_the_precision_of_float32(compile_for):
    # Gathered in bfloat16, as three parts.
    image = np.random.default_rng(0).normal(size=(6, 5, 7, 3), scale=50).astype(np.float32)
    compile_for("tpu")
    np.testing.assert_allclose(jax.jit(warp)(image, np.zeros((6, 5, 7, 3), np.float32)), image, rtol=2e-7)


@pytest.mark.parametrize("channels", [1, 3])
def test_what_a_gpu_computes_is_what_the_others_do_and_so_is_its_derivative(computed_on, channels):
    image, g = RNG.normal(size=(2, 2, 6, 5, 7, channels)).astype(np.float32)
    u = RNG.normal(size=(2, 6, 5, 7, 3), scale=2).astype(np.float32)
    text = computed_on("gpu", warp, (image, u), g, 1e-4)
    assert "while" not in text and "scan" not in text


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
def test_gradient_of_a_bfloat16_image_is_added_up_in_float32(compile_for, backend):
    # In bfloat16 the sum of ones stands still at 256.
    compile_for(backend)
    image, u = jnp.ones((8, 8, 8, 2), jnp.bfloat16), -100 * jnp.ones((8, 8, 8, 3))
    gradient = jax.jit(jax.grad(lambda image: warp(image, u).astype(jnp.float32).sum()))(image)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient[0, 0, 0], 512)


def test_warp_maps_over_leading_axes():
    image = RNG.normal(size=(2, 5, 6, 7, 2)).astype(np.float32)
    u = RNG.normal(size=(2, 5, 6, 7, 3)).astype(np.float32)
    out = warp(image, u)
    np.testing.assert_allclose(out[1], scipy_warp(image[1], u[1], 1), atol=1e-5)
    np.testing.assert_allclose(jax.vmap(warp)(image, u), out, atol=1e-6)


def test_warp_pulls_back():
    image = np.zeros((8, 8, 8, 1), np.float32)
    image[5, 3, 2] = 1
    u = np.broadcast_to(np.float32([2, -1, 0]), (8, 8, 8, 3))
    assert warp(image, u)[3, 4, 2, 0] == 1  # M(x + u(x)) with x = (3, 4, 2)


def test_warp_keeps_the_type_of_the_image():
    u = smooth_field((6, 6, 6), 1.0)
    assert warp(jnp.ones((6, 6, 6, 2), jnp.bfloat16), u).dtype == jnp.bfloat16


def test_gradients_of_warp_against_finite_differences():
    image = RNG.normal(size=(5, 6, 5, 2)).astype(np.float32)
    # Fractions stay off the cell boundaries, where the derivative jumps.
    u = (RNG.integers(-2, 3, (5, 6, 5, 3)) + RNG.uniform(0.2, 0.8, (5, 6, 5, 3))).astype(np.float32)
    check_grads(warp, (image, u), order=1, modes=["rev"], eps=1e-2, atol=2e-2, rtol=2e-2)


def test_gradient_is_zero_along_an_axis_on_which_the_sample_lies_outside():
    image = RNG.normal(size=(6, 6, 6, 1)).astype(np.float32)
    u = np.zeros((6, 6, 6, 3), np.float32) + 0.3
    u[..., 0] = 20
    g = jax.jit(jax.grad(lambda u: warp(image, u).sum()))(u)
    assert not np.any(g[..., 0]) and np.any(g[..., 1])


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.float32])
def test_nearest_is_scipys_and_keeps_the_type(dtype):
    labels = RNG.integers(0, 200, (7, 8, 9, 1)).astype(dtype)
    u = RNG.uniform(-4, 4, (7, 8, 9, 3)).astype(np.float32)
    out = warp_nearest(labels, u)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, scipy_warp(labels, u, 0))


def test_linear_fields_compose_to_their_product():
    x = np.moveaxis(np.indices((20, 20, 20)), 0, -1) - 9.5
    a, b = (RNG.normal(size=(3, 3)) * 0.05 for _ in range(2))
    u, s = (x @ a.T).astype(np.float32), (x @ b.T).astype(np.float32)
    expected = x @ ((np.eye(3) + a) @ (np.eye(3) + b) - np.eye(3)).T
    inside = (slice(5, -5),) * 3
    np.testing.assert_allclose(compose(u, s)[inside], expected[inside], atol=1e-4)


def test_warping_twice_is_warping_by_the_composition():
    image = gaussian_filter(RNG.normal(size=(24, 24, 24)), 3)[..., None].astype(np.float32)
    u, s = smooth_field((24, 24, 24), 4.0, 1), smooth_field((24, 24, 24), 4.0, 2)
    twice = warp(warp(image, u), s)
    right, wrong = (np.abs(twice - warp(image, field))[5:-5, 5:-5, 5:-5].mean()
                    for field in (compose(u, s), compose(s, u)))
    assert right < 0.5 * wrong
