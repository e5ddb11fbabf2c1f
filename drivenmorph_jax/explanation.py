"""What the driving force says of the deformation: the force of each level against what it still had to do."""

from itertools import groupby

import chex
import flax.struct
import numpy as np

from drivenmorph_jax import metrics
from drivenmorph_jax.grid import resize_field
from drivenmorph_jax.losses import remaining_displacement
from drivenmorph_jax.report import LABELS, OF_FORCE

RESAMPLES = 2000


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
    for space, group in groupby(registration.updates, lambda update: update.u.shape[1:4]):
        updates = list(group)
        remaining = remaining_displacement(updates[0].u_inverse_before, resize_field(registration.u, space))
        stride = registration.u.shape[1] // space[0]
        found.append(LevelForces(*(stride * sum(getattr(update, name) for update in updates)
                                   for name in ("force", "demons_force", "attention_force")), stride * remaining))
    return tuple(found)


def statistics(pairs, brains):
    """`metrics.force_statistics` of every level, of pairs and of a control that tells what chance gives.

    The control takes the force of one pair and the displacement of another.

    Args:
      pairs: for each pair {level: (force, remaining displacement)}, (D, H, W, 3) in voxels of the images.
      brains: for each pair the mask (D, H, W) of the images.

    Returns:
      {level: {statistic: {"mean", "low", "high", "control", "control_low", "control_high"}}}: means over pairs, and
      95 % intervals by bootstrap over pairs; None where
      no pair has the statistic.
    """
    shift = len(pairs) // 2  # to a pair with another fixed image, where there is one
    table = {}
    for level in pairs[0]:
        own, control = [], []
        for k, (pair, brain) in enumerate(zip(pairs, brains, strict=True)):
            force, remaining = pair[level]
            stride = brain.shape[0] // force.shape[0]
            mask = brain[(slice(stride // 2, None, stride),) * 3]
            own.append(metrics.force_statistics(force, remaining, mask))
            control.append(metrics.force_statistics(pairs[k - shift][level][0], remaining, mask))
        table[level] = {}
        for name in OF_FORCE:
            mean, low, high = _bootstrap([row[name] for row in own])
            chance = _bootstrap([row[name] for row in control])
            table[level][name] = {"mean": mean, "low": low, "high": high,
                                  **dict(zip(("control", "control_low", "control_high"), chance, strict=True))}
    return table


def markdown(table):
    """The table of `statistics`, each number with its interval."""
    lines = ["| Level | " + " | ".join(f"{LABELS[name]} | control" for name in OF_FORCE) + " |",
             "| --- |" + " ---: |" * (2 * len(OF_FORCE))]
    for level, row in table.items():
        cells = [_cell(row[name][key], row[name][low], row[name][high]) for name in OF_FORCE
                 for key, low, high in (("mean", "low", "high"), ("control", "control_low", "control_high"))]
        lines.append(f"| {level} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(mean, low, high):
    return "–" if mean is None else f"{mean:.2f} ({low:.2f}, {high:.2f})"


def _bootstrap(values):
    values = np.array(values)[np.isfinite(values)]
    if not values.size:
        return None, None, None
    drawn = np.random.default_rng(0).choice(values, (RESAMPLES, values.size)).mean(1)
    return float(values.mean()), *map(float, np.percentile(drawn, (2.5, 97.5)))
