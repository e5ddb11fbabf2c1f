"""Networks of others, to compare with: both images in, one velocity out, with nothing between that could be looked at.

They share this project's blocks, its integration, training and scores, and return the same `Registration`: of one
update, whose force is zero, since these networks have none.
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
    """The `Registration` of a stationary velocity (B, D, H, W, 3) in voxels, integrated at half its resolution."""
    v = average_pool(flow.astype(jnp.float32), 2) / 2
    u, u_inverse = exponential(jnp.stack([v, -v]), STEPS)
    zero = jnp.zeros_like(v)
    update = Update(force=zero, demons_force=zero, attention_force=zero, velocity=v, u_inverse_before=zero,
                    u=u, u_inverse=u_inverse)
    return Registration(*(resize_field(x, flow.shape[1:4]) for x in (u, u_inverse)), (update,))


def double(x):
    """Every voxel repeated twice along each axis."""
    for axis in (1, 2, 3):
        x = jnp.repeat(x, 2, axis)
    return x


class VoxelMorph(nn.Module):
    """VoxelMorph-2, diffeomorphic: a U-Net of both images makes a stationary velocity; 301,411 parameters.

    Images (B, D, H, W, 1) in [0, 1], every side a multiple of 2^(levels of the encoder).

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
    """A TransMorph-style network: windows of self-attention, shifted every other time, and a decoder of convolutions.

    Patches of 4^3 voxels become tokens of `channels[0]`; stages of two blocks each follow, between them patches are
    merged by 2. Like TransMorph but smaller; without its position bias, as its authors found that it makes no
    difference, and with normalisation after each block; a shift wraps round at the border, which is background.

    Images (B, D, H, W, 1) in [0, 1], every side a multiple of 4 * 2^(stages - 1).

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
    """The 2^3 neighbours of every other voxel as its channels."""
    return jnp.concatenate([x[:, i::2, j::2, k::2] for i in (0, 1) for j in (0, 1) for k in (0, 1)], axis=-1)
