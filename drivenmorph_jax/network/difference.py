"""DrivenMorph: the difference of two images becomes a driving force, and the force a diffeomorphism, coarse to fine.

The two streams meet in one array. `DifferenceStream` sees features and returns forces; `NeuralDemonsLayer` sees forces
and the deformation so far and returns a velocity. Nothing else passes.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from drivenmorph_jax.demons.forces import feature_force, squash
from drivenmorph_jax.network.attention import CrossAttention, SelfAttention
from drivenmorph_jax.network.convolution import Conv

# Features have unit variance; below this squared slope a voxel is flat, and only amplifies noise.
SLOPE_FLOOR = 1e-2


class DifferenceStream(nn.Module):
    """Features of the fixed and of the warped moving image -> the driving force, |p| <= L voxels.

    d = f_F - a with a the attended moving features, made coherent by self-attention; the feature Demons force with
    channel weights w(d) >= 0; plus the attention offset through a gate in (0, 1); squashed to the bound.

    Returns (force, Demons term, gated attention term), (B, D, H, W, 3) each.
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
        # The last feature is the gate of the offset, which a level without attention has for nothing.
        head = Conv(channels + 1, self.dtype, nn.initializers.normal(1e-2), name="head",
                    used=channels + bool(self.cross_radius))(tokens).astype(jnp.float32)
        weights = jax.nn.softplus(head[..., :channels])
        force = partial(feature_force, max_step=self.max_step, floor=SLOPE_FLOOR)
        demons_force = jax.vmap(lambda d, slope, w: force(d, slope, weights=w))(d, 0.5 * (fixed + attended), weights)
        attention_force = jax.nn.sigmoid(head[..., channels:]) * offset if self.cross_radius else offset
        return squash(demons_force + attention_force, self.max_step), demons_force, attention_force
