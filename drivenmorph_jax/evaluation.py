"""Scores of trained parameters on the pairs of a data set, and the report of them."""

import json
import resource
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict
from tqdm import tqdm

from drivenmorph_jax import (
    checkpoint,
    configuration,
    data,
    demons,
    explanation,
    logs,
    metrics,
    nifti,
    page,
    report,
    rivals,
    sharding,
    transforms,
)
from drivenmorph_jax.data.folder import IMAGE
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.explanation import by_level
from drivenmorph_jax.files import make_folder, replacing
from drivenmorph_jax.grid import average_pool, resize_field
from drivenmorph_jax.losses import lncc
from drivenmorph_jax.model import DrivenMorph, checked, driving_force, multiple
from drivenmorph_jax.warp import warp


def grid_multiple(config):
    """What every side of an image must be a multiple of."""
    return config.data.downsample * multiple(config.model)


def downsample_to(voxel, spacing):
    """The whole number that brings voxels of `spacing` mm nearest to those of `voxel` mm."""
    return max(1, round(voxel / spacing))


def make_predict(config, refine_steps=0):
    """A jitted function (params, fixed, moving (D, H, W)) -> u, u_inverse, driving force (D, H, W, 3), and the levels.

    The network sees the images pooled by `data.downsample`; its fields are resampled to their grid, and `refine_steps`
    iterations of `demons.refine` follow. The levels are the `LevelForces` of the network, coarse to fine, (D, H, W, 3)
    on grids of their own. All in voxels of the images.
    """
    model = DrivenMorph(FrozenConfigDict(config.model))

    @partial(jax.jit, compiler_options=sharding.compiler_options())
    def predict(params, fixed, moving):
        small = (average_pool(x[None, ..., None], config.data.downsample) for x in (fixed, moving))
        registration = model.apply({"params": params}, *small)
        fields = registration.u, registration.u_inverse, driving_force(registration)
        u, u_inverse, force = (resize_field(field, fixed.shape)[0] for field in fields)
        levels = jax.tree.map(lambda x: config.data.downsample * x[0], by_level(registration))
        if refine_steps:
            u = demons.refine(fixed[..., None], moving[..., None], u, refine_steps)
            u_inverse = demons.coarse_inverse(u)
        return u, u_inverse, force, levels

    return predict


def validate(predict, params, dataset):
    """Mean over the ordered val pairs: Dice and folding, or the LNCC of the images where there are no labels."""
    rows = []
    for fixed, moving in data.ordered_pairs(dataset.val):
        u = predict(params, fixed.image, moving.image)[0]
        if fixed.labels is None or moving.labels is None:
            rows.append({"val_lncc": float(_similarity(fixed.image, moving.image, u))})
            continue
        u = np.asarray(u)
        moved = metrics.warp_labels(moving.labels, u)
        rows.append({"val_dice": metrics.mean_dice(fixed.labels, moved, dataset.exclude),
                     "val_fold_pct": metrics.fold_pct(metrics.jacobian(u), metrics.brain(fixed.image))})
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


@jax.jit
def _similarity(fixed, moving, u):
    return lncc(warp(moving[..., None], u)[None], fixed[None, ..., None], 9)


def evaluate(config, params, dataset, split, out, training=None, refine_steps=0, l2r=None):
    """Score every ordered pair of a split, and write what was found to `out`.

    `summary.json`, `pairs.csv`, figures, and the same to read as `report.html` and `report.md`.

    Args:
      config: the training's, with `data` for this data set.
      params: of `DrivenMorph(config.model)`.
      split: "train", "val" or "test".
      training: folder whose `metrics.jsonl` gives the training curves, where there is one.
      refine_steps: iterations of Demons after the network.
      l2r: folder for Learn2Reg's fields of the pairs, where the data set is one of files.

    Returns:
      The summary. Raises InputError where the split has no pair.
    """
    pairs = data.ordered_pairs(getattr(dataset, split))
    if not pairs:
        raise InputError(f"{dataset.name} has no pair in its {split} split: put at least 2 subjects there")
    out = make_folder(out)
    predict = make_predict(config, refine_steps)
    images = (pairs[0][0].image, pairs[0][1].image)
    jax.block_until_ready(predict(params, *images))  # compiles

    rows, before, after, fields, forces = [], {}, {}, [], []
    brains = [metrics.brain(fixed.image) for fixed, _ in pairs]
    for (fixed, moving), brain in zip(tqdm(pairs, unit="pair", desc=split, dynamic_ncols=True), brains, strict=True):
        start = time.perf_counter()
        u, u_inverse, force, levels = jax.block_until_ready(predict(params, fixed.image, moving.image))
        seconds = time.perf_counter() - start
        u, u_inverse = np.asarray(u), np.asarray(u_inverse)
        u_true = data.true_displacement(fixed, moving) if fixed.to_template is not None else None
        row = metrics.pair_metrics(u, u_inverse, fixed.labels, moving.labels, (dataset.spacing,) * 3,
                                   brain, dataset.exclude, u_true=u_true)
        rows.append({"fixed": fixed.id, "moving": moving.id, **row, "seconds": seconds})
        if l2r:
            _write_l2r(l2r, config.data.root, fixed, moving, u)
        fields.append((u.astype(np.float16), np.asarray(force, np.float16)))
        forces.append(jax.tree.map(lambda x: np.asarray(x, np.float16), levels))
        if "dice" in row:
            for found, labels in ((before, moving.labels), (after, metrics.warp_labels(moving.labels, u))):
                for label, value in metrics.dice(fixed.labels, labels, dataset.exclude).items():
                    found.setdefault(label, []).append(value)

    figures, viewers = {}, []
    rank = np.argsort([row.get("dice", row["sdlogj"]) for row in rows])
    for name, place in (("Worst", rank[0]), ("Median", rank[len(rank) // 2]), ("Best", rank[-1])):
        figures[f"{name} pair"] = out / f"{name.lower()}.png"
        viewers.append(_show(figures[f"{name} pair"], *pairs[place], *fields[place], rows[place], dataset.spacing))
    if after:
        figures["Dice by structure"] = out / "dice.png"
        report.dice_boxplot(figures["Dice by structure"], before, after, dataset.label_names)
    steps = logs.read(training) if training else []
    if steps:
        figures["Training"] = out / "training.png"
        report.curves(figures["Training"], steps)

    found = [{**{f"level {i}": (level.force, level.remaining) for i, level in enumerate(levels, start=1)},
              "total": (force, u)} for levels, (u, force) in zip(forces, fields, strict=True)]
    statistics = explanation.statistics(found, brains)
    middle = rank[len(rank) // 2]
    figures["Force by level, median pair"] = out / "forces.png"
    report.forces(figures["Force by level, median pair"], pairs[middle][0].image, forces[middle],
                  (dataset.spacing,) * 3)

    scores = metrics.summarise(rows)
    summary = {"data": dataset.name, "split": split, "pairs": len(rows), "spacing_mm": dataset.spacing,
               "refine_steps": refine_steps,
               "device": jax.devices()[0].device_kind, "excluded_labels": list(dataset.exclude),
               "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
               "definitions": {key: metrics.DEFINITIONS[key] for key in (*scores, *report.OF_FORCE, "brain")},
               "force": statistics, **scores}
    report.pairs_csv(out / "pairs.csv", rows)
    force = explanation.markdown(statistics)
    report.report_md(out / "report.md", scores, rows, figures, force)
    page.report(out / "report.html", f"{dataset.name}, {split}", scores, rows, force, figures, viewers)
    with replacing(out / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _write_l2r(folder, root, fixed, moving, u):
    """disp_<fixed>_<moving>.nii.gz: (X, Y, Z, 3) in voxels of the two files, identity not included."""
    files = [nifti.load_image(Path(root) / f"{subject.id}{IMAGE}") for subject in (fixed, moving)]
    found = transforms.learn2reg_displacement(files[0].data.shape, files[0].affine, u, fixed.affine, files[1].affine)
    nifti.save(make_folder(folder) / f"disp_{fixed.id}_{moving.id}.nii.gz", found, files[0])


def _show(path, fixed, moving, u, force, row, spacing):
    """Draw one pair's picture to `path`; returns its viewer."""
    u, force, spacing = u.astype(np.float32), force.astype(np.float32), (spacing,) * 3
    warped = np.asarray(warp(jnp.asarray(moving.image)[..., None], u)[..., 0])
    title = f"{moving.id} to {fixed.id}"
    if "dice" in row:
        title += f"\nDice {row['dice_initial']:.3f} before, {row['dice']:.3f} after; J ≤ 0 in {row['fold_pct']:.4f} %"
    volumes = fixed.image, moving.image, warped, u, force, metrics.jacobian(u), spacing
    report.overview(path, *volumes, title)
    return page.viewer(title.replace("\n", ": "), *volumes)


def load_checkpoint(folder, overrides=()):
    """(config, params, about) of a checkpoint, its settings overridden by `--config.KEY=VALUE` arguments.

    Raises InputError where it is none, or does not fit the model that the settings describe.
    """
    about = checkpoint.read_about(folder)
    config = configuration.override(configuration.from_dict(about["config"]), overrides)
    model = DrivenMorph(checked(config.model))
    image = jax.ShapeDtypeStruct((1, *[2 * multiple(config.model)] * 3, 1), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image, image)["params"]
    on_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_device), shapes)
    return config, checkpoint.read_params(folder, shapes), about


def evaluate_checkpoint(folder, out, root=None, split="test", overrides=(), refine_steps=0, l2r=None,
                        others=()):
    """`evaluate` a checkpoint on its own data set, or on the folder `root`, and print the table.

    `others` are names of `rivals.METHODS` to run on the same pairs afterwards.

    The folder is downsampled by the whole number that brings its voxels nearest to those the network was trained on.
    """
    config, params, about = load_checkpoint(folder)
    voxel = about["spacing"] * config.data.downsample
    if root is not None:
        config.data = {"name": "folder", "root": str(root), "exclude": tuple(config.data.get("exclude", ())),
                       "splits": None, "downsample": 0}
    configuration.override(config, overrides)
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
    print(report.markdown_table({key: summary[key] for key in summary["definitions"] if key in summary}))
    if others:
        print(rivals.compare(dataset, config.data.root, split, others, out, folder, refine_steps))
    print(f"Look at {Path(out) / 'report.html'}")
    return summary
