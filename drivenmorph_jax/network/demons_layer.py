"""DrivenMorph: the difference of two images becomes a driving force, and the force a diffeomorphism, coarse to fine.

The two streams meet in one array. `DifferenceStream` sees features and returns forces; `NeuralDemonsLayer` sees forces
and the deformation so far and returns a velocity. Nothing else passes.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from drivenmorph_jax.demons.forces import squash
from drivenmorph_jax.fields.smooth import gaussian_smooth
from drivenmorph_jax.network.convolution import Conv


class NeuralDemonsLayer(nn.Module):
    """Force and displacement so far -> velocity: delta = K_fluid * squash(p + R(p, u)), |delta| <= L voxels.

    R is a small residual network that starts at zero, K_fluid a Gaussian of learned width: before training this is
    the classical Demons update. K_fluid takes weighted means, so the bound survives it.
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
