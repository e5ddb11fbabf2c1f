"""DrivenMorph: the difference of two images becomes a driving force, and the force a diffeomorphism, coarse to fine.

The two streams meet in one array. `DifferenceStream` sees features and returns forces; `NeuralDemonsLayer` sees forces
and the deformation so far and returns a velocity. Nothing else passes.
"""

from itertools import groupby

import chex
import flax.struct

from drivenmorph_jax.fields.grid import resize_field
from drivenmorph_jax.network.losses import remaining_displacement


@flax.struct.dataclass
class Update:
    """One update, on the grid of its level's field (..., D, H, W, 3), in voxels of it; `u` and `u_inverse` are what it
    led to."""
    force: chex.Array
    demons_force: chex.Array
    attention_force: chex.Array
    velocity: chex.Array
    u_inverse_before: chex.Array
    u: chex.Array
    u_inverse: chex.Array


@flax.struct.dataclass
class Registration:
    """`u`, `u_inverse`: (B, D, H, W, 3), voxels of the input grid. `updates`: coarse to fine, in the order applied."""
    u: chex.Array
    u_inverse: chex.Array
    updates: tuple[Update, ...]


def driving_force(registration):
    """Sum of the forces of all updates, each resampled to the input grid: (B, D, H, W, 3), voxels of it."""
    return sum(resize_field(sum(update.force for update in updates), registration.u.shape[1:4])
               for _, updates in by_grid(registration))


def by_grid(registration):
    """[(grid of the field, its `Update`s)] for each level, coarse to fine."""
    return [(space, list(level)) for space, level in groupby(registration.updates, lambda update: update.u.shape[1:4])]


@flax.struct.dataclass
class LevelForces:
    """Of one level, on the grid of its field, (B, D, H, W, 3) each in voxels of the images: the forces of its updates
    summed, likewise their two terms, and the displacement that remained when the level began."""
    force: chex.Array
    demons_force: chex.Array
    attention_force: chex.Array
    remaining: chex.Array


def by_level(registration):
    """A `LevelForces` for each level of a `model.Registration`, coarse to fine."""
    found = []
    for space, updates in by_grid(registration):
        remaining = remaining_displacement(updates[0].u_inverse_before, resize_field(registration.u, space))
        stride = registration.u.shape[1] // space[0]
        found.append(LevelForces(*(stride * sum(getattr(update, name) for update in updates)
                                   for name in ("force", "demons_force", "attention_force")), stride * remaining))
    return tuple(found)
