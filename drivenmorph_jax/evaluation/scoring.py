"""The scores of a registered pair of a data set, the statistics of its force, and the ranking of pairs."""

from drivenmorph_jax import data
from drivenmorph_jax.evaluation import metrics
from drivenmorph_jax.evaluation.explanation import by_name, of_pair
from drivenmorph_jax.evaluation.validation import similarity


def scored(pair, fields, control, seconds, dataset):
    """The entry of a pair in `record.Record`, ready for JSON.

    Args:
      pair: (fixed, moving), `Subject`s.
      fields: (u, u_inverse, force, levels) of the pair, as `network.inference.predictions` yields them.
      control: the same of another pair, whose force is compared with this pair's displacement.
      seconds: of the network.

    Returns:
      {"scores": {metric: number}, "dice": {label: [before, after]}, "force", "control": {level: statistics}}.
    """
    (fixed, moving), (u, u_inverse, force, levels) = pair, fields
    brain = metrics.brain(fixed.image)
    u_true = data.true_displacement(fixed, moving) if fixed.to_template is not None else None
    scores = metrics.pair_metrics(u, u_inverse, fixed.labels, moving.labels, (dataset.spacing,) * 3, brain,
                                  dataset.exclude, u_true=u_true)
    scores["lncc"] = similarity(fixed.image, moving.image, u)
    dice = {}
    if "dice" in scores:
        before, after = (metrics.dice(fixed.labels, labels, dataset.exclude, moving.labels)
                         for labels in (moving.labels, metrics.warp_labels(moving.labels, u)))
        dice = {str(label): [before[label], value] for label, value in after.items()}
    own, other = (by_name(*found) for found in ((u, force, levels), (control[0], *control[2:])))
    return {"scores": {"fixed": fixed.id, "moving": moving.id, **scores, "seconds": seconds}, "dice": dice,
            "force": of_pair(own, own, brain), "control": of_pair(other, own, brain)}


def ranked(rows):
    """The indices of `rows` from the worst to the best: by Dice where any pair has it, else by local correlation.

    A pair without the number used for ranking is left out, unless no pair has it.
    """
    def number(row, name):
        value = row.get(name)
        return float("nan") if value is None else float(value)

    dice = [number(row, "dice") for row in rows]
    values = dice if any(x == x for x in dice) else [number(row, "lncc") for row in rows]
    return sorted((k for k, x in enumerate(values) if x == x), key=values.__getitem__) or list(range(len(rows)))
