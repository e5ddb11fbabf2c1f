"""Networks to compare with: VoxelMorph and a TransMorph-style network, which map both images directly to one velocity.

They use this project's blocks, integration, training and scores. They return the same `Registration`, with one update.
The force of this update is zero, since these networks compute none.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from drivenmorph_jax.fields.grid import average_pool, resize_field
from drivenmorph_jax.fields.integrate import exponential
from drivenmorph_jax.network.attention import SelfAttention
from drivenmorph_jax.network.convolution import Conv
from drivenmorph_jax.network.outputs import Registration, Update

STEPS = 7


def integrated(flow):
    """The `Registration` of a stationary velocity (B, D, H, W, 3) in voxels.

    The velocity is averaged to half its resolution and integrated there. The displacement and its inverse are resampled
    to the full resolution.
    """
    v = average_pool(flow.astype(jnp.float32), 2) / 2
    u, u_inverse = exponential(jnp.stack([v, -v]), STEPS)
    zero = jnp.zeros_like(v)
    update = Update(force=zero, demons_force=zero, attention_force=zero, velocity=v, u_inverse_before=zero,
                    u=u, u_inverse=u_inverse)
    return Registration(*(resize_field(x, flow.shape[1:4]) for x in (u, u_inverse)), (update,))


def double(x):
    """x with every voxel repeated twice along each axis."""
    for axis in (1, 2, 3):
        x = jnp.repeat(x, 2, axis)
    return x


class VoxelMorph(nn.Module):
    """Diffeomorphic VoxelMorph-2: a U-Net maps both images to a stationary velocity. It has 301,411 parameters.

    The images are (B, D, H, W, 1) in [0, 1]. Every side is a multiple of 2^(number of levels of the encoder).

    Reference: Balakrishnan et al., "VoxelMorph: a learning framework for deformable medical image registration", 2019;
    Dalca et al., "Unsupervised learning of probabilistic diffeomorphic registration", 2019.
    """
    config: Any

    @nn.compact
    def __call__(self, fixed, moving):
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        levels = len(c.encoder)
        x = jnp.concatenate([moving, fixed], axis=-1)
        skipped = []
        for features in c.encoder:
            skipped.append(x)
            x = nn.leaky_relu(Conv(features, dtype, stride=2)(x), 0.2)
        for i, features in enumerate(c.decoder):
            x = nn.leaky_relu(Conv(features, dtype)(x), 0.2)
            if i < levels:
                x = jnp.concatenate([double(x), skipped.pop()], axis=-1)
        return integrated(Conv(3, dtype, nn.initializers.normal(1e-5), name="flow")(x))


class TransMorph(nn.Module):
    """A TransMorph-style network: self-attention in windows, shifted in every second block; a convolutional decoder.

    Every patch of 4^3 voxels becomes a token of `channels[0]` features. Stages of two blocks each follow. Between two
    stages, 2^3 neighbouring tokens are merged into one. The network differs from TransMorph as follows. It is smaller.
    It has no position bias, since the authors of TransMorph found that this bias makes no difference. It normalises
    after each block. Its shifted windows wrap round at the border, where the image is background.

    The images are (B, D, H, W, 1) in [0, 1]. Every side is a multiple of 4 * 2^(stages - 1).

    Reference: Chen et al., "TransMorph: transformer for unsupervised medical image registration", 2022.
    """
    config: Any

    @nn.compact
    def __call__(self, fixed, moving):
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        images = jnp.concatenate([moving, fixed], axis=-1)
        skipped = [nn.leaky_relu(Conv(c.channels[0] // 2, dtype)(x)) for x in (images, average_pool(images))]
        b, *space, _ = images.shape
        x = images.reshape(b, space[0] // 4, 4, space[1] // 4, 4, space[2] // 4, 4, -1)
        x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, *(n // 4 for n in space), -1)
        x = nn.LayerNorm()(nn.Dense(c.channels[0], dtype=dtype)(x))
        for stage, channels in enumerate(c.channels):
            if stage:
                skipped.append(x)
                x = nn.LayerNorm()(nn.Dense(channels, dtype=dtype)(_merged(x)))
            for shift in (0, c.window // 2):
                x = jnp.roll(x, (-shift,) * 3, (1, 2, 3))
                x = nn.LayerNorm()(SelfAttention(c.heads, window=c.window, dtype=dtype)(x))
                x = nn.LayerNorm()(x + nn.Dense(channels, dtype=dtype)(nn.gelu(nn.Dense(4 * channels, dtype=dtype)(x))))
                x = jnp.roll(x, (shift,) * 3, (1, 2, 3))
        while skipped:
            skip = skipped.pop()
            x = jnp.concatenate([double(x), skip], axis=-1)
            for _ in range(2):
                x = nn.leaky_relu(Conv(skip.shape[-1], dtype)(x))
        return integrated(Conv(3, dtype, nn.initializers.normal(1e-5), name="flow")(x))


def _merged(x):
    """Every 2^3 neighbouring tokens merged into one: their channels are concatenated."""
    return jnp.concatenate([x[:, i::2, j::2, k::2] for i in (0, 1) for j in (0, 1) for k in (0, 1)], axis=-1)
