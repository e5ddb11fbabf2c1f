"""An unbiased template of N images: affine average, then rounds of registration, averaging and moving.

The affines are found from one of the images, and the world of the template is the one in which their mean logarithm is
0. A round registers the mean to every image by Demons, phi_i = id + u_i, and moves it by the inverse of the mean
velocity:

  v = mean of u_i,    phi_i <- phi_i o exp(-v),    mean <- robust mean of x_i o phi_i

So every point of the template is the mean of the points that correspond to it. The rounds end where the phi_i stand
still. v need not become 0: a registration to a mean has an error that all subjects share, and the move removes it.

Each stage of each subject is a `template_step.Step`, which leaves a file. So the same command continues a run that was
stopped, and other processes can compute the steps.

Reference: Guimond, Meunier, Thirion, "Average brain models: a convergence study", 2000; Avants, Gee, "Geodesic
  estimation for large deformation anatomical shape averaging and interpolation", 2004.
"""

import json
import os
import shutil
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from scipy import stats
from tqdm import tqdm

from drivenmorph_jax import demons
from drivenmorph_jax.data.bids import bids
from drivenmorph_jax.data.layouts import folder as layout_of_folder
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.fields.grid import average_pool, resize, resize_field
from drivenmorph_jax.fields.integrate import exponential
from drivenmorph_jax.fields.warp import warp
from drivenmorph_jax.files import SUMMARY, alone_in, former_files, json_text, make_folder, write_json
from drivenmorph_jax.images import writing
from drivenmorph_jax.images.average import robust_mean, sharpened, vote
from drivenmorph_jax.images.geometry import checked
from drivenmorph_jax.images.intensity import foreground
from drivenmorph_jax.images.volume import on_grid
from drivenmorph_jax.registration.cluster import run_on
from drivenmorph_jax.registration.job import DONE, FAILED, made, made_from
from drivenmorph_jax.registration.read import AFFINES, CHOICES, millilitres, scale_of, scaled_grid
from drivenmorph_jax.registration.template_report import DEFINITIONS, write_report
from drivenmorph_jax.registration.template_step import ITERATIONS, STATE, STRIDE, Step, save, shared
from drivenmorph_jax.runtime.provenance import environment
from drivenmorph_jax.transforms.affine import centred
from drivenmorph_jax.transforms.world import map_points

SPACING = 1.0  # mm, the finest voxels of a template by default
COARSEST = 4.5  # mm, the coarsest voxels of a round
MOST = {4: 4, 2: 4, 1: 3}  # rounds, by how many times coarser their images are than the template
STILL = 0.125  # voxels of a round; where it changes the transforms by less, a finer round follows
MARGIN = 8.0  # mm around the brains
CHANCE = 0.05  # probability by which a subject counts as closer than chance


def images_of_folder(folder):
    """The images of a folder, ID.nii.gz or ID_t1.nii.gz with ID_seg.nii.gz: {id: {"image": path, "labels": path}}.

    Raises InputError where it is no folder, or has fewer than two images or two of one id.
    """
    return _found(folder, layout_of_folder)


def images_of_bids(folder):
    """The T1w images of a BIDS folder, as `drivenmorph prepare bids` takes them: {id: {"image": path, "labels": path}}.

    Raises InputError where it is no folder, or has fewer than two images.
    """
    return _found(folder, bids)


def _found(folder, layout):
    if not Path(folder).is_dir():
        raise InputError(f"{folder} is not a folder: give the one that holds the images")
    found = {id: {"image": image} | ({} if labels is None else {"labels": labels})
             for id, (image, labels, _) in layout(Path(folder)).items()}
    if len(found) < 2:
        raise InputError(f"{folder} holds {len(found)} images: a template needs two or more")
    return found


def build_template(images, out, *, spacing=None, affine="affine", strip="auto", geometry="sform", formats=("itk",),
                   scheduler=None, time_limit=None):
    """Make the unbiased template of images of brains, and write it to the folder `out`, as `drivenmorph template` does.

    Args:
      images: {id: {"image": path, "labels": path}}, as `images_of_folder` finds them. Their order does not matter.
      out: a folder; it is made if it does not exist.
      spacing: of the template, in mm; by default that of the images, but not finer than 1.
      affine: "affine", "similarity" or "rigid", by which the images are aligned first; or "none", where their world
        coordinates agree already.
      strip, geometry: as in `register`.
      formats: of the transforms, as in `Result.save`.
      scheduler, time_limit: of a Dask cluster, as in `register_cohort`; the time is for one stage of one subject.

    Returns:
      The content of out/summary.json.

    Raises InputError for an image that cannot be used, which is named, where another run uses `out`, or where it cannot
    be written.
    """
    start = time.perf_counter()
    settings = {"spacing": spacing, "affine": affine, "strip": strip, "geometry": checked(geometry)}
    for name, choices in (("affine", AFFINES), ("strip", CHOICES["strip"])):
        if settings[name] not in choices:
            raise InputError(f"{name} is {settings[name]!r}: set it to one of {', '.join(choices)}")
    if len(images) < 2:
        raise InputError("a template needs two images or more: give further ones")
    images = {id: {role: os.path.abspath(path) for role, path in images[id].items()} for id in sorted(images)}
    origin = made_from({f"{role} of {id}": path for id, files in images.items() for role, path in files.items()},
                       settings, formats, None)
    out = make_folder(os.path.abspath(out))

    def run(stage, **found):
        """Compute a stage of all images."""
        steps = [Step(id, str(out), files, settings | found, tuple(formats), origin, stage)
                 for id, files in images.items()]
        _run(steps, scheduler, time_limit)
        return steps

    with alone_in(out):
        former = former_files(out, ("subjects",))
        if found := made(out / SUMMARY, origin):
            return found
        _begin(out, origin)
        brains = run("read")
        found = _once(out, "first.json", lambda: _first(brains, spacing))
        affines = run("affine", **found)
        found |= _once(out, "grid.json", lambda: _grid(affines, found["spacing"]))
        aligned = run("resample", **found)
        rounds = _rounds(out, aligned, found["spacing"], lambda stage, factor: run(stage, **found, factor=factor))
        for name in (SUMMARY, *former):
            (out / name).unlink(missing_ok=True)
        written = run("write", **found, rounds=len(rounds))
        averages, like = _averages(written), _like(found)
        for name, data in averages.items():
            writing.save(out / name, data, like)
        summary = _summary(written, found, rounds, averages["template.nii.gz"])
        write_report(out, summary, _means(out, rounds) | {"Template": averages["template.nii.gz"]})
        files = [out / name for name in (*averages, "report.html", "template.png")]
        files += [path for step in written for path in step.files_written()]
        summary |= {"made_from": origin, "seconds": time.perf_counter() - start,
                    "files": sorted(path.relative_to(out).as_posix() for path in files)}
        write_json(out / SUMMARY, summary)
        shutil.rmtree(out / STATE)
    return summary


def _begin(out, origin):
    """Keep the intermediate results of a run that was stopped, if it was made from the same, else begin anew."""
    path = shared(out, "made_from.json")
    if not path.is_file() or json.loads(path.read_text()) != json.loads(json_text(origin)):
        shutil.rmtree(path.parent, ignore_errors=True)
        make_folder(path.parent)
        write_json(path, origin)


def _once(out, name, make):
    """The content of a JSON file of the intermediate results; where it is missing, it is made."""
    path = shared(out, name)
    if not path.is_file():
        write_json(path, make())
    return json.loads(path.read_text())


def _run(steps, scheduler, time_limit):
    """Compute the steps that are missing, here or on a cluster. Raises InputError, which names the first that fails."""
    left, failures = [step for step in steps if step.state()["status"] != DONE], []
    with tqdm(total=len(steps), initial=len(steps) - len(left), desc=f"{steps[0].stage:8}", unit="image",
              dynamic_ncols=True) as bar:

        def told(step, state):
            if state["status"] == FAILED:
                failures.append(f"{step.name} cannot be part of the template: {state['error']}")
            bar.update(1)

        if scheduler is not None and left:
            run_on(scheduler, left, told, time_limit)
        while scheduler is None and left and not failures:
            step = left.pop(0)
            with step.alone():
                step.forget()
                step.run()
            told(step, step.state())
    if failures:
        raise InputError(f"{failures[0]}; repair this image or take it out, then give the same command again")


def _first(brains, spacing):
    """The image that the affines start from, which is that of median volume; the voxel size; the scale of lengths."""
    sizes, finest = [], []
    for step in brains:
        image = step.brain()
        sizes.append((millilitres(foreground(image.data), image.affine), step.name))
        finest.append(image.spacing.min())
    scale = scale_of(float(np.median([size for size, _ in sizes])))
    return {"first": sorted(sizes)[(len(sizes) - 1) // 2][1], "scale": scale,
            "spacing": max(SPACING, float(np.median(finest)) * scale) if spacing is None else spacing * scale}


def _grid(steps, spacing):
    """The affines from the world of the template, and a grid along its axes around all brains."""
    affines = centred([np.load(step.path) for step in steps])
    bounds = []
    for step, affine in zip(steps, affines, strict=True):
        image = step.brain()
        inside = np.argwhere(foreground(image.data))[::50]
        bounds.append(np.percentile(map_points(np.linalg.inv(affine) @ image.affine, inside), (0.05, 99.95), axis=0))
    low, high = np.min(bounds, (0, 1)) - MARGIN, np.max(bounds, (0, 1)) + MARGIN
    shape = demons.MULTIPLE * np.ceil(((high - low) / spacing + 1) / demons.MULTIPLE).astype(int)
    grid = np.diag([spacing, spacing, spacing, 1.0])
    grid[:3, 3] = (low + high) / 2 - spacing * (shape - 1) / 2
    return {"affines": {step.name: affine.tolist() for step, affine in zip(steps, affines, strict=True)},
            "shape": shape.tolist(), "grid": grid.tolist()}


def _rounds(out, aligned, spacing, run):
    """All rounds, from coarse to fine: what each found, a dict. `run(stage, factor)` computes the steps of a round."""
    rounds = json.loads(path.read_text()) if (path := shared(out, "rounds.json")).is_file() else []
    while factor := _following(rounds, spacing):
        number, start = len(rounds) + 1, time.perf_counter()
        mean = _mean(out, aligned, number, factor)
        steps = run(f"round-{number}", factor)
        v = sum(np.load(step.path).astype(np.float64) for step in steps) / len(steps)
        save(shared(out, f"move-{number}.npy"), exponential(-jnp.asarray(v, jnp.float32)))
        brain, voxel = _coarse_brain(mean, STRIDE), factor * spacing
        lengths = []
        for step in steps:
            new, old = step.field(number), step.field(number - 1)
            change = new if old is None else new - resize_field(old, new.shape[:3])
            lengths.append([_length(u, brain) * STRIDE * voxel for u in (change, new)])
        change, distance = np.mean(lengths, axis=0).tolist()
        rounds.append({"factor": factor, "voxel_mm": voxel, "change_mm": change, "distance_mm": distance,
                       "moved_mm": _length(v, brain) * STRIDE * voxel, "sharpness": sharpness(mean, voxel),
                       "seconds": time.perf_counter() - start})
        write_json(path, rounds)
    return rounds


def _following(rounds, spacing):
    """How many times coarser than the template the next round is; None where no other follows."""
    factors = [factor for factor in ITERATIONS if factor == 1 or factor * spacing <= COARSEST]
    if not rounds:
        return factors[0]
    last = rounds[-1]["factor"]
    if not _still(rounds[-1]) and sum(one["factor"] == last for one in rounds) < MOST[last]:
        return last
    return next((factor for factor in factors if factor < last), None)


def _still(one):
    """Whether a round hardly changed the transforms."""
    return one["change_mm"] <= STILL * one["voxel_mm"]


def _mean(out, aligned, number, factor):
    """The mean (D, H, W) that a round registers, of the images as the round before left them."""
    path = shared(out, f"mean-{number}.npy")
    if not path.is_file():
        shape = tuple(n // factor for n in np.load(aligned[0].path, mmap_mode="r").shape)
        warped = np.lib.format.open_memmap(shared(out, "stack.npy"), "w+", np.float32, (len(aligned), *shape))
        for step, place in zip(aligned, warped, strict=True):
            image, u = step.aligned(factor), step.field(number - 1)
            place[...] = np.asarray(image if u is None else warp(image, resize_field(u, shape)))[..., 0]
        save(path, robust_mean(warped))
    return np.load(path)


def _coarse_brain(mean, factor):
    """The foreground of an image (D, H, W) on a coarser grid: bool."""
    return foreground(np.asarray(average_pool(jnp.asarray(mean)[..., None], factor))[..., 0])


def _length(u, inside):
    """The mean length of the vectors of a field inside a mask, in voxels."""
    return float(np.linalg.norm(np.asarray(u)[inside], axis=-1).mean())


def sharpness(image, spacing):
    """The root mean square of the gradient of an image (D, H, W) over its foreground, per mm."""
    squares = sum(np.gradient(image, spacing, axis=axis) ** 2 for axis in range(3))
    return float(np.sqrt(squares[foreground(image)].mean()))


def _averages(written):
    """{name of a file: (D, H, W)}: the template and, where there are label maps, their vote."""
    found = {"template.nii.gz": sharpened(robust_mean([np.load(step.path, mmap_mode="r") for step in written]))}
    maps = [np.load(step.notes / "labels.npy", mmap_mode="r") for step in written if "labels" in step.files]
    if maps:
        found |= zip(("template_labels.nii.gz", "template_confidence.nii.gz"), vote(maps), strict=True)
    return found


def _like(found):
    """The grid of the template, in the lengths of the files."""
    return on_grid(found["shape"], scaled_grid(found["grid"], 1 / found["scale"]))


def _summary(written, found, rounds, template):
    """The content of summary.json but for seconds and files."""
    spacing, scale = found["spacing"] / found["scale"], found["scale"]
    brain, inside, distances, total = _coarse_brain(template, STRIDE), foreground(template), [], 0
    for step in written:
        u = np.asarray(step.field(len(rounds)), np.float64) * STRIDE * spacing
        distances.append(_length(u, brain))
        total = total + u
    distances = np.array(distances)
    deviation = (distances - distances.mean()) / max(distances.std(ddof=1), 1e-9)
    subjects = {}
    for step, distance, z in zip(written, distances.tolist(), deviation.tolist(), strict=True):
        linear = np.array(found["affines"][step.name])[:3, :3]
        r = np.corrcoef(np.load(step.path, mmap_mode="r")[inside], template[inside])[0, 1]
        subjects[step.name] = {**step.files, "distance_mm": distance, "deviation": z, "correlation": float(r),
                               "affine_scale": float(np.cbrt(np.linalg.det(linear)))}
    return {"images": len(written), "labelled": sum("labels" in step.files for step in written),
            "voxel_mm": spacing, "shape": list(template.shape), "scale": scale, "first": found["first"],
            "rounds": [_unscaled(one, scale) for one in rounds], "still": _still(rounds[-1]),
            "sharpness": sharpness(template, spacing), "bias_mm": _length(total / len(written), brain),
            "chance_mm": float(distances.mean() / np.sqrt(len(written))), "closest": float(deviation.min()),
            "closest_by_chance": -grubbs(len(written)), "subjects": subjects, "definitions": DEFINITIONS,
            "environment": environment()}


def _unscaled(one, scale):
    """What a round found, in the lengths of the files."""
    return one | {name: one[name] / scale for name in ("voxel_mm", "change_mm", "distance_mm", "moved_mm")} | {
        "sharpness": one["sharpness"] * scale}


def grubbs(n):
    """The number of standard deviations from the mean that the least of n normal numbers exceeds with the probability
    `CHANCE`; infinite for two.

      (n - 1) / sqrt(n) sqrt(t^2 / (n - 2 + t^2)),    t the quantile 1 - CHANCE / n of Student's t with n - 2

    Reference: Grubbs, "Sample criteria for testing outlying observations", 1950.
    """
    if n < 3:
        return float("inf")
    t = stats.t.isf(CHANCE / n, n - 2)
    return float((n - 1) / np.sqrt(n) * np.sqrt(t**2 / (n - 2 + t**2)))


def _means(out, rounds):
    """{name: (D, H, W)}: the mean that each round registered, on the grid of the last."""
    means = [np.load(shared(out, f"mean-{number}.npy")) for number in range(1, len(rounds) + 1)]
    names = ["Affine mean", *(f"After round {number}" for number in range(1, len(rounds)))]
    return {name: np.asarray(resize(jnp.asarray(mean)[..., None], means[-1].shape))[..., 0]
            for name, mean in zip(names, means, strict=True)}

