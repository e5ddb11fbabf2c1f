"""What a network returns, `Registration` and its `Update`s, and the driving forces computed from them."""

from itertools import groupby

import chex
import flax.struct

from drivenmorph_jax.fields.grid import resize_field
from drivenmorph_jax.network.losses import remaining_displacement


@flax.struct.dataclass
class Update:
    """One update of a level. Every array is (..., D, H, W, 3), in voxels of the grid of the level's field.

    `force` is the driving force. `demons_force` and `attention_force` are its two terms. `velocity` is the velocity
    that the Neural Demons Layer computes from it. `u_inverse_before` belongs to the transform before the update, `u`
    and `u_inverse` to the transform after it.
    """
    force: chex.Array
    demons_force: chex.Array
    attention_force: chex.Array
    velocity: chex.Array
    u_inverse_before: chex.Array
    u: chex.Array
    u_inverse: chex.Array


@flax.struct.dataclass
class Registration:
    """The displacement u and its inverse, (B, D, H, W, 3) in voxels of the input grid, and the updates in order."""
    u: chex.Array
    u_inverse: chex.Array
    updates: tuple[Update, ...]


def driving_force(registration):
    """The driving force of a registration (B, D, H, W, 3), in voxels of the input grid.

    It is the sum of the forces of all updates, each resampled to the input grid.
    """
    return sum(resize_field(sum(update.force for update in updates), registration.u.shape[1:4])
               for _, updates in by_grid(registration))


def by_grid(registration):
    """[(shape of the field's grid, its `Update`s)] for each level, coarse to fine."""
    return [(space, list(level)) for space, level in groupby(registration.updates, lambda update: update.u.shape[1:4])]


@flax.struct.dataclass
class LevelForces:
    """The forces of one level, on the grid of its field: (B, D, H, W, 3) each, in voxels of the images.

    `force` is the sum of the forces of the level's updates, `demons_force` and `attention_force` are those of its two
    terms. `remaining` is the displacement that remained when the level began.
    """
    force: chex.Array
    demons_force: chex.Array
    attention_force: chex.Array
    remaining: chex.Array


def by_level(registration):
    """The `LevelForces` of each level of a `Registration`, coarse to fine."""
    found = []
    for space, updates in by_grid(registration):
        remaining = remaining_displacement(updates[0].u_inverse_before, resize_field(registration.u, space))
        stride = registration.u.shape[1] // space[0]
        found.append(LevelForces(*(stride * sum(getattr(update, name) for update in updates)
                                   for name in ("force", "demons_force", "attention_force")), stride * remaining))
    return tuple(found)
