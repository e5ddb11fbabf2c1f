"""Registration of patients in several contrasts, scored without labels of the patient.

python -m benchmarks.patients FOLDER --atlases BRAINS --out runs/patients [--subjects ID ID] [--method demons] [--ants]

FOLDER holds one patient as NAME_t1.nii.gz, NAME_t2.nii.gz and so on: images of several contrasts that are aligned with
each other. BRAINS holds ID_t1.nii.gz and ID_seg.nii.gz, and a splits.json lies there or in its parent. The atlases are
the subjects that are named, or the first two of its test split. Each atlas is registered to each contrast, and so
carries its labels to the patient.

"Atlases agree" is the mean Dice between the labels that the two atlases carry: high where registration finds the
patient's anatomy. "As by T1" is the mean Dice between the labels that one atlas carries by a contrast and by the first:
high where the contrast does not matter. "Distance" is the mean distance in mm between these two fields in the
patient's brain. SDlogJ and log J at .1 and 99.9 % are those of the transforms without their affine parts, in the
patient's brain. "affine" are the labels by the affine alone. A registration whose files are in --out is not run again.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import nibabel as nib
import numpy as np

from drivenmorph_jax.cli.program import run
from drivenmorph_jax.data.folder import beside
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.evaluation import metrics
from drivenmorph_jax.images.intensity import anchored, foreground
from drivenmorph_jax.images.reading import load_image, load_labels
from drivenmorph_jax.images.volume import resample
from drivenmorph_jax.registration.register import register
from drivenmorph_jax.transforms.transform import Transform
from drivenmorph_jax.transforms.world import jacobian_determinant_of_displacement, pull_back

FIRST = "t1"


def ours(fixed, atlas, method):
    """(Transform, seconds) by this package."""
    result = register(fixed, atlas, method=method, quiet=True)
    return result.transform, result.summary["seconds"]["total"]


def syn(fixed, atlas, method):
    """(Transform, seconds) by ANTsPy: affine, then SyN with mutual information."""
    import ants
    start = time.perf_counter()
    found = ants.registration(ants.image_read(str(fixed)), ants.image_read(str(atlas)), "SyN")
    seconds = time.perf_counter() - start
    return Transform.load(found["fwdtransforms"], fixed=fixed, moving=atlas), seconds


def carried(fixed, name, atlas, labels, out, tool, method):
    """The results of a registration as a dict of arrays, from its file where there is one."""
    file = out / f"{name}.npz"
    if not file.exists():
        transform, seconds = tool(fixed, atlas, method)
        image, moving = load_image(fixed), load_labels(labels)
        move = transform.displacement
        linear = resample(moving, image.data.shape, image.affine, transform.linear, order=0)
        bent = jacobian_determinant_of_displacement(move, image.affine) / np.linalg.det(transform.linear[:3, :3])
        np.savez_compressed(file, displacement=move.astype(np.float16), jacobian=bent.astype(np.float32), affine=linear,
                            labels=pull_back(moving, move, image.affine, "nearest"), seconds=seconds)
    return dict(np.load(file))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--atlases", type=Path, required=True)
    parser.add_argument("--subjects", nargs=2, metavar="ID")
    parser.add_argument("--method", default="drivenmorph", choices=["drivenmorph", "demons"])
    parser.add_argument("--ants", action="store_true", help="ANTsPy's SyN in place of this package")
    parser.add_argument("--out", type=Path, required=True)
    flags = parser.parse_args()
    images = {path.name.removesuffix(".nii.gz").split("_")[-1]: path for path in sorted(flags.folder.glob("*.nii.gz"))}
    if FIRST not in images:
        raise InputError(f"{flags.folder} has no image that ends in _{FIRST}.nii.gz")
    images = {FIRST: images.pop(FIRST), **images}
    subjects = flags.subjects or json.loads(beside(flags.atlases, "splits.json").read_text())["test"][:2]
    out = flags.out / ("ants" if flags.ants else flags.method)
    out.mkdir(parents=True, exist_ok=True)
    found = {}
    for (contrast, path), subject in itertools.product(images.items(), subjects):
        atlas, labels = (flags.atlases / f"{subject}_{kind}.nii.gz" for kind in ("t1", "seg"))
        found[contrast, subject] = carried(path, f"{contrast}_{subject}", atlas, labels, out,
                                           syn if flags.ants else ours, flags.method)
        print(contrast, subject, f"{found[contrast, subject]['seconds']:.0f} s", flush=True)
    print("\n| contrast | atlases agree | affine | as by T1 | affine | distance | SDlogJ | log J, .1 and 99.9 % "
          "| seconds |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    a, b = subjects
    for contrast, path in images.items():
        brain = metrics.brain(foreground(anchored(load_image(path).data)))
        spacing = np.linalg.norm(nib.load(path).affine[:3, :3], axis=0)
        assert np.allclose(spacing, nib.load(images[FIRST]).header.get_zooms()[:3], atol=1e-3)
        agree = [metrics.mean_dice(found[contrast, a][kind], found[contrast, b][kind]) for kind in ("labels", "affine")]
        same, distance = ([np.nan] * 2, np.nan) if contrast == FIRST else (
            [np.mean([metrics.mean_dice(found[contrast, s][kind], found[FIRST, s][kind]) for s in subjects])
             for kind in ("labels", "affine")],
            np.mean([np.linalg.norm(found[contrast, s]["displacement"].astype(np.float32)
                                    - found[FIRST, s]["displacement"], axis=-1)[brain].mean() for s in subjects]))
        logs = [np.log(np.maximum(found[contrast, s]["jacobian"][brain], 1e-9)) for s in subjects]
        low, high = (np.mean([np.percentile(x, p) for x in logs]) for p in (0.1, 99.9))
        seconds = np.mean([found[contrast, s]["seconds"] for s in subjects])
        print(f"| {contrast} | {agree[0]:.3f} | {agree[1]:.3f} | {same[0]:.3f} | {same[1]:.3f} | {distance:.2f} "
              f"| {np.mean([x.std() for x in logs]):.2f} | {low:.2f}, {high:.2f} | {seconds:.0f} |")


if __name__ == "__main__":
    run(main)
