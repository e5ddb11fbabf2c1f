"""Evaluation of a network on the ordered pairs of a data set: `evaluate`, and `evaluate_checkpoint` for a saved one."""

import resource
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from drivenmorph_jax import data
from drivenmorph_jax.data.folder import IMAGE
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.evaluation import explanation, figures, metrics, page, rivals
from drivenmorph_jax.evaluation.explanation import force_table
from drivenmorph_jax.evaluation.record import Record, identity_of, names_of
from drivenmorph_jax.evaluation.scoring import ranked, scored
from drivenmorph_jax.evaluation.tables import OF_FORCE, markdown_table, pairs_csv, report_md
from drivenmorph_jax.fields.warp import warp
from drivenmorph_jax.files import make_folder, write_json
from drivenmorph_jax.images.reading import load_image
from drivenmorph_jax.network.inference import downsample_to, grid_multiple, load_checkpoint, make_predict, predictions
from drivenmorph_jax.runtime import configuration, logs
from drivenmorph_jax.runtime.provenance import environment
from drivenmorph_jax.transforms.files import learn2reg_name
from drivenmorph_jax.transforms.transform import Transform
from drivenmorph_jax.transforms.world import total_displacement


def evaluate(config, params, dataset, split, out, training=None, refine_steps=0, l2r=None):
    """Score every ordered pair of a split, and write the results to the folder `out`.

    The results are `summary.json`, `pairs.csv`, the figures, and two reports with the same content, `report.html` and
    `report.md`. `pairs.jsonl` holds one line a pair, with the Dice of every label. A run that was stopped continues
    from these lines, if network, settings and images are still the same.

    Args:
      config: the configuration of the training, with `data` for this data set.
      params: of the network of `config.model`.
      dataset: as `data.load` returns it, padded to `grid_multiple(config)`.
      split: "train", "val" or "test".
      training: folder whose `metrics.jsonl` gives the training curves, or None.
      refine_steps: iterations of Demons in `network.refinement.refined`; 0: one pass of the network.
      l2r: folder for the fields of the pairs in Learn2Reg's format; only for a data set of files.

    Returns:
      The summary. Raises InputError where the split has no pair, or where two pairs would have one file in `l2r`.
    """
    subjects, pairs = getattr(dataset, split), dataset.pairs(split)
    if len(subjects) < 2:
        raise InputError(f"{dataset.name} has no pair in its {split} split: put at least 2 subjects there")
    if l2r:
        _check_l2r(pairs)
    out = make_folder(out)

    def predicted(some):
        return predictions(make_predict(config, refine_steps), params, some, config.get("space", 1))

    record = Record(out, identity_of(config, params, subjects, dataset.atlas, refine_steps, l2r))
    for pair, u in _score_pairs(predicted, dataset, split, record):
        pairs_csv(out / "pairs.csv", [one["scores"] for one in record.rows.values()])
        if l2r:
            _write_l2r(l2r, config.data.root, *pair, u)
    found = [record.rows[names_of(pair)] for pair in pairs]
    rows = [one["scores"] for one in found]
    statistics = explanation.statistics([one["force"] for one in found], [one["control"] for one in found])
    drawn, viewers = _draw(out, dataset, pairs, found, predicted, statistics)
    if training and (steps := logs.read(training)):
        drawn["Training"] = out / "training.png"
        figures.curves(drawn["Training"], steps)

    scores = metrics.summarise(rows)
    of_force = OF_FORCE if statistics else ()
    summary = {"data": dataset.name, "split": split, "pairs": len(rows), "spacing_mm": dataset.spacing,
               "refine_steps": refine_steps,
               "environment": environment(), "excluded_labels": list(dataset.exclude),
               "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
               "definitions": {key: metrics.DEFINITIONS[key] for key in (*scores, *of_force, "brain")},
               "force": statistics, **scores}
    force = force_table(statistics) if statistics else ""
    report_md(out / "report.md", scores, rows, drawn, force)
    page.report(out / "report.html", f"{dataset.name}, {split}", scores, rows, force, drawn, viewers)
    write_json(out / "summary.json", summary)
    return summary


def _score_pairs(predicted, dataset, split, record):
    """Score the pairs that are not in `record` yet. Yields (pair, u) for each pair once it is recorded."""
    subjects, pairs = getattr(dataset, split), dataset.pairs(split)
    # The control for the pairs of a fixed image is the force between two other images, if the split has two others.
    jobs = []
    for k, fixed in enumerate(subjects):
        left = [pair for pair in pairs if pair[0] is fixed and names_of(pair) not in record.rows]
        if left:
            other, next_but_one = (subjects[(k + i) % len(subjects)] for i in (1, 2))
            jobs += [(True, (other, dataset.atlas or next_but_one)), *((False, pair) for pair in left)]
    if jobs:
        for _ in predicted(pairs[:1]):  # compiles, so that the seconds of the first pair are without compilation
            pass
    with tqdm(total=len(pairs), initial=len(record.rows), unit="pair", desc=split, dynamic_ncols=True) as bar:
        for (is_control, pair), (fields, seconds) in zip(jobs, predicted([pair for _, pair in jobs]), strict=True):
            if is_control:
                control = fields
                continue
            record.add(scored(pair, fields, control, seconds, dataset))
            yield pair, fields[0]
            bar.update()


def _draw(out, dataset, pairs, found, predicted, statistics):
    """({caption: figure}, viewers): worst, median and best pair, the force by level, Dice by structure."""
    drawn, viewers = {}, []
    rank = ranked([one["scores"] for one in found])
    shown = {"Worst": rank[0], "Median": rank[len(rank) // 2], "Best": rank[-1]}
    again = predicted([pairs[place] for place in shown.values()])
    for (name, place), ((u, _, force, levels), _) in zip(shown.items(), again, strict=True):
        drawn[f"{name} pair"] = out / f"{name.lower()}.png"
        viewers.append(_show(drawn[f"{name} pair"], *pairs[place], u, force, found[place]["scores"], dataset.spacing))
        if name == "Median" and statistics:
            drawn["Force by level, median pair"] = out / "forces.png"
            figures.forces(out / "forces.png", pairs[place][0].image, levels, (dataset.spacing,) * 3)
    if any(one["dice"] for one in found):
        drawn["Dice by structure"] = out / "dice.png"
        figures.dice_boxplot(drawn["Dice by structure"], *_by_label(found), dataset.label_names)
    return drawn, viewers


def _by_label(found):
    """({label: [Dice of each pair]} before the registration, the same after it)."""
    sides = {}, {}
    for one in found:
        for label, values in one["dice"].items():
            for side, value in zip(sides, values, strict=True):
                side.setdefault(int(label), []).append(value)
    return sides


def _write_l2r(folder, root, fixed, moving, u):
    """Write the field of Learn2Reg: (X, Y, Z, 3) in voxels of the two files, identity not included."""
    files = [load_image(Path(root) / f"{subject.id}{IMAGE}") for subject in (fixed, moving)]
    displacement = total_displacement(files[0].data.shape, files[0].affine, u, fixed.affine, np.eye(4))
    found = Transform(displacement, files[0], np.eye(4), files[1])
    found.save_learn2reg(make_folder(folder) / _l2r_name((fixed, moving)))


def _l2r_name(pair):
    return learn2reg_name(*names_of(pair))


def _check_l2r(pairs):
    """Raises InputError where two pairs would have one file, as a with b_c and a_b with c."""
    named = {}
    for pair in pairs:
        other = named.setdefault(_l2r_name(pair).casefold(), pair)
        if other is not pair:
            a, b = (" with ".join(names_of(one)) for one in (other, pair))
            raise InputError(f"--l2r would write {_l2r_name(pair)} for {a} and for {b}: rename one of these images")


def _show(path, fixed, moving, u, force, row, spacing):
    """Draw the overview of one pair to `path`, and return its viewer."""
    spacing = (spacing,) * 3
    warped = np.asarray(warp(jnp.asarray(moving.image)[..., None], u)[..., 0])
    title = f"{moving.id} to {fixed.id}"
    if row.get("dice") is not None:
        title += f"\nDice {row['dice_initial']:.3f} before, {row['dice']:.3f} after; J ≤ 0 in {row['fold_pct']:.4f} %"
    volumes = fixed.image, moving.image, warped, u, force, metrics.jacobian(u), spacing
    figures.overview(path, *volumes, title)
    return page.viewer(title.replace("\n", ": "), *volumes)


def evaluate_checkpoint(folder: str | Path, out: str | Path, root: str | Path | None = None, split: str = "test",
                        overrides: Sequence[str] = (), refine_steps: int = 0, l2r: str | Path | None = None,
                        others: Sequence[str] = ()) -> dict:
    """`evaluate` a checkpoint on its own data set, or on the folder `root`, and print the table of the scores.

    The images of a folder are downsampled by the whole factor that brings their voxels nearest to those of the
    training. `others` are names of `rivals.METHODS`. These methods run on the same pairs afterwards.

    Raises InputError where `l2r` or `others` are given for a data set without files.
    """
    config, params, about = load_checkpoint(folder)
    voxel = about["spacing"] * config.data.downsample
    if root is not None:
        config.data = {"name": "folder", "root": str(root), "exclude": tuple(config.data.get("exclude", ())),
                       "splits": None, "atlas": None, "downsample": 0}
    config = configuration.override(config, overrides)
    if overrides:
        params = load_checkpoint(folder, [o for o in overrides if not o.startswith("--config.data.")])[1]
    dataset = data.load(config.data, (split,))
    if not config.data.downsample:
        config.data.downsample = downsample_to(voxel, dataset.spacing)
    if (l2r or others) and config.data.name != "folder":
        raise InputError("--l2r and --rivals work on files, and this data set has none: give --data FOLDER")
    others = rivals.installed(others)
    summary = evaluate(config, params, data.padded(dataset, grid_multiple(config)), split, out, folder,
                       refine_steps, l2r)
    print(markdown_table({key: summary[key] for key in summary["definitions"] if key in summary}))
    if others:
        print(rivals.compare(dataset, config.data.root, split, others, out, folder, refine_steps))
    print(f"Look at {Path(out) / 'report.html'}")
    return summary
