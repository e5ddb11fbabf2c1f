"""DrivenMorph: the difference of two images becomes a driving force, and the force a diffeomorphism, coarse to fine.

The two streams meet in one array. `DifferenceStream` sees features and returns forces; `NeuralDemonsLayer` sees forces
and the deformation so far and returns a velocity. Nothing else passes.
"""

from functools import partial
from itertools import groupby
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import FrozenConfigDict

from drivenmorph_jax import demons, forces
from drivenmorph_jax.attention import CrossAttention, SelfAttention
from drivenmorph_jax.bias import balanced
from drivenmorph_jax.encoder import Conv, Encoder
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.grid import average_pool, resize_field
from drivenmorph_jax.integrate import exponential
from drivenmorph_jax.warp import SAMPLED, compose, warp

# Squarings of the flow of one update: with the bound L = 2 voxels of the level, 1 of its field, the first step moves a
# quarter of one.
STEPS = 2
LOG_STEPS = 7
# Features have unit variance; below this squared slope a voxel is flat, and only amplifies noise.
FLOOR = 1e-2


@flax.struct.dataclass
class Update:
    """One update, on the grid of its level's field (..., D, H, W, 3), in voxels of it; `u` and `u_inverse` are what it
    led to."""
    force: chex.Array
    demons_force: chex.Array
    attention_force: chex.Array
    velocity: chex.Array
    u_before: chex.Array
    u_inverse_before: chex.Array
    u: chex.Array
    u_inverse: chex.Array


@flax.struct.dataclass
class Registration:
    """`u`, `u_inverse`: (B, D, H, W, 3), voxels of the input grid. `updates`: coarse to fine, in the order applied."""
    u: chex.Array
    u_inverse: chex.Array
    updates: tuple[Update, ...]


def multiple(config):
    """What every side of the model's images must be a multiple of."""
    return config.strides[-1] * config.field_stride


def driving_force(registration):
    """Sum of the forces of all updates, each resampled to the input grid: (B, D, H, W, 3), voxels of it."""
    return sum(resize_field(sum(update.force for update in updates), registration.u.shape[1:4])
               for _, updates in by_grid(registration))


def by_grid(registration):
    """[(grid of the field, its `Update`s)] for each level, coarse to fine."""
    return [(space, list(level)) for space, level in groupby(registration.updates, lambda update: update.u.shape[1:4])]


def checked(config):
    """The model's settings, frozen, as `DrivenMorph` takes them.

    Raises InputError where the levels do not fit together or a name is unknown.
    """
    levels = len(config.strides)
    for name in ("channels", "updates", "cross_radius", "self_radius", "self_window"):
        if len(config[name]) != levels:
            raise InputError(f"model.{name} has {len(config[name])} entries and model.strides {levels}: "
                             "give each level one in both")
    for coarse, fine in zip(config.strides[1:], config.strides, strict=False):
        if coarse % fine or coarse == fine:
            raise InputError(f"model.strides is {tuple(config.strides)}: each must be a multiple of the one before")
    if config.get("field_stride", 0) < 1:
        raise InputError("model.field_stride is missing or below 1: set it to 1 or more; weights of an earlier version "
                         "must be trained again")
    if min(config.channels) < 2:
        raise InputError(f"model.channels is {tuple(config.channels)}: give each level at least 2, the image and its "
                         "local normalisation")
    for channels, *attention in zip(config.channels, config.cross_radius, config.self_radius, config.self_window,
                                    strict=True):
        if any(attention) and channels % config.heads:
            raise InputError(f"model.heads is {config.heads}, which does not divide {channels} of model.channels: "
                             "choose a divisor")
    if config.update_rule not in ("compositional", "log"):
        raise InputError(f"model.update_rule is {config.update_rule!r}: set it to 'compositional' or 'log'")
    return with_dtype(config)


def with_dtype(config):
    """The settings of any network, frozen. Raises InputError where `dtype` is none to compute in."""
    if config.dtype not in ("float32", "bfloat16"):
        raise InputError(f"model.dtype is {config.dtype!r}: set it to 'float32' or 'bfloat16'")
    return FrozenConfigDict(config)


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
        force = partial(forces.feature_force, max_step=self.max_step, floor=FLOOR)
        demons_force = jax.vmap(lambda d, slope, w: force(d, slope, weights=w))(d, 0.5 * (fixed + attended), weights)
        attention_force = jax.nn.sigmoid(head[..., channels:]) * offset if self.cross_radius else offset
        return forces.squash(demons_force + attention_force, self.max_step), demons_force, attention_force


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
        return demons.gaussian_smooth(forces.squash(force + residual, self.max_step), sigma)


class Level(nn.Module):
    """All updates of one level, with shared parameters: features and state in, state and the `Update`s out.

    The field lies on a grid `field_stride` times coarser than the features: the force is averaged to it, so that
    smoothing, composition and R cost a part of what they would on the features' grid.
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
            # What a sample gathers is most of the memory of a TPU's step: in bfloat16 it is half.
            terms = difference(fixed, warp(moving.astype(self.dtype), phi).astype(jnp.float32))
            if weights is not None:
                counted = jnp.minimum(weights[..., :1], warp(weights[..., 1:], phi)) > 0.999
                terms = (p * counted for p in terms)
            force, demons_force, attention_force = (average_pool(p, stride) / stride for p in terms)
            delta = layer(force, u)
            # Both flows in one call: half the program to compile.
            if c.update_rule == "log":
                v = demons.log_update(v, delta, c.sigma_diffusion)
                u, u_inverse = exponential(jnp.stack([v, -v]), LOG_STEPS)
            else:
                forward, backward = exponential(jnp.stack([delta, -delta]), STEPS, layer.max_step)
                u, u_inverse = compose(u, forward, layer.max_step), compose(backward, u_inverse)
            return (u, u_inverse, v), (force, demons_force, attention_force, delta, u, u_inverse)

        if c.remat:
            update = nn.remat(update, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(SAMPLED))
        # A loop, compiled once; on GPU none, where what it keeps for its backward pass would be copied once more. The
        # check, by which parameters are made, traces it a second time.
        loop = nn.scan(update, variable_broadcast="params", split_rngs={"params": False}, length=c.updates[i],
                       unroll=c.updates[i] if jax.default_backend() == "gpu" else 1,
                       check_constancy_invariants=self.is_initializing())
        updates, before = (), (u, u_inverse)
        (u, u_inverse, v), made = loop(self, (u, u_inverse, v), None)
        for *driven, u_after, u_inverse_after in zip(*made, strict=True):
            updates += Update(*driven, *before, u_after, u_inverse_after),
            before = u_after, u_inverse_after
        return u, u_inverse, v, updates


class DrivenMorph(nn.Module):
    """Register (B, D, H, W, 1) images in [0, 1]; every side a multiple of the coarsest stride times `field_stride`.

    Levels are listed finest first, as in the config: `strides`, `channels`, `updates`, `cross_radius`, `self_radius`,
    `self_window` (0 is off). phi = exp(delta_1) o ... o exp(delta_n), inverse exp(-delta_n) o ... o exp(-delta_1).

    `weights` (B, D, H, W, 2), of the fixed and the moving image: where one of them is not 1 at a voxel of a level, the
    force of that voxel is zero.
    """
    config: Any

    @nn.compact
    def __call__(self, fixed, moving, weights=None):
        c = self.config
        dtype = jnp.dtype(c.dtype)
        fixed, moving = balanced(fixed, moving, multiple(c), weights)
        encoder = Encoder(tuple(c.channels), tuple(c.strides), dtype, name="encoder")
        fixed_pyramid, moving_pyramid = encoder(fixed), encoder(moving)
        levels = len(c.strides)
        u = u_inverse = v = jnp.zeros((fixed.shape[0], *(n // multiple(c) for n in fixed.shape[1:4]), 3))
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
