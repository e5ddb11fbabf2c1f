import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from drivenmorph_jax.backends import convolution, kernels
from drivenmorph_jax.fields.grid import average_pool
from drivenmorph_jax.network.convolution import conv3d
from drivenmorph_jax.network.encoder import VARIANCE_FLOOR, Encoder, instance_norm, local_norm

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("channels", [(3, 4), (6, 8)])
@pytest.mark.parametrize("backend", ["cpu", "tpu", "gpu"])
def test_convolution_is_the_three_dimensional_one_and_so_is_its_derivative(compile_for, channels, backend, monkeypatch):
    monkeypatch.setattr(convolution, "SMALL", 0)
    x = jnp.asarray(RNG.normal(size=(2, 5, 6, 7, channels[0])).astype(np.float32))
    kernel = jnp.asarray(RNG.normal(size=(3, 3, 3, *channels)).astype(np.float32))

    def value_and_gradients(f, *arrays):
        value, pull = jax.vjp(f, *arrays)
        return value, *pull(g)

    def definition(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))

    g = RNG.normal(size=(2, 5, 6, 7, channels[1])).astype(np.float32)
    expected, *theirs = jax.jit(partial(value_and_gradients, definition))(x, kernel)
    compile_for(backend)
    found, *ours = jax.jit(partial(value_and_gradients, conv3d))(x, kernel)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
    half = jax.jit(conv3d)(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), expected, atol=0.02 * np.abs(expected).max())


def test_in_a_loop_the_derivatives_are_convolutions_that_lie_as_the_forward_one(monkeypatch):
    monkeypatch.setattr(kernels, "available", lambda: False)
    # Those that do not are computed by XLA on CPU without its fast routine, which it takes outside of loops.
    x, kernel = jnp.ones((1, 8, 8, 8, 8)), jnp.ones((3, 3, 3, 8, 8))

    @jax.grad
    def gradient(both):
        return jax.lax.scan(lambda x, _: (jnp.tanh(conv3d(x, both[1])), None), both[0], None, length=3)[0].sum()

    text = jax.jit(gradient).lower((x, kernel)).compile().as_text()
    assert set(re.findall(r"dim_labels=\S+?,", text)) == {"dim_labels=b01f_01io->b01f,"}


def test_pyramid_holds_the_image_itself_first_and_is_normalised():
    image = jnp.asarray(RNG.random((2, 16, 16, 16, 1), np.float32))
    encoder = Encoder(channels=(4, 6, 8), strides=(1, 2, 8))
    pyramid, _ = jax.jit(encoder.init_with_output)(jax.random.key(0, impl="rbg"), image)
    assert [x.shape for x in pyramid] == [(2, 16, 16, 16, 4), (2, 8, 8, 8, 6), (2, 2, 2, 2, 8)]
    normalised = jax.jit(lambda image: [(instance_norm(x), instance_norm(local_norm(x))) for x in (
        average_pool(image, stride) for stride in (1, 2, 8))])(image)
    for x, (image, local) in zip(map(np.asarray, pyramid), normalised, strict=True):
        assert x.dtype == np.float32
        np.testing.assert_allclose(x.mean((1, 2, 3)), 0, atol=1e-4)
        np.testing.assert_allclose(x[..., :1], image, atol=1e-5)
        np.testing.assert_allclose(x[..., 1:2], local, atol=1e-5)


def test_local_normalisation_is_scipys_and_blind_to_contrast():
    image = RNG.random((1, 12, 14, 16, 1), np.float32)
    x = image[0, ..., 0]
    mean, square = (ndimage.uniform_filter(y, 5, mode="constant") for y in (x, x * x))
    expected = (x - mean) / np.sqrt(np.maximum(square - mean**2, 0) + VARIANCE_FLOOR)
    np.testing.assert_allclose(local_norm(image)[0, ..., 0], expected, atol=1e-4)
    inside = (0, *(slice(2, -2),) * 3, 0)  # beyond the border is zero
    np.testing.assert_allclose(local_norm(3 * image + 1)[inside], local_norm(image)[inside], atol=0.02)


def test_a_level_of_two_channels_learns_nothing_and_leaves_the_coarser_ones_their_parameters():
    image = jnp.asarray(RNG.random((1, 16, 16, 16, 1), np.float32))
    fine, coarse = Encoder(channels=(2, 4, 6), strides=(1, 2, 4)), Encoder(channels=(4, 6), strides=(1, 2))
    coarser, params = jax.jit(coarse.init_with_output)(jax.random.key(0, impl="rbg"), average_pool(image))
    for x, expected in zip(jax.jit(fine.apply)(params, image)[1:], coarser, strict=True):
        np.testing.assert_allclose(x, expected, atol=1e-5)


def test_a_constant_image_gives_finite_features_and_gradients():
    image = jnp.ones((1, 8, 8, 8, 1))
    encoder = Encoder(channels=(4, 4), strides=(1, 2))
    params = jax.jit(encoder.init)(jax.random.key(0), image)
    gradient = jax.jit(jax.grad(lambda p: sum((x**2).sum() for x in encoder.apply(p, image))))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
