"""The classical Demons algorithm: force, smoothing, exponential, update, from coarse to fine.

`demons` registers two images over all levels, `demons_level` runs one level. The forces are in `demons.forces`, the
updates in `demons.updates`. Fields are (..., D, H, W, 3) or (..., H, W, 2), in voxels of their own grid.

References: Thirion, "Image matching as a diffusion process", 1998; Vercauteren et al., "Diffeomorphic demons", 2009.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from drivenmorph_jax.demons.forces import Force, lncc_force, mind, scale_longest, symmetric_force
from drivenmorph_jax.demons.updates import compositional_update, symmetric_log_update
from drivenmorph_jax.fields.grid import average_pool, coarsen_field, resize_field
from drivenmorph_jax.fields.integrate import exponential
from drivenmorph_jax.fields.smooth import gaussian_smooth
from drivenmorph_jax.fields.warp import warp
from drivenmorph_jax.runtime.stored import stored

# Settings of `demons`. LNCC is for local correlation of images with one channel. INTENSITY is for `symmetric_force` and
# `thirion_force`, on intensities or on any number of feature channels. STIFF is local correlation of voxels in place of
# blocks, with a field so smooth that it does not follow noise.
LNCC: dict[str, Any] = {
    "force": lncc_force, "iterations": (100, 50, 20), "max_step": 1.0, "scale": True, "sigma_fluid": 0.87,
    "sigma_diffusion": 0.35}
INTENSITY: dict[str, Any] = {
    "force": symmetric_force, "iterations": (100, 80, 8), "max_step": 2.0, "scale": False, "sigma_fluid": 0.5,
    "sigma_diffusion": 0.5}
STIFF: dict[str, Any] = LNCC | {
    "force": partial(lncc_force, block=1), "iterations": (60, 50, 30), "stride": 1, "sigma_fluid": 1.5,
    "sigma_diffusion": 1.0}
FORCES = {  # name: (function that computes the features of an image, settings of `demons`)
    "lncc": (lambda x: x, LNCC),
    "intensity": (lambda x: x, INTENSITY),
    "mind": (stored(mind), INTENSITY),
}
MULTIPLE = 8  # sides are multiples of it: three levels halve them twice, and the field's grid halves them once more


class Registered(NamedTuple):
    """The result of `demons`.

    `u` (*space, n) is the displacement in voxels. `velocity` (*space, n) is the velocity of which u is the exponential,
    for update="log", and None otherwise. `energies` has one array a level, from coarse to fine; the entries after an
    early stop are nan.
    """

    u: chex.Array
    velocity: chex.Array | None
    energies: tuple[chex.Array, ...]


# Number of squarings in the exponential of an update. An update of one voxel of the image is half a voxel of the field.
# The first of its steps therefore moves an eighth of a voxel.
UPDATE_STEPS = 2
# The convergence test compares means of the energy over this many iterations.
PATIENCE = 5


@stored(static_argnames=("force", "iterations", "update", "max_step", "scale", "tolerance"))
def demons_level(fixed: chex.Array, moving: chex.Array, field: chex.Array, *, force: Force, iterations: int,
                 max_step: float, scale: bool, sigma_fluid: float, sigma_diffusion: float, update: str,
                 tolerance: float) -> tuple[jax.Array, jax.Array]:
    """Up to `iterations` iterations of Demons at one resolution, compiled as one program.

    Args:
      fixed, moving: (*space, C).
      field: displacement, or velocity for update="log", in voxels of its own grid. This grid is that of the images or
        `stride` times coarser. The force is averaged over the voxels of the images that a voxel of the field covers.
      The other arguments are those of `demons`.

    Returns:
      The new field, and the energy before each iteration (iterations,).

    Raises:
      ValueError: the force is on a coarser grid than the field.
    """
    dims = field.shape[-1]
    space = fixed.shape[:-1]
    stride = space[0] // field.shape[0]

    def delta(fixed, moving, u):
        p, energy = smoothed_force(force, fixed, warp(moving, resize_field(u, space) if stride > 1 else u),
                                   field.shape[:-1], max_step, sigma_fluid)
        return scale_longest(p, max_step / stride) if scale else p, energy

    def step(i, state):
        field, energies = state
        if update == "log":
            there, energy = delta(fixed, moving, exponential(field))
            back, energy_back = delta(moving, fixed, exponential(-field))
            field, energy = symmetric_log_update(field, there, back, sigma_diffusion), 0.5 * (energy + energy_back)
        else:
            there, energy = delta(fixed, moving, field)
            field = gaussian_smooth(compositional_update(field, there, UPDATE_STEPS), sigma_diffusion, dims)
        return field, energies.at[i].set(energy)

    state = field, jnp.full(iterations, jnp.nan)
    if not tolerance or iterations <= 2 * PATIENCE:
        return jax.lax.fori_loop(0, iterations, step, state)

    def going_on(state):
        i, (_, energies) = state
        last = [jax.lax.dynamic_slice_in_dim(energies, i - k * PATIENCE, PATIENCE).mean() for k in (1, 2)]
        return (i < iterations) & ((i < 2 * PATIENCE) | (last[1] - last[0] > tolerance * last[1]))

    return jax.lax.while_loop(going_on, lambda state: (state[0] + 1, step(*state)), (0, state))[1]


def smoothed_force(force, fixed, warped, shape, max_step, sigma_fluid):
    """K_fluid * force(fixed, warped, max_step), averaged over the voxels that each voxel of a coarser grid covers.

    `shape` is that of the coarser grid, a whole number of times coarser than the images. Returns the force (*shape, n)
    in voxels of that grid, and its energy.

    Raises ValueError where the force itself is on a still coarser grid.
    """
    dims, stride = len(shape), fixed.shape[0] // shape[0]
    p, energy = force(fixed, warped, max_step)
    coarser = p.shape[0] // shape[0]
    if not coarser:
        raise ValueError(f"the force comes on a grid of {p.shape[:-1]}, coarser than the field's {tuple(shape)}: raise "
                         "stride, or for lncc_force lower block")
    # Each component is pooled by itself: XLA then never writes the vectors of the force before they are pooled.
    p = jnp.stack([average_pool(x[..., None], coarser, dims)[..., 0] for x in jnp.moveaxis(p, -1, 0)], -1)
    return gaussian_smooth(p / stride, sigma_fluid, dims), energy


def demons(fixed: chex.Array, moving: chex.Array, *, force: Force = LNCC["force"],
           iterations: Sequence[int] = LNCC["iterations"], stride: int = 2, max_step: float = LNCC["max_step"],
           scale: bool = LNCC["scale"], sigma_fluid: float = LNCC["sigma_fluid"],
           sigma_diffusion: float = LNCC["sigma_diffusion"], update: str = "compositional", tolerance: float = 5e-4,
           initial: chex.Array | None = None) -> Registered:
    """Register two images by multi-resolution Demons, without a network.

    Every level repeats this iteration until the energy no longer falls:

      delta = K_fluid * force(fixed, moving o phi),   phi <- K_diff * (phi o exp(delta))

    The defaults are `LNCC`, the settings for local correlation. `INTENSITY` holds the settings for the Demons forces.

    Args:
      fixed, moving: (*space, C) on one grid, with values of about 0 to 1. The sides are multiples of
        stride 2^(levels - 1). `lncc_force` takes one channel. The other forces take any number: intensities, `mind`
        descriptors, or the features of a network.
      force: function (fixed, warped moving, max_step) -> (p, energy), see `demons.forces`.
      iterations: largest number of iterations at each level, from coarse to fine. Each level has twice the resolution
        of the one before. 0 leaves a level out.
      stride: the grid of the field is this many times coarser than the grid of the images at the same level.
      max_step: L, the bound of one update, in voxels of the images at the level.
      scale: scale every smoothed update so that its longest vector has the length L. This is for forces whose length
        has no meaning, such as a gradient.
      sigma_fluid, sigma_diffusion: standard deviations of the Gaussians that smooth the update and the total field, in
        voxels of the field at the level.
      update: "compositional", or "log" for v <- K_diff * (Z(v, delta) - Z(-v, delta_back)) / 2 with phi = exp(v). The
        log update is symmetric: swapped images give the inverse.
      tolerance: a level ends when the mean energy of 5 iterations lies below that of the 5 before by less than this
        fraction of it. With 0 the loop has a fixed length, which `jax.grad` needs.
      initial: displacement (or velocity) (*space, n) to start from, in voxels of the images.

    Returns:
      A `Registered`, with the displacement on the grid of the images.

    Raises:
      ValueError: the levels and the stride do not divide a side, the force is on a coarser grid than the field, or
        `update` is unknown.
    """
    if update not in ("compositional", "log"):
        raise ValueError(f"update is {update!r}: set it to 'compositional' or 'log'")
    space, levels, dims = fixed.shape[:-1], len(iterations), fixed.ndim - 1
    multiple = stride * 2 ** (levels - 1)
    if any(n % multiple for n in space):
        raise ValueError(f"{levels} levels with stride {stride} need sides that are multiples of {multiple}, "
                         f"got {space}: pad the images or take fewer levels")
    field = jnp.zeros((*space, dims), jnp.float32) if initial is None else initial
    energies = []
    for level, count in enumerate(iterations):
        if not count:
            energies.append(jnp.zeros(0))
            continue
        small = _at_level(fixed, moving, field, 2 ** (levels - 1 - level), stride)
        field, trace = demons_level(*small, force=force, iterations=count, max_step=max_step, scale=scale,
                                    sigma_fluid=sigma_fluid, sigma_diffusion=sigma_diffusion, update=update,
                                    tolerance=tolerance)
        energies.append(trace)
    field, u = _at_end(field, space, update)
    return Registered(u, field if update == "log" else None, tuple(energies))


# Compiled because JAX compiles each operation outside a compiled function by itself.
@stored(static_argnames=("factor", "stride"))
def _at_level(fixed, moving, field, factor, stride):
    dims, space = field.shape[-1], [n // (factor * stride) for n in fixed.shape[:-1]]
    field = (coarsen_field if space[0] < field.shape[0] else resize_field)(field, space)
    return average_pool(fixed, factor, dims), average_pool(moving, factor, dims), field


@stored(static_argnames=("space", "update"))
def _at_end(field, space, update):
    field = resize_field(field, space)
    return field, exponential(field) if update == "log" else field
