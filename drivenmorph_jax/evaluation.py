"""Scores of trained parameters on the pairs of a data set, and the report of them."""

import hashlib
import json
import math
import resource
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError
from tqdm import tqdm

from drivenmorph_jax import (
    checkpoint,
    configuration,
    data,
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
from drivenmorph_jax.files import make_folder, read_rows, replacing, rows_text
from drivenmorph_jax.grid import average_pool, resize_field
from drivenmorph_jax.losses import lncc
from drivenmorph_jax.model import driving_force
from drivenmorph_jax.networks import make_network, multiple
from drivenmorph_jax.refinement import refined
from drivenmorph_jax.warp import warp


def grid_multiple(config):
    """What every side of an image must be a multiple of."""
    return config.data.downsample * math.lcm(multiple(config.model), config.get("space", 1))


def downsample_to(voxel, spacing):
    """The whole number that brings voxels of `spacing` mm nearest to those of `voxel` mm."""
    return max(1, round(voxel / spacing))


def make_predict(config, refine_steps=0):
    """A jitted function (params, fixed, moving (B, D, H, W)) -> u, u_inverse, force (B, D, H, W, 3), and the levels.

    The network sees the images pooled by `data.downsample`; its fields are resampled to their grid, and
    `refinement.refined`, with `refine_steps` iterations of Demons, carries them further. The force and the levels, its
    `LevelForces`, coarse to fine, (B, D, H, W, 3) on grids of their own, are those of the first look. All in voxels of
    the images. A batch that is split over devices is computed there.

    A fourth argument, weights (B, D, H, W, 2) of the fixed and the moving image, is 0 where one of them does not count
    and 1 elsewhere.

    Called again with the same settings it returns the same function, so that nothing is compiled twice in a process.
    """
    return _predict(make_network(config.model), config.data.downsample, refine_steps)


@lru_cache(maxsize=8)
def _predict(model, downsample, refine_steps):
    @partial(jax.jit, compiler_options=sharding.compiler_options())
    def predict(params, fixed, moving, weights=None):
        def network(fixed, moving, weights):
            small = [average_pool(x[..., None], downsample) for x in (fixed, moving)]
            if weights is not None:
                small.append(average_pool(weights, downsample))
            try:
                registration = model.apply({"params": params}, *small)
            except FlaxError as error:
                raise InputError("the checkpoint belongs to another version of its model: train it again") from error
            fields = registration.u, registration.u_inverse, driving_force(registration)
            levels = jax.tree.map(lambda x: downsample * x, by_level(registration))
            return *(resize_field(field, fixed.shape[1:]) for field in fields), levels

        if refine_steps:
            return refined(network, fixed, moving, refine_steps, weights)
        return network(fixed, moving, weights)

    return predict


def predictions(predict, params, pairs, space=1):
    """For each (fixed, moving) in turn: (what `predict` found, as NumPy arrays without the batch axis; seconds).

    As many pairs at a time as this process has devices, each on one of them, or on `space` where so many are there.
    Accelerators work on the next pairs while the caller looks at the last ones; a CPU would have to do both at once,
    and the seconds would tell of both.
    """
    mesh = sharding.device_mesh(math.gcd(space, jax.local_device_count()), jax.local_devices())
    params = jax.device_put(params, sharding.replicated(mesh))
    at_once = mesh.shape["data"]
    groups = [pairs[i:i + at_once] for i in range(0, len(pairs), at_once)]

    def run(group):
        whole = group + group[:1] * (at_once - len(group))
        start = time.perf_counter()
        images = (np.stack([pair[role].image for pair in whole]) for role in (0, 1))
        found = jax.block_until_ready(predict(params, *jax.device_put(tuple(images), sharding.split_batch(mesh))))
        return jax.device_get(found), (time.perf_counter() - start) / len(group)

    with ThreadPoolExecutor(1) as ahead:
        ahead_by = 0 if jax.default_backend() == "cpu" else 1
        running = deque()
        for i, group in enumerate(groups):
            running.extend(ahead.submit(run, later) for later in groups[i + len(running):i + 1 + ahead_by])
            found, seconds = running.popleft().result()
            for k in range(len(group)):
                yield jax.tree.map(lambda x, k=k: x[k], found), seconds


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


def evaluate(config, params, dataset, split, out, training=None, refine_steps=0, l2r=None):
    """Score every ordered pair of a split, and write what was found to `out`.

    `summary.json`, `pairs.csv`, figures, and the same to read as `report.html` and `report.md`. `pairs.jsonl` grows by
    a line a pair, with the Dice of every label besides: a run that was stopped goes on from there, if network, settings
    and images are still the same.

    Args:
      config: the training's, with `data` for this data set.
      params: of the network of `config.model`.
      split: "train", "val" or "test".
      training: folder whose `metrics.jsonl` gives the training curves, where there is one.
      refine_steps: iterations of Demons in `refinement.refined`; 0: the network alone.
      l2r: folder for Learn2Reg's fields of the pairs, where the data set is one of files.

    Returns:
      The summary. Raises InputError where the split has no pair.
    """
    subjects, pairs = getattr(dataset, split), dataset.pairs(split)
    if len(subjects) < 2:
        raise InputError(f"{dataset.name} has no pair in its {split} split: put at least 2 subjects there")
    out = make_folder(out)
    predict, space = make_predict(config, refine_steps), config.get("space", 1)
    record = Record(out, _identity(config, params, subjects, dataset.atlas, refine_steps, l2r))
    # The control of a fixed image's pairs: the force between two images of which neither is this one, if there are.
    jobs = []
    for k, fixed in enumerate(subjects):
        left = [pair for pair in pairs if pair[0] is fixed and _names(pair) not in record.rows]
        if left:
            other, next_but_one = (subjects[(k + i) % len(subjects)] for i in (1, 2))
            jobs += [(True, (other, dataset.atlas or next_but_one)), *((False, pair) for pair in left)]
    if jobs:
        for _ in predictions(predict, params, pairs[:1], space):  # compiles
            pass
    with tqdm(total=len(pairs), initial=len(record.rows), unit="pair", desc=split, dynamic_ncols=True) as bar:
        found = predictions(predict, params, [pair for _, pair in jobs], space)
        for (is_control, pair), (fields, seconds) in zip(jobs, found, strict=True):
            if is_control:
                control = fields
                continue
            record.add(_scored(pair, fields, control, seconds, dataset))
            if l2r:
                _write_l2r(l2r, config.data.root, *pair, fields[0])
            report.pairs_csv(out / "pairs.csv", [one["scores"] for one in record.rows.values()])
            bar.update()
    found = [record.rows[_names(pair)] for pair in pairs]
    rows = [one["scores"] for one in found]

    figures, viewers = {}, []
    rank = np.argsort([row.get("dice", row["sdlogj"]) for row in rows])
    shown = {"Worst": rank[0], "Median": rank[len(rank) // 2], "Best": rank[-1]}
    statistics = explanation.statistics([one["force"] for one in found], [one["control"] for one in found])
    again = predictions(predict, params, [pairs[place] for place in shown.values()], space)
    for (name, place), ((u, _, force, levels), _) in zip(shown.items(), again, strict=True):
        figures[f"{name} pair"] = out / f"{name.lower()}.png"
        viewers.append(_show(figures[f"{name} pair"], *pairs[place], u, force, rows[place], dataset.spacing))
        if name == "Median" and statistics:
            figures["Force by level, median pair"] = out / "forces.png"
            report.forces(out / "forces.png", pairs[place][0].image, levels, (dataset.spacing,) * 3)
    if any(one["dice"] for one in found):
        figures["Dice by structure"] = out / "dice.png"
        report.dice_boxplot(figures["Dice by structure"], *_by_label(found), dataset.label_names)
    steps = logs.read(training) if training else []
    if steps:
        figures["Training"] = out / "training.png"
        report.curves(figures["Training"], steps)

    scores = metrics.summarise(rows)
    of_force = report.OF_FORCE if statistics else ()
    summary = {"data": dataset.name, "split": split, "pairs": len(rows), "spacing_mm": dataset.spacing,
               "refine_steps": refine_steps,
               "environment": checkpoint.environment(), "excluded_labels": list(dataset.exclude),
               "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
               "definitions": {key: metrics.DEFINITIONS[key] for key in (*scores, *of_force, "brain")},
               "force": statistics, **scores}
    force = explanation.markdown(statistics) if statistics else ""
    report.report_md(out / "report.md", scores, rows, figures, force)
    page.report(out / "report.html", f"{dataset.name}, {split}", scores, rows, force, figures, viewers)
    with replacing(out / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n")
    return summary


class Record:
    """The pairs that a run has scored, `rows` {(fixed, moving): what `_scored` returns}, kept in out/pairs.jsonl.

    The first line says whose they are. Those of another run, or of one that has ended (its summary.json is there), are
    dropped, and so is a line that was cut short.
    """

    def __init__(self, out, identity):
        self.path, summary, head = out / "pairs.jsonl", out / "summary.json", {"run": identity}
        first, *kept = read_rows(self.path) or [None]
        if first != head or summary.is_file():
            kept = []
        summary.unlink(missing_ok=True)
        with replacing(self.path) as temporary:
            temporary.write_text(rows_text([head, *kept]))
        self.rows = {(row["scores"]["fixed"], row["scores"]["moving"]): row for row in kept}

    def add(self, row):
        with self.path.open("a") as file:
            file.write(rows_text([row]))
        self.rows[row["scores"]["fixed"], row["scores"]["moving"]] = row


def _names(pair):
    return tuple(subject.id for subject in pair)


def _identity(config, params, subjects, atlas, refine_steps, l2r):
    """A digest of all that the scores follow from."""
    subjects = subjects if atlas is None else (*subjects, atlas)
    settings = [config.to_dict(), checkpoint.git_commit(), refine_steps, str(l2r), [s.id for s in subjects]]
    digest = hashlib.sha256(json.dumps(settings).encode())
    arrays = [x for s in subjects for x in (s.image, s.labels) if x is not None]
    for x in jax.tree.leaves(params) + arrays:
        digest.update(np.ascontiguousarray(x))
    return digest.hexdigest()


def _scored(pair, fields, control, seconds, dataset):
    """What is kept of a pair, as JSON has it: its scores, Dice of each label before and after, and its force's."""
    (fixed, moving), (u, u_inverse, force, levels) = pair, fields
    brain = metrics.brain(fixed.image)
    u_true = data.true_displacement(fixed, moving) if fixed.to_template is not None else None
    scores = metrics.pair_metrics(u, u_inverse, fixed.labels, moving.labels, (dataset.spacing,) * 3, brain,
                                  dataset.exclude, u_true=u_true)
    dice = {}
    if "dice" in scores:
        before, after = (metrics.dice(fixed.labels, labels, dataset.exclude, moving.labels)
                         for labels in (moving.labels, metrics.warp_labels(moving.labels, u)))
        dice = {str(label): [before[label], value] for label, value in after.items()}
    own, other = (explanation.by_name(*found) for found in ((u, force, levels), (control[0], *control[2:])))
    return {"scores": {"fixed": fixed.id, "moving": moving.id, **scores, "seconds": seconds}, "dice": dice,
            "force": explanation.of_pair(own, own, brain), "control": explanation.of_pair(other, own, brain)}


def _by_label(found):
    """{label: [Dice of each pair]} before and after."""
    sides = {}, {}
    for one in found:
        for label, values in one["dice"].items():
            for side, value in zip(sides, values, strict=True):
                side.setdefault(int(label), []).append(value)
    return sides


def _write_l2r(folder, root, fixed, moving, u):
    """disp_<fixed>_<moving>.nii.gz: (X, Y, Z, 3) in voxels of the two files, identity not included."""
    files = [nifti.load_image(Path(root) / f"{subject.id}{IMAGE}") for subject in (fixed, moving)]
    displacement = transforms.total_displacement(files[0].data.shape, files[0].affine, u, fixed.affine, np.eye(4))
    found = transforms.Transform(displacement, files[0], np.eye(4), files[1])
    found.save_learn2reg(make_folder(folder) / f"disp_{fixed.id}_{moving.id}.nii.gz")


def _show(path, fixed, moving, u, force, row, spacing):
    """Draw one pair's picture to `path`; returns its viewer."""
    spacing = (spacing,) * 3
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
    model = make_network(config.model)
    if config.model == configuration.from_dict(about["config"]["model"]):
        shapes = checkpoint.read_shapes(folder)
    else:  # seconds of tracing
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
                       "splits": None, "atlas": None, "downsample": 0}
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
