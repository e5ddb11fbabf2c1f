"""Validation during training: mean scores over the pairs of the val split."""

import jax
import numpy as np

from drivenmorph_jax.evaluation import metrics
from drivenmorph_jax.fields.warp import warp
from drivenmorph_jax.network.inference import predictions
from drivenmorph_jax.network.losses import lncc

WINDOW = 9  # voxels


def validate(predict, params, dataset, space=1):
    """Mean scores over the ordered pairs of the val split.

    Returns:
      {"val_dice", "val_fold_pct"}, means over the pairs whose images have a label in common. Where there is no such
        pair,
      {"val_lncc"}, the mean local correlation of the images over all pairs.
    """
    rows, pairs = [], dataset.pairs("val")
    for (fixed, moving), ((u, *_), _) in zip(pairs, predictions(predict, params, pairs, space), strict=True):
        dice = np.nan
        if fixed.labels is not None and moving.labels is not None:
            moved = metrics.warp_labels(moving.labels, u)
            dice = metrics.mean_dice(fixed.labels, moved, dataset.exclude, moving.labels)
        if np.isfinite(dice):
            rows.append({"val_dice": dice,
                         "val_fold_pct": metrics.fold_pct(metrics.jacobian(u), metrics.brain(fixed.image))})
        else:
            rows.append({"val_lncc": similarity(fixed.image, moving.image, u)})
    labelled = [row for row in rows if "val_dice" in row]
    return {key: float(np.mean([row[key] for row in labelled or rows])) for key in (labelled or rows)[0]}


def similarity(fixed, moving, u):
    """Mean squared local correlation of the fixed and the warped moving image (D, H, W), boxes of `WINDOW` voxels."""
    return float(_similarity(fixed, moving, u))


@jax.jit
def _similarity(fixed, moving, u):
    return lncc(warp(moving[..., None], u)[None], fixed[None, ..., None], WINDOW)
