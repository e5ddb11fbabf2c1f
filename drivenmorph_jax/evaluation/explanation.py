"""How the driving force explains the deformation: the force of each level against the displacement that remained."""

import numpy as np

from drivenmorph_jax.evaluation import metrics
from drivenmorph_jax.evaluation.tables import LABELS, OF_FORCE

RESAMPLES = 2000


def by_name(u, force, levels):
    """{level: (force, remaining displacement)} of one pair; "total" has (sum of forces, whole displacement)."""
    return {f"level {i}": (level.force, level.remaining) for i, level in enumerate(levels, start=1)} | {
        "total": (force, u)}


def of_pair(forces, displacements, brain):
    """{level: `metrics.force_statistics`} of one pair's forces and the displacements of the same or another pair.

    Args:
      forces, displacements: as `by_name` returns them. Only the forces of the first and the displacements of the second
        are used.
      brain: the mask (D, H, W) of the images.

    Returns {} where the network computes no force.
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
    """Means over pairs of the statistics of `of_pair`, and of a control, which shows the values that occur by chance.

    Args:
      own: for each pair, the statistics of its force and its displacement; control: of another pair's force and its
        displacement.

    Returns:
      {level: {statistic: {"mean", "low", "high", "control", "control_low", "control_high"}}}: means over pairs, and
      95 % intervals by bootstrap over pairs; None where no pair has the statistic.
    """
    return {level: {name: dict(zip(("mean", "low", "high", "control", "control_low", "control_high"),
                                   (*_bootstrap([row[level][name] for row in own]),
                                    *_bootstrap([row[level][name] for row in control])), strict=True))
                    for name in OF_FORCE} for level in own[0]}


def force_table(table):
    """The Markdown table of `statistics`: every mean with its interval."""
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
    values = np.array(values, float)  # None, which JSON has for nan, becomes nan
    values = values[np.isfinite(values)]
    if not values.size:
        return None, None, None
    drawn = np.random.default_rng(0).choice(values, (RESAMPLES, values.size)).mean(1)
    return float(values.mean()), *map(float, np.percentile(drawn, (2.5, 97.5)))
