"""The anatomy network: it finds in one image where which structure lies, whatever the contrast.

It sees one image at a time, so it says nothing about a deformation. Two images that show the same structure at a place
have the same probabilities there, and their difference drives the Demons force of `demons.anatomy`.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from drivenmorph_jax.fields.grid import average_pool
from drivenmorph_jax.network.baselines import double
from drivenmorph_jax.network.convolution import conv3d
from drivenmorph_jax.network.encoder import instance_norm

SLOPE = 0.01  # of the leaky rectifiers


class Block(nn.Module):
    """leaky_relu(scale N(conv(x)) + bias), N as `instance_norm`: (B, D, H, W, I) -> (B, D, H, W, `features`)."""
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.he_normal(), (3, 3, 3, x.shape[-1], self.features))
        scale = self.param("scale", nn.initializers.ones, (self.features,))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x = instance_norm(conv3d(x.astype(self.dtype), kernel.astype(self.dtype)))
        return nn.leaky_relu(scale * x + bias, SLOPE).astype(self.dtype)


class Anatomy(nn.Module):
    """A U-Net: image (B, D, H, W, 1) in [0, 1] -> logits (B, D, H, W, `classes`), float32.

    Class 0 is tissue without a name. Left and right structures of one name are one class. Every side of the image is a
    multiple of 2^(number of levels - 1).

    Reference: Cicek et al., "3D U-Net: learning dense volumetric segmentation from sparse annotation", MICCAI, 2016.
    """
    channels: tuple[int, ...]  # of the levels, finest first
    features: int  # of the last layer
    classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: chex.Array) -> jax.Array:
        x, kept = image, []
        for level, channels in enumerate(self.channels):
            if level:
                x = Block(channels, self.dtype, name=f"down{level}_a")(average_pool(x, 2))
                x = Block(channels, self.dtype, name=f"down{level}_b")(x)
            else:
                x = Block(channels, self.dtype, name="down0")(x)
            kept.append(x)
        kept.pop()
        for level in reversed(range(len(self.channels) - 1)):
            x = jnp.concatenate([kept.pop(), double(x)], -1)
            x = Block(self.channels[level] if level else self.features, self.dtype, name=f"up{level}")(x)
        return nn.Dense(self.classes, name="head")(x.astype(jnp.float32))
