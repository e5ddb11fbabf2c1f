"""The template of ten training brains, against their affine mean and the template of ANTsPy's build_template.

python -m benchmarks.template --data FOLDER --out OUT [--images 10] [--pool 2] [--ants PYTHON] [--without_ants]

FOLDER is a folder of aligned images and labels with splits.json. The images are pooled to voxels `pool` times as
large. Both methods get the same files, and each runs as a command of its own, one after the other. PYTHON is an
interpreter that has antspyx, by default this one. OUT keeps both results, which are not computed again.

- Seconds are those of the command, and processor seconds those of all its threads.
- Sharpness is the root mean square of the gradient per mm over the foreground, of a template divided by the mean of its
  foreground. Both templates are sharpened, so the mean without sharpening is given, too.
- Dice is the mean over pairs of subjects and over labels, of the label maps on the grid of the template, warped by
  nearest neighbour.
- Bias is the mean over the brain of |mean of the displacements to the subjects|, in mm, without their affine part.
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np

from benchmarks.demons import EXCLUDE
from drivenmorph_jax import Transform
from drivenmorph_jax.data.folder import IMAGE, LABELS, beside
from drivenmorph_jax.evaluation import metrics
from drivenmorph_jax.images.average import robust_mean, sharpened
from drivenmorph_jax.images.intensity import foreground
from drivenmorph_jax.images.reading import load_image, load_labels
from drivenmorph_jax.images.volume import resample, smoothed
from drivenmorph_jax.registration.template import sharpness
from drivenmorph_jax.transforms.itk import read_affine
from drivenmorph_jax.transforms.world import linear_part

# The template, and each label map in the space of the last mean to which images were registered.
ANTS = """
import sys, ants
out, *ids = sys.argv[1:]
images = [ants.image_read(f"{out}/in/{id}_t1.nii.gz") for id in ids]
ants.image_write(ants.build_template(image_list=images, output_dir=f"{out}/ants"), f"{out}/ants/template.nii.gz")
"""
MOVE = """
import sys, ants
out, *ids = sys.argv[1:]
template = ants.image_read(f"{out}/ants/template.nii.gz")
for k, id in enumerate(ids):
    place = f"{out}/ants/img{k:04d}/out"
    moved = ants.apply_transforms(template, ants.image_read(f"{out}/in/{id}_seg.nii.gz"),
                                  [f"{place}1Warp.nii.gz", f"{place}0GenericAffine.mat"], "nearestNeighbor")
    ants.image_write(moved, f"{place}_seg.nii.gz")
"""


def pooled(source, target, factor):
    """Write an image or label map with voxels `factor` times as large: block means, or the label of most voxels."""
    image = nibabel.load(source)
    data = np.asarray(image.dataobj)
    data = data[tuple(slice(n // factor * factor) for n in data.shape)]
    blocks = data.reshape([side for n in data.shape for side in (n // factor, factor)]).transpose(0, 2, 4, 1, 3, 5)
    blocks = blocks.reshape(*blocks.shape[:3], -1)
    if target.name.endswith(LABELS):
        votes = (blocks[..., :, None] == blocks[..., None, :]).sum(-1)
        data = np.take_along_axis(blocks, votes.argmax(-1)[..., None], -1)[..., 0].astype(np.int16)
    else:
        data = blocks.mean(-1, dtype=np.float32)
    affine = image.affine @ np.diag([factor, factor, factor, 1])
    affine[:3, 3] += image.affine[:3, :3] @ np.full(3, (factor - 1) / 2)
    nibabel.save(nibabel.Nifti1Image(data, affine), target)


def timed(name, out, command):
    """Run a command, unless its times are kept in `out`: {"seconds", "processor"}."""
    kept = out / f"{name}.json"
    if not kept.exists():
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, env=os.environ | {"ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS":
                                                              str(os.cpu_count())})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = sum(getattr(after, x) - getattr(before, x) for x in ("ru_utime", "ru_stime"))
        kept.write_text(json.dumps({"seconds": time.perf_counter() - start, "processor": used}))
    return json.loads(kept.read_text())


def mean_pairwise_dice(maps):
    return np.mean([metrics.mean_dice(a, b, EXCLUDE) for a, b in itertools.combinations(maps, 2)])


def relative_sharpness(image, spacing):
    return sharpness(image / image[foreground(image)].mean(), spacing)


def bias(fields, affine, brain):
    """|mean of the displacements less the affine closest to each|, the mean over the brain, in mm."""
    total = 0
    for u in fields:
        linear = linear_part(u, affine)
        index = np.moveaxis(np.indices(u.shape[:3]), 0, -1)
        x = index @ affine[:3, :3].T + affine[:3, 3]
        total = total + (x + u - linear[:3, 3]) @ np.linalg.inv(linear[:3, :3]).T - x
    return np.linalg.norm(total / len(fields), axis=-1)[brain].mean()


def scored(name, template, mean, maps, fields, times):
    brain = foreground(template.data)
    return {"method": name, "sharpness": relative_sharpness(template.data, template.spacing[0]),
            "unsharpened": None if mean is None else relative_sharpness(mean, template.spacing[0]),
            "dice": mean_pairwise_dice(maps), "bias": None if fields is None else bias(fields, template.affine, brain),
            **times}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder of aligned images and labels")
    parser.add_argument("--out", required=True, type=Path, help="folder for both results")
    parser.add_argument("--images", type=int, default=10, help="the first of the train split; default: 10")
    parser.add_argument("--pool", type=int, default=1, help="how many times larger the voxels are made; default: 1")
    parser.add_argument("--ants", default=sys.executable, metavar="PYTHON", help="interpreter with antspyx")
    parser.add_argument("--without_ants", action="store_true", help="only the affine mean and our template")
    flags = parser.parse_args()
    root, out = flags.data, flags.out
    ids = json.loads(beside(root, "splits.json").read_text())["train"][:flags.images]
    (out / "in").mkdir(parents=True, exist_ok=True)
    for id, kind in itertools.product(ids, (IMAGE, LABELS)):
        if not (out / "in" / f"{id}{kind}").exists():
            pooled(root / f"{id}{kind}", out / "in" / f"{id}{kind}", flags.pool)

    rows = []
    ours = timed("ours", out, [sys.executable, "template.py", "--images", out / "in", "--out", out / "ours"])
    template = load_image(out / "ours" / "template.nii.gz")
    affines = [read_affine(out / f"ours/subjects/{id}/affine.tfm") for id in ids]
    images = [load_image(out / "in" / f"{id}{IMAGE}") for id in ids]
    labels = [load_labels(out / "in" / f"{id}{LABELS}") for id in ids]
    grid = template.data.shape, template.affine
    mean = robust_mean([resample(smoothed(x, template.spacing[0]), *grid, a)
                        for x, a in zip(images, affines, strict=True)])
    rows.append(scored("affine mean", replace(template, data=sharpened(mean)), mean,
                       [resample(x, *grid, a, order=0) for x, a in zip(labels, affines, strict=True)], None, {}))
    there = [Transform.load(out / f"ours/subjects/{id}/displacement.nii.gz") for id in ids]
    moved = [np.asarray(t.apply(out / "in" / f"{id}{IMAGE}").dataobj) for id, t in zip(ids, there, strict=True)]
    maps = [np.asarray(t.apply(out / "in" / f"{id}{LABELS}", "nearest").dataobj)
            for id, t in zip(ids, there, strict=True)]
    rows.append(scored("drivenmorph", template, robust_mean(moved), maps, [t.displacement for t in there], ours))
    if not flags.without_ants:
        times = timed("ants", out, [flags.ants, "-c", ANTS, out, *ids])
        subprocess.run([flags.ants, "-c", MOVE, out, *ids], check=True)
        places = [out / f"ants/img{k:04d}/out" for k in range(len(ids))]
        fields = [Transform.load([f"{place}1Warp.nii.gz", f"{place}0GenericAffine.mat"]) for place in places]
        rows.append(scored("ANTsPy build_template", load_image(out / "ants" / "template.nii.gz"), None,
                           [load_labels(f"{place}_seg.nii.gz").data for place in places],
                           [t.displacement for t in fields], times))
    (out / "scores.json").write_text(json.dumps(rows, indent=1))
    print("| template | sharpness | unsharpened | Dice | bias (mm) | seconds | processor seconds |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        cells = [f"{row[key]:.{digits}f}" if row.get(key) is not None else "" for key, digits in (
            ("sharpness", 4), ("unsharpened", 4), ("dice", 4), ("bias", 3), ("seconds", 0), ("processor", 0))]
        print(f"| {row['method']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
