"""The encoder: one network computes a pyramid of features for either image, and its normalisations."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from drivenmorph_jax.fields.grid import average_pool
from drivenmorph_jax.fields.smooth import box_mean
from drivenmorph_jax.network.convolution import Conv

RADIUS, VARIANCE_FLOOR = 2, 1e-3  # of `local_norm`: of its box, in voxels; added to the variance


def instance_norm(x):
    """(x - mean) / std over space, for each image and channel of x (B, D, H, W, C); computed in float32."""
    x = x.astype(jnp.float32)
    mean = x.mean((1, 2, 3), keepdims=True)
    variance = ((x - mean) ** 2).mean((1, 2, 3), keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5)


def local_norm(image):
    """(x - mean) / std over the 5^3 voxels around each voxel: (B, D, H, W, 1), float32. It removes contrast and bias.

    The squared difference of two such images is, up to the floor of the variance, 2 - 2 times their local correlation.
    """
    mean, square = (jax.vmap(lambda x: box_mean(x, RADIUS))(x[..., 0])[..., None] for x in (image, image * image))
    return (image - mean) * jax.lax.rsqrt(jnp.maximum(square - mean**2, 0) + VARIANCE_FLOOR)


class Encoder(nn.Module):
    """Image (B, D, H, W, 1) -> features (B, D/s, H/s, W/s, C) for each stride s, finest first.

    The features are float32 and instance-normalised. The first two channels of every level need no training: the pooled
    image, and the pooled image locally normalised. A Demons force on these two channels is a classical Demons force.
    The learned channels add to it. A level of two channels has no learned channel. The next coarser level then starts
    from the image.
    """
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, image):
        x, stride, pyramid = image, 1, []
        for i, (channels, level_stride) in enumerate(zip(self.channels, self.strides, strict=True)):
            x = average_pool(x, level_stride // stride)
            stride = level_stride
            pooled = average_pool(image, stride)
            features = [pooled, local_norm(pooled)]
            if channels > 2:
                # Levels are numbered from the coarsest, so that the names of their parameters stay the same when a
                # finer level is added.
                level = len(self.strides) - 1 - i
                x = nn.leaky_relu(Conv(channels - 2, self.dtype, name=f"level{level}_a")(x))
                x = nn.leaky_relu(x + Conv(channels - 2, self.dtype, name=f"level{level}_b")(x))
                features.append(x)
            pyramid.append(instance_norm(jnp.concatenate(features, axis=-1)))
        return pyramid
