"""The difference stream: it turns the features of the two images into a driving force.

The difference stream takes features and returns forces. Only the force reaches the Neural Demons Layer.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from drivenmorph_jax.demons.forces import feature_force, squash
from drivenmorph_jax.network.attention import CrossAttention, SelfAttention
from drivenmorph_jax.network.convolution import Conv

# Features have unit variance. A voxel whose squared slope is below this value is flat: its force would amplify noise.
SLOPE_FLOOR = 1e-2


class DifferenceStream(nn.Module):
    """Features of the fixed and of the warped moving image (B, D, H, W, C) -> driving force p, with |p| <= L voxels.

    The difference is d = f_F - a, where a are the attended moving features. Self-attention makes it spatially coherent.
    From it follow the channel weights w(d) >= 0 and a gate in (0, 1). The feature Demons force is computed with these
    weights. The gated offset of the cross-attention is added to it. The sum is squashed to the bound L.

    Returns (force, feature Demons force, gated offset), (B, D, H, W, 3) each, in voxels of the features' grid.
    """
    max_step: float
    heads: int
    cross_radius: int
    self_radius: int
    self_window: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, fixed, moving):
        offset = jnp.zeros((*fixed.shape[:-1], 3))
        attended = moving
        if self.cross_radius:
            attended, offset = CrossAttention(self.cross_radius, self.heads, self.dtype)(fixed, moving)
        d = fixed - attended
        tokens = nn.leaky_relu(Conv(fixed.shape[-1], self.dtype, name="tokens")(d))
        if self.self_radius or self.self_window:
            tokens = SelfAttention(self.heads, self.self_radius, self.self_window, self.dtype)(tokens)
        channels = fixed.shape[-1]
        # The last feature is the gate of the offset. A level without cross-attention does not compute it.
        head = Conv(channels + 1, self.dtype, nn.initializers.normal(1e-2), name="head",
                    used=channels + bool(self.cross_radius))(tokens).astype(jnp.float32)
        weights = jax.nn.softplus(head[..., :channels])
        force = partial(feature_force, max_step=self.max_step, floor=SLOPE_FLOOR)
        demons_force = jax.vmap(lambda d, slope, w: force(d, slope, weights=w))(d, 0.5 * (fixed + attended), weights)
        attention_force = jax.nn.sigmoid(head[..., channels:]) * offset if self.cross_radius else offset
        return squash(demons_force + attention_force, self.max_step), demons_force, attention_force
