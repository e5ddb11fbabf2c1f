"""The Neural Demons Layer: it turns a driving force into a velocity.

The layer takes the force and the displacement found so far. It never takes an image or a feature.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from drivenmorph_jax.demons.forces import squash
from drivenmorph_jax.fields.smooth import gaussian_smooth
from drivenmorph_jax.network.convolution import Conv


class NeuralDemonsLayer(nn.Module):
    """Force p, displacement u found so far -> velocity delta, (B, D, H, W, 3) each in voxels; |delta| <= L.

      delta = K * squash(p + R(p, u))

    R is a small residual network whose output starts at zero. K is a Gaussian of learned width. So before training this
    is the classical Demons update. K takes weighted means, so the bound of `squash` also holds after smoothing.
    """
    max_step: float
    features: int
    sigma: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, force, u):
        x = jnp.concatenate([force, 0.1 * u], axis=-1)
        x = nn.leaky_relu(Conv(self.features, self.dtype, name="residual_a")(x))
        x = nn.leaky_relu(Conv(self.features, self.dtype, name="residual_b")(x))
        residual = Conv(3, self.dtype, nn.initializers.zeros, name="residual_out")(x).astype(jnp.float32)
        sigma = self.sigma * jnp.exp(self.param("log_sigma", nn.initializers.zeros, ()))
        return gaussian_smooth(squash(force + residual, self.max_step), sigma)
