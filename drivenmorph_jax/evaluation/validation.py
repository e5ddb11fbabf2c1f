"""Scores of trained parameters on the pairs of a data set, and the report of them."""

import jax
import numpy as np

from drivenmorph_jax.evaluation import metrics
from drivenmorph_jax.fields.warp import warp
from drivenmorph_jax.network.inference import predictions
from drivenmorph_jax.network.losses import lncc


def validate(predict, params, dataset, space=1):
    """Mean over the ordered val pairs: Dice and folding, or the LNCC of the images where there are no labels."""
    rows, pairs = [], dataset.pairs("val")
    for (fixed, moving), ((u, *_), _) in zip(pairs, predictions(predict, params, pairs, space), strict=True):
        if fixed.labels is None or moving.labels is None:
            rows.append({"val_lncc": float(_similarity(fixed.image, moving.image, u))})
            continue
        moved = metrics.warp_labels(moving.labels, u)
        rows.append({"val_dice": metrics.mean_dice(fixed.labels, moved, dataset.exclude, moving.labels),
                     "val_fold_pct": metrics.fold_pct(metrics.jacobian(u), metrics.brain(fixed.image))})
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


@jax.jit
def _similarity(fixed, moving, u):
    return lncc(warp(moving[..., None], u)[None], fixed[None, ..., None], 9)
