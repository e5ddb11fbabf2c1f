"""Other registration methods on the same pairs, with the same scores and the same timing.

Each method is a command of its own, `python -m drivenmorph_jax.evaluation.rivals METHOD FIXED MOVING OUT`. The command
starts Python, reads two files and writes one displacement field. The seconds are those of the whole command. Commands
run one after the other. requirements-rivals.txt lists the packages that the project does not install.
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.files import make_folder, read_rows, replacing, rows_text
from drivenmorph_jax.runtime.shipped import VERSION, shipped

ROOT = Path(__file__).resolve().parents[2]  # the folder of the package, for a command in another folder


def network(fixed, moving, out, checkpoint, refine_steps="0"):
    """A network of this project, with the weights in the folder `checkpoint`."""
    from drivenmorph_jax.network.inference import downsample_to, grid_multiple, load_checkpoint, make_predict
    from drivenmorph_jax.runtime import sharding

    sharding.start()
    config, params, about = load_checkpoint(checkpoint)
    f, m = _images(fixed, moving)
    voxel = about["spacing"] * config.data.downsample
    config.data.downsample = downsample_to(voxel, float(f.spacing.mean()))
    predict = make_predict(config, int(refine_steps))
    _write(out, f, predict(params, *(x[None] for x in _padded(f, m, grid_multiple(config))))[0][0])


def demons(fixed, moving, out, force="lncc"):
    """The classical Demons of this project; `force` as in `register`."""
    from drivenmorph_jax.demons import MULTIPLE, registered
    from drivenmorph_jax.runtime import sharding

    sharding.start()
    f, m = _images(fixed, moving)
    _write(out, f, registered(*(x[..., None] for x in _padded(f, m, MULTIPLE)), force))


def itk_demons(fixed, moving, out):
    """SimpleITK's diffeomorphic Demons, on three levels."""
    import SimpleITK as sitk

    f, m = (sitk.ReadImage(path, sitk.sitkFloat32) for path in (fixed, moving))
    m = sitk.HistogramMatching(m, f, 128, 10, True)
    registration = sitk.DiffeomorphicDemonsRegistrationFilter()
    registration.SetStandardDeviations(1.5)
    field = None
    for factor, count in ((4, 100), (2, 60), (1, 30)):
        small = [sitk.Shrink(sitk.SmoothingRecursiveGaussian(x, 0.5 * factor), [factor] * 3) if factor > 1 else x
                 for x in (f, m)]
        registration.SetNumberOfIterations(count)
        field = (registration.Execute(*small) if field is None
                 else registration.Execute(*small, sitk.Resample(field, small[0])))
    sitk.WriteImage(field, out)


def greedy(fixed, moving, out):
    """Greedy, with local correlation over 5^3 voxels."""
    from picsl_greedy import Greedy3D
    Greedy3D().execute(f"-d 3 -m WNCC 2x2x2 -i {fixed} {moving} -n 100x50x20 -o {out}")


def syn(fixed, moving, out):
    """ANTs SyN, with mutual information."""
    import ants
    f, m = ants.image_read(fixed), ants.image_read(moving)
    _save(f, m, ants.registration(f, m, "SyNOnly", reg_iterations=(100, 70, 20), initial_transform="Identity"), out)


def syntx(fixed, moving, out):
    """SyN of the package syntx, with the settings of its own benchmark (5.4.15)."""
    import types

    import ants
    # The package imports antstorch for denoising and surfaces, which SyN does not need. PyPI does not have antstorch.
    sys.modules.setdefault("antstorch", types.ModuleType("antstorch"))
    import syntx as package
    f, m = ants.image_read(fixed), ants.image_read(moving)
    # The images are aligned already. With an identity, the package computes no affine of its own.
    identity = out.removesuffix(".nii") + "_identity.mat"
    ants.write_transform(ants.new_ants_transform(dimension=3, transform_type="AffineTransform"), identity)
    _save(f, m, package.syn(
        fixed=f, moving=m, initial_transform=identity, backend="pytorch", device="cpu", reg_iterations=[100, 100, 20],
        grad_step=0.35, flow_sigma=2.5, total_sigma=0.0, similarity_metric="cc2", syn_sampling=2, fast_smooth=True,
        use_ants_pseudo_gradient=False, use_analytical_gradients=False, inverse_method="anderson",
        formulation="eulerian", regularizer="sobolev", kernel_type="sobolev", sobolev_alpha=1.5, antisymmetric=True),
        out)


def fireants(fixed, moving, out, kind="greedy"):
    """FireANTs: Adam on a compositive warp, by local correlation over 5^3 voxels; `kind` "greedy" or "syn".

    Levels, iterations and step are those of its quick start ("greedy") and of its scripts for brains ("syn"). On a GPU
    where PyTorch has one.
    """
    import torch
    from fireants.io.image import BatchedImages, Image
    from fireants.registration.greedy import GreedyRegistration
    from fireants.registration.syn import SyNRegistration

    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = (BatchedImages([Image.load_file(path, device=device)]) for path in (fixed, moving))
    method, iterations = {"greedy": (GreedyRegistration, [200, 100, 25]), "syn": (SyNRegistration, [100, 75, 50])}[kind]
    found = method([4, 2, 1], iterations, *images, cc_kernel_size=5, deformation_type="compositive",
                   smooth_grad_sigma=1, optimizer="adam", optimizer_lr=0.5)
    found.optimize()
    found.save_as_ants_transforms(out)


METHODS = {  # name: (function, its arguments, the package it needs)
    "drivenmorph": (network, (str(shipped("weights", "brain-t1")),), None),
    "voxelmorph": (network, (str(shipped("weights", "voxelmorph-t1")),), None),
    "transmorph": (network, (str(shipped("weights", "transmorph-t1")),), None),
    "affine": (None, (), None),  # no deformation
    "demons": (demons, (), None),
    "demons-intensity": (demons, ("intensity",), None),
    "demons-mind": (demons, ("mind",), None),
    "itk-demons": (itk_demons, (), "SimpleITK"),
    "greedy": (greedy, (), "picsl_greedy"),
    "syn": (syn, (), "ants"),
    "syntx": (syntx, (), "syntx"),
    "fireants": (fireants, (), "fireants"),
    "fireants-syn": (fireants, ("syn",), "fireants"),
}


def run(method, fixed, moving, *arguments):
    """(u, seconds): the field (D, H, W, 3) in voxels, in RAS axis order, and the wall-clock seconds of the command.

    Args:
      method: a name of `METHODS` whose package is installed.
      fixed, moving: NIfTI files on one grid.
      arguments: for the method's function, in place of those in `METHODS`.

    Raises InputError with the message of the command where it failed.
    """
    from drivenmorph_jax.transforms.reading import read_transform

    if METHODS[method][0] is None:
        return np.zeros((*nib.as_closest_canonical(nib.load(fixed)).shape, 3), np.float32), 0.0
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "displacement.nii")
        command = [sys.executable, "-m", "drivenmorph_jax.evaluation.rivals", method, str(fixed), str(moving), out,
                   *map(str, arguments or METHODS[method][1])]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
        seconds = time.perf_counter() - start
        if done.returncode:
            raise InputError(f"{method} failed on {fixed} and {moving}; leave it out, or see why: "
                             f"{done.stderr.strip()[-300:]}")
        read = read_transform(out)
    mm = nib.as_closest_canonical(nib.Nifti1Image(read.displacement, read.grid.affine))
    return (np.asarray(mm.dataobj, np.float32) @ np.linalg.inv(mm.affine[:3, :3]).T).astype(np.float32), seconds


def installed(names):
    """Those of `names` that can run. Prints what each of the others lacks.

    Raises InputError for a name that is not in `METHODS`.
    """
    found = []
    for name in names:
        if name not in METHODS:
            raise InputError(f"--rivals: {name} is none of {', '.join(METHODS)}")
        function, arguments, package = METHODS[name]
        if package and importlib.util.find_spec(package) is None:
            print(f"{name} is left out: {package} is not installed; pip install -r requirements-rivals.txt")
        elif function is network and not Path(arguments[0]).is_dir():
            print(f"{name} is left out: {arguments[0]} has no weights; train configs/{name}.py and copy its best "
                  "checkpoint there")
        else:
            found.append(name)
    return found


def compare(dataset, root, split, names, out, checkpoint=None, refine_steps=0):
    """Run every method on every ordered pair of a split, DrivenMorph first; write rivals.jsonl, .md and .png to `out`.

    A run that rivals.jsonl already holds, of the same files, weights and version, is not repeated. So a comparison that
    was stopped continues, and a method can be added later.

    Args:
      dataset: a folder's, not padded; root: that folder.
      names: of `METHODS`, all of them installed.
      checkpoint, refine_steps: of DrivenMorph; by default the weights of the project, without refinement.

    Returns:
      The Markdown table: mean and std of every score, and the p value of Wilcoxon's signed-rank test on the pairs' Dice
      against DrivenMorph, with Holm's correction.
    """
    from tqdm import tqdm

    from drivenmorph_jax.data.folder import IMAGE, LABELS
    from drivenmorph_jax.evaluation import figures, metrics

    out, pairs = make_folder(out), dataset.pairs(split)
    names = ["drivenmorph", *(name for name in names if name != "drivenmorph")]
    arguments = {name: METHODS[name][1] for name in names}
    arguments["drivenmorph"] = checkpoint or arguments["drivenmorph"][0], refine_steps
    record = out / "rivals.jsonl"
    known = {run["key"]: run["scores"] for run in read_rows(record)}
    with replacing(record) as temporary:  # without a line that is incomplete
        temporary.write_text(rows_text({"key": key, "scores": scores} for key, scores in known.items()))
    rows, reused = {name: [] for name in names}, 0
    with tqdm(total=len(pairs) * len(names), unit="run", dynamic_ncols=True) as progress:
        for pair in pairs:
            fixed, moving = pair
            images, labels = ([Path(root) / f"{subject.id}{ending}" for subject in pair] for ending in (IMAGE, LABELS))
            for name in names:
                progress.set_description(name)
                key = _key(name, arguments[name], [*images, *labels], dataset.exclude)
                if key in known:
                    reused += 1
                else:
                    u, seconds = run(name, *images, *arguments[name])
                    scores = metrics.pair_metrics(u, None, fixed.labels, moving.labels, (dataset.spacing,) * 3,
                                                  metrics.brain(fixed.image), dataset.exclude)
                    known[key] = {"fixed": fixed.id, "moving": moving.id, **scores, "seconds": seconds}
                    with record.open("a") as file:
                        file.write(rows_text([{"key": key, "scores": known[key]}]))
                rows[name].append(known[key])
                progress.update()
    if reused:
        print(f"{reused} of {len(pairs) * len(names)} runs were in {record} already; delete it to do them again")
    table = rivals_table(rows)
    with replacing(out / "rivals.md") as temporary:
        temporary.write_text(table)
    if all("dice" in row for row in rows["drivenmorph"]):
        figures.boxes(out / "rivals.png", {name: [row["dice"] for row in found] for name, found in rows.items()},
                      "Dice")
    return table


def _key(method, arguments, files, exclude):
    """A digest of everything on which the scores of one run depend."""
    from drivenmorph_jax.runtime.provenance import git_commit

    package = METHODS[method][2]
    # Not every wheel declares which packages it holds.
    version = (importlib.metadata.version(importlib.metadata.packages_distributions().get(package, [package])[0])
               if package else f"{VERSION} {git_commit()}")
    digest = hashlib.sha256(json.dumps([method, version, [*map(int, exclude)], *map(str, arguments)]).encode())
    for path in (*files, *(path for x in arguments for path in sorted(Path(str(x)).rglob("*")))):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def rivals_table(rows):
    """The Markdown table of {method: rows of pairs}. The other methods are tested against the first."""
    from drivenmorph_jax.evaluation import metrics, tables

    first, *others = rows
    keys = [key for key in rows[first][0] if key in tables.LABELS]
    lines = ["| | pairs | " + " | ".join(tables.LABELS[key] for key in keys) + " | p (Dice) |",
             "| --- | ---: |" + " ---: |" * (len(keys) + 1)]
    p = dict(zip(others, holm([_wilcoxon(rows[first], rows[name]) for name in others]), strict=True))
    for name, found in rows.items():
        summary = metrics.summarise(found)
        cells = [f"{summary[key]['mean']:.4g} ± {summary[key]['std']:.2g}" if key in summary else "–" for key in keys]
        lines.append(f"| {name} | {len(found)} | " + " | ".join(cells)
                     + (f" | {p[name]:.2g} |" if np.isfinite(p.get(name, np.nan)) else " | |"))
    return "\n".join(lines) + "\n"


def holm(p):
    """Holm's correction of p values; nan stays nan.

      sorted upwards, p_(i) (n - i) for i from 0, made non-decreasing and at most 1
    """
    p = np.asarray(p, float)
    corrected, known = np.full(p.shape, np.nan), np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known])]
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * (len(order) - np.arange(len(order)))), 1)
    return corrected


def _wilcoxon(a, b):
    from scipy import stats

    difference = [x.get("dice", np.nan) - y.get("dice", np.nan) for x, y in zip(a, b, strict=True)]
    if not np.isfinite(difference).all() or not np.any(difference):
        return np.nan
    return float(stats.wilcoxon(difference).pvalue)


def _images(fixed, moving):
    from drivenmorph_jax.images.reading import load_image
    from drivenmorph_jax.images.volume import canonical
    return (canonical(load_image(path)) for path in (fixed, moving))


def _padded(fixed, moving, multiple):
    """Both images, normalised to [0, 1] and padded with background so that every side is a multiple of `multiple`."""
    import jax.numpy as jnp

    from drivenmorph_jax.images.intensity import anchored, normalise
    return (jnp.asarray(np.pad(normalise(anchored(x.data)), [(0, -n % multiple) for n in x.data.shape]), jnp.float32)
            for x in (fixed, moving))


def _write(out, fixed, u):
    from drivenmorph_jax.transforms.files import write_displacement
    u = np.asarray(u)[tuple(map(slice, fixed.data.shape))]
    write_displacement(out, u @ fixed.affine[:3, :3].T.astype(np.float32), fixed, "fixed to moving")


def _save(f, m, found, out):
    import ants
    composed = ants.apply_transforms(f, m, found["fwdtransforms"], compose=out.removesuffix(".nii"))
    ants.image_write(ants.image_read(composed), out)


if __name__ == "__main__":
    METHODS[sys.argv[1]][0](*sys.argv[2:])
