"""The network DrivenMorph: the updates of each level, and the levels from coarse to fine.

In every update `DifferenceStream` turns features into a force, and `NeuralDemonsLayer` turns this force and the
displacement found so far into a velocity. Images and features change the deformation through the force alone.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from drivenmorph_jax import demons
from drivenmorph_jax.backends.programs import unrolled
from drivenmorph_jax.backends.warp_tpu import SAMPLED
from drivenmorph_jax.fields.grid import average_pool, resize_field
from drivenmorph_jax.fields.integrate import exponential
from drivenmorph_jax.fields.warp import compose, warp
from drivenmorph_jax.images.bias import balanced
from drivenmorph_jax.network.demons_layer import NeuralDemonsLayer
from drivenmorph_jax.network.difference import DifferenceStream
from drivenmorph_jax.network.encoder import Encoder
from drivenmorph_jax.network.outputs import Registration, Update
from drivenmorph_jax.network.settings import field_multiple

# Squarings of the flow of one update. The bound L is 2 voxels of the level, which are 1 voxel of its field. So the
# first of the 2^STEPS steps moves at most a quarter of a voxel.
STEPS = 2
LOG_STEPS = 7


class Level(nn.Module):
    """All updates of one level, with shared parameters: (features, transform so far) -> (new transform, `Update`s).

    The field lies on a grid `field_stride` times coarser than the features. The force is averaged to this grid, so that
    smoothing, composition and R cost a fraction of what they would cost on the grid of the features.
    """
    config: Any
    index: int
    dtype: Any

    @nn.compact
    def __call__(self, fixed, moving, u, u_inverse, v, weights):
        c, i = self.config, self.index
        space, stride = fixed.shape[1:4], c.field_stride

        def update(self, state, _):
            difference = DifferenceStream(c.max_step, c.heads, c.cross_radius[i], c.self_radius[i], c.self_window[i],
                                          self.dtype)
            layer = NeuralDemonsLayer(c.max_step / stride, c.demons_features, c.sigma_fluid, self.dtype)
            u, u_inverse, v = state
            phi = resize_field(u, space)
            # On TPU the values that this warp gathers take most of the memory of a training step. In bfloat16 they take
            # half of that.
            terms = difference(fixed, warp(moving.astype(self.dtype), phi).astype(jnp.float32))
            if weights is not None:
                counted = jnp.minimum(weights[..., :1], warp(weights[..., 1:], phi)) > 0.999
                terms = (p * counted for p in terms)
            force, demons_force, attention_force = (average_pool(p, stride) / stride for p in terms)
            delta = layer(force, u)
            # One call integrates both flows, which halves the program to compile.
            if c.update_rule == "log":
                v = demons.log_update(v, delta, c.sigma_diffusion)
                u, u_inverse = exponential(jnp.stack([v, -v]), LOG_STEPS)
            else:
                forward, backward = exponential(jnp.stack([delta, -delta]), STEPS, layer.max_step)
                u, u_inverse = compose(u, forward, layer.max_step), compose(backward, u_inverse)
            return (u, u_inverse, v), (force, demons_force, attention_force, delta, u, u_inverse)

        if c.remat:
            update = nn.remat(update, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(SAMPLED))
        # The updates are a loop, so that one update is compiled. On GPU the loop is unrolled: it would copy the values
        # kept for the backward pass once more. The check for constant values traces the update a second time; only the
        # initialisation of the parameters needs it.
        loop = nn.scan(update, variable_broadcast="params", split_rngs={"params": False}, length=c.updates[i],
                       unroll=unrolled(c.updates[i]),
                       check_constancy_invariants=self.is_initializing())
        updates, before = (), u_inverse
        (u, u_inverse, v), made = loop(self, (u, u_inverse, v), None)
        for *driven, u_after, u_inverse_after in zip(*made, strict=True):
            updates += Update(*driven, before, u_after, u_inverse_after),
            before = u_inverse_after
        return u, u_inverse, v, updates


class DrivenMorph(nn.Module):
    """Fixed and moving image (B, D, H, W, 1) in [0, 1] -> `Registration`.

    Every side is a multiple of the coarsest stride times `field_stride`. The settings list the levels finest first:
    `strides`, `channels`, `updates`, `cross_radius`, `self_radius`, `self_window` (0 switches this attention off). The
    levels run from coarse to fine. With the velocities delta_1, ..., delta_n of all updates in order, the transform is

      phi = exp(delta_1) o ... o exp(delta_n),    phi^-1 = exp(-delta_n) o ... o exp(-delta_1)

    for `update_rule` "compositional". For "log" it is phi = exp(v), phi^-1 = exp(-v), see `demons.log_update`.

    `weights` (B, D, H, W, 2) are those of the fixed and of the moving image. The force is zero at every voxel of a
    level where one of the two weights is not 1.
    """
    config: Any

    @nn.compact
    def __call__(self, fixed: chex.Array, moving: chex.Array, weights: chex.Array | None = None) -> Registration:
        c = self.config
        dtype = jnp.dtype(c.dtype)
        fixed, moving = balanced(fixed, moving, field_multiple(c), weights)
        encoder = Encoder(tuple(c.channels), tuple(c.strides), dtype, name="encoder")
        fixed_pyramid, moving_pyramid = encoder(fixed), encoder(moving)
        levels = len(c.strides)
        u = u_inverse = v = jnp.zeros((fixed.shape[0], *(n // field_multiple(c) for n in fixed.shape[1:4]), 3))
        updates = ()
        for i in reversed(range(levels)):
            space = [n // c.field_stride for n in fixed_pyramid[i].shape[1:4]]
            u, u_inverse, v = (resize_field(x, space) for x in (u, u_inverse, v))
            u, u_inverse, v, made = Level(c, i, dtype, name=f"level{levels - 1 - i}")(
                fixed_pyramid[i], moving_pyramid[i], u, u_inverse, v,
                None if weights is None else average_pool(weights, c.strides[i]))
            updates += made
        space = fixed.shape[1:4]
        return Registration(resize_field(u, space), resize_field(u_inverse, space), updates)
