"""What the driving force says of the deformation: the force of each level against what it still had to do."""

import numpy as np

from drivenmorph_jax.evaluation import metrics
from drivenmorph_jax.evaluation.tables import LABELS, OF_FORCE

RESAMPLES = 2000


def by_name(u, force, levels):
    """{level: (force, remaining displacement)} of one pair, and "total": (their sum, the whole displacement)."""
    return {f"level {i}": (level.force, level.remaining) for i, level in enumerate(levels, start=1)} | {
        "total": (force, u)}


def of_pair(forces, displacements, brain):
    """{level: `metrics.force_statistics`} of the forces of one pair against what remained in the same or another.

    Args:
      forces, displacements: as `by_name` returns them, of which the one or the other half is used.
      brain: the mask (D, H, W) of the images.

    Returns nothing where a network has no force.
    """
    if not np.any(forces["total"][0]):
        return {}
    found = {}
    for level, (_, remaining) in displacements.items():
        stride = brain.shape[0] // remaining.shape[0]
        found[level] = metrics.force_statistics(forces[level][0], remaining,
                                                brain[(slice(stride // 2, None, stride),) * 3])
    return found


def statistics(own, control):
    """Means over pairs of what `of_pair` found, and of a control that tells what chance gives.

    Args:
      own: for each pair, its force against its displacement; control: the force of another pair against it.

    Returns:
      {level: {statistic: {"mean", "low", "high", "control", "control_low", "control_high"}}}: means over pairs, and
      95 % intervals by bootstrap over pairs; None where no pair has the statistic.
    """
    return {level: {name: dict(zip(("mean", "low", "high", "control", "control_low", "control_high"),
                                   (*_bootstrap([row[level][name] for row in own]),
                                    *_bootstrap([row[level][name] for row in control])), strict=True))
                    for name in OF_FORCE} for level in own[0]}


def force_table(table):
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
    values = np.array(values, float)  # None, as JSON has it, becomes nan
    values = values[np.isfinite(values)]
    if not values.size:
        return None, None, None
    drawn = np.random.default_rng(0).choice(values, (RESAMPLES, values.size)).mean(1)
    return float(values.mean()), *map(float, np.percentile(drawn, (2.5, 97.5)))
