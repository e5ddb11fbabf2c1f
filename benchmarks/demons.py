"""Registration of one split's ordered pairs, by the classical algorithm and by the network with the weights of the
project, alone and refined, against SimpleITK, greedy, ANTsPy and syntx where installed.

python -m benchmarks.demons --data FOLDER [--split test] [--pairs 12] [--methods affine lncc ...] [--out results.json]

The folder is as `eval.py --data` takes it: ID_t1.nii.gz and ID_seg.nii.gz, affinely aligned on one grid. Every method
runs as a command of its own, which starts Python, reads two files and writes one displacement field (.nii, ITK's
convention), one after the other on the same pair; the seconds are those of the whole command. All fields are then
scored by the same code. The first pair of ours compiles; later ones find the compiled code, as users do.

At the end: an iteration at the finest level beside its floor, which is to read both images, to write the warped one and
read it, and to read and write the field and its update at an eighth of the voxels: 4 + 12 / 8 floats a voxel, at the
rate of a plain copy.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

ITK = {"iterations": (100, 60, 30), "sigma": 1.5}
METHODS = {  # name: the package it needs
    "affine": None, "itk-demons": "SimpleITK", "esm": None, "greedy": "picsl_greedy", "lncc": None, "mind": None,
    "network": None, "refined": None, "ants-syn": "ants", "syntx": "syntx"}


def ours(fixed, moving, out, settings, features=lambda x: x):
    import jax.numpy as jnp

    from drivenmorph_jax import demons, nifti, sharding

    sharding.start()
    volumes = [nifti.load_image(path) for path in (fixed, moving)]
    u = demons.demons(*(features(jnp.asarray(nifti.normalise(x.data))[..., None]) for x in volumes), **settings).u
    _write(out, u, volumes[0])


def _write(out, u, fixed):
    from drivenmorph_jax import transforms
    mm = np.asarray(u) @ fixed.affine[:3, :3].T.astype(np.float32)
    transforms.write_displacement(out, mm, fixed, "fixed to moving")


def network(fixed, moving, out, refine_steps=0):
    from drivenmorph_jax import nifti, sharding
    from drivenmorph_jax.checkpoint import SHIPPED
    from drivenmorph_jax.evaluation import load_checkpoint, make_predict

    sharding.start()
    volumes = [nifti.load_image(path) for path in (fixed, moving)]
    config, params, _ = load_checkpoint(SHIPPED)
    images = (np.asarray(nifti.normalise(x.data), np.float32) for x in volumes)
    _write(out, make_predict(config, refine_steps)(params, *images)[0], volumes[0])


def refined(fixed, moving, out):
    network(fixed, moving, out, 20)


def lncc(fixed, moving, out):
    from drivenmorph_jax.demons import LNCC
    ours(fixed, moving, out, LNCC)


def esm(fixed, moving, out):
    from drivenmorph_jax.demons import INTENSITY
    ours(fixed, moving, out, INTENSITY)


def mind(fixed, moving, out):
    from drivenmorph_jax.demons import INTENSITY
    from drivenmorph_jax.forces import mind
    ours(fixed, moving, out, INTENSITY, mind)


def itk_demons(fixed, moving, out):
    import SimpleITK as sitk

    f, m = (sitk.ReadImage(path, sitk.sitkFloat32) for path in (fixed, moving))
    m = sitk.HistogramMatching(m, f, 128, 10, True)
    registration = sitk.DiffeomorphicDemonsRegistrationFilter()
    registration.SetStandardDeviations(ITK["sigma"])
    field = None
    for factor, count in zip((4, 2, 1), ITK["iterations"], strict=True):
        small = [sitk.Shrink(sitk.SmoothingRecursiveGaussian(x, 0.5 * factor), [factor] * 3) if factor > 1 else x
                 for x in (f, m)]
        registration.SetNumberOfIterations(count)
        field = (registration.Execute(*small) if field is None
                 else registration.Execute(*small, sitk.Resample(field, small[0])))
    sitk.WriteImage(field, out)


def greedy(fixed, moving, out):
    from picsl_greedy import Greedy3D
    Greedy3D().execute(f"-d 3 -m WNCC 2x2x2 -i {fixed} {moving} -n 100x50x20 -o {out}")


def ants_syn(fixed, moving, out):
    import ants
    f, m = ants.image_read(fixed), ants.image_read(moving)
    _save(f, m, ants.registration(f, m, "SyNOnly", reg_iterations=(100, 70, 20), initial_transform="Identity"), out)


def syntx(fixed, moving, out):
    import ants
    import syntx as package
    f, m = ants.image_read(fixed), ants.image_read(moving)
    # The images are aligned already: an identity keeps it from an affine of its own.
    identity = out.removesuffix(".nii") + "_identity.mat"
    ants.write_transform(ants.new_ants_transform(dimension=3, transform_type="AffineTransform"), identity)
    # The settings of the package's own benchmark of SyN (5.4.15).
    _save(f, m, package.syn(
        fixed=f, moving=m, initial_transform=identity, backend="pytorch", device="cpu", reg_iterations=[100, 100, 20],
        grad_step=0.35, flow_sigma=2.5, total_sigma=0.0, similarity_metric="cc2", syn_sampling=2, fast_smooth=True,
        use_ants_pseudo_gradient=False, use_analytical_gradients=False, inverse_method="anderson",
        formulation="eulerian", regularizer="sobolev", kernel_type="sobolev", sobolev_alpha=1.5, antisymmetric=True),
        out)


def _save(f, m, found, out):
    import ants
    composed = ants.apply_transforms(f, m, found["fwdtransforms"], compose=out.removesuffix(".nii"))
    ants.image_write(ants.image_read(composed), out)


def read(out):
    """The field in the file `out`: (D, H, W, 3), voxels."""
    from drivenmorph_jax import transforms

    displacement, affine = transforms.read_displacement(out)
    return displacement @ np.linalg.inv(affine[:3, :3]).T.astype(np.float32)


def score(fixed, moving, u):
    """Dice, folding, NDV and SDlogJ of a displacement in voxels, by the metrics of the project."""
    from drivenmorph_jax import metrics
    from drivenmorph_jax.evaluation import brain

    inside, jacobian = brain(fixed.image), metrics.jacobian(u)
    return {"dice": metrics.mean_dice(fixed.labels, metrics.warp_labels(moving.labels, u), EXCLUDE),
            "fold_pct": metrics.fold_pct(jacobian, inside), "ndv_pct": metrics.ndv_pct(u, inside),
            "sdlogj": metrics.sdlogj(jacobian, inside)}


def iteration(force, shape=(160, 192, 160)):
    """Seconds of one iteration at the finest level, and its floor, both measured here and now."""
    import jax
    import jax.numpy as jnp

    from benchmarks.fields import seconds
    from drivenmorph_jax import demons

    copied = jnp.zeros((*shape, 16))
    rate = 2 * copied.nbytes / seconds(lambda x: x + 1, copied)
    fixed, moving = (demons.gaussian_smooth(jax.random.uniform(jax.random.key(k), (*shape, 1)), 1.0) for k in (0, 1))
    settings = (demons.INTENSITY if force == "esm" else demons.LNCC) | {"update": "compositional", "tolerance": 0.0}

    def run(count):
        return seconds(lambda *x: demons.demons_level(*x, **settings | {"iterations": count}), fixed, moving,
                       jnp.zeros((*(n // 2 for n in shape), 3)))

    return (run(6) - run(2)) / 4, 4 * (4 + 12 / 8) * np.prod(shape) / rate


EXCLUDE = (0, 1, 42, 43, 46, 63, 64)  # background and scraps of the MICCAI 2012 label set


def pairs(folder, split, count):
    """The first `count` ordered pairs of a split, or all for None."""
    from drivenmorph_jax import data
    cohort = data.load(ConfigDict({"name": "folder", "root": folder, "exclude": EXCLUDE, "splits": None}), (split,))
    return data.ordered_pairs(getattr(cohort, split))[:count]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of aligned images and labels")
    parser.add_argument("--split", default="test", choices=["train", "val", "test"])
    parser.add_argument("--pairs", type=int, help="only the first of them")
    parser.add_argument("--methods", nargs="+", default=list(METHODS)[:5], choices=METHODS)
    parser.add_argument("--out", help="JSON file for every number")
    parser.add_argument("--one", nargs=4, metavar=("METHOD", "FIXED", "MOVING", "OUT"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.one:
        method, *files = flags.one
        return globals()[method.replace("-", "_")](*files)
    if not flags.data:
        parser.error("give --data FOLDER")

    rows, methods = [], []
    for method in flags.methods:
        if METHODS[method] and importlib.util.find_spec(METHODS[method]) is None:
            print(f"{method} is left out: the package {METHODS[method]} is not installed")
        else:
            methods.append(method)
    for fixed, moving in pairs(flags.data, flags.split, flags.pairs):
        files = [str(Path(flags.data) / f"{subject.id}_t1.nii.gz") for subject in (fixed, moving)]
        for method in methods:
            with tempfile.TemporaryDirectory() as folder:
                u, seconds = np.zeros((*fixed.image.shape, 3), np.float32), 0.0
                if method != "affine":
                    out = str(Path(folder) / "displacement.nii")
                    start = time.perf_counter()
                    done = subprocess.run([sys.executable, "-m", "benchmarks.demons", "--one", method, *files, out],
                                          capture_output=True, text=True)
                    seconds = time.perf_counter() - start
                    if done.returncode:
                        print(f"{method} failed on {fixed.id} {moving.id}: {done.stderr.strip()[-300:]}", flush=True)
                        continue
                    u = read(out)
                rows.append({"fixed": fixed.id, "moving": moving.id, "method": method, "seconds": seconds,
                             **score(fixed, moving, u)})
                print("{fixed} {moving} {method:12} Dice {dice:.4f}  folding {fold_pct:.5f} %  NDV {ndv_pct:.5f} %  "
                      "SDlogJ {sdlogj:.3f}  {seconds:6.1f} s".format(**rows[-1]), flush=True)
        if flags.out:
            Path(flags.out).write_text(json.dumps(rows, indent=1))

    print(f"\n{'':12}{'pairs':>6}{'Dice':>8}{'median':>8}{'folding %':>11}{'NDV %':>10}{'SDlogJ':>8}{'median s':>10}")
    for method in methods:
        mine = [row for row in rows if row["method"] == method]
        if mine:
            d, f, n, j, s = (np.array([row[key] for row in mine])
                             for key in ("dice", "fold_pct", "ndv_pct", "sdlogj", "seconds"))
            print(f"{method:12}{len(mine):6}{d.mean():8.4f}{np.median(d):8.4f}{f.mean():11.5f}{n.mean():10.5f}"
                  f"{j.mean():8.3f}{np.median(s):10.1f}")
    for force in ("esm", "lncc"):
        taken, floor = iteration(force)
        print(f"one iteration of {force} at 160x192x160: {taken:.3f} s, {taken / floor:.1f} times the floor")


if __name__ == "__main__":
    main()
