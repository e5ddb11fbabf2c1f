import jax
import jax.numpy as jnp
import numpy as np

from drivenmorph_jax.encoder import Encoder, conv3d, instance_norm
from drivenmorph_jax.grid import average_pool

RNG = np.random.default_rng(0)


def test_convolution_is_the_three_dimensional_one():
    x = jnp.asarray(RNG.normal(size=(2, 5, 6, 7, 3)).astype(np.float32))
    kernel = jnp.asarray(RNG.normal(size=(3, 3, 3, 3, 4)).astype(np.float32))
    expected = jax.lax.conv_general_dilated(x, kernel, (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))
    np.testing.assert_allclose(conv3d(x, kernel), expected, atol=1e-4)


def test_pyramid_holds_the_image_itself_first_and_is_normalised():
    image = jnp.asarray(RNG.random((2, 16, 16, 16, 1), np.float32))
    encoder = Encoder(channels=(4, 6, 8), strides=(1, 2, 8))
    pyramid, _ = jax.jit(encoder.init_with_output)(jax.random.key(0, impl="rbg"), image)
    assert [x.shape for x in pyramid] == [(2, 16, 16, 16, 4), (2, 8, 8, 8, 6), (2, 2, 2, 2, 8)]
    for x, stride in zip(pyramid, (1, 2, 8), strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x.mean((1, 2, 3)), 0, atol=1e-4)
        np.testing.assert_allclose(x[..., :1], instance_norm(average_pool(image, stride)), atol=1e-5)


def test_a_constant_image_gives_finite_features_and_gradients():
    image = jnp.ones((1, 8, 8, 8, 1))
    encoder = Encoder(channels=(4, 4), strides=(1, 2))
    params = encoder.init(jax.random.key(0), image)
    gradient = jax.jit(jax.grad(lambda p: sum((x**2).sum() for x in encoder.apply(p, image))))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
