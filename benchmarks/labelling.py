"""Labels of test brains from atlases: Dice by fusion, calibration of the confidence, and volumes.

    python -m benchmarks.labelling FOLDER --out runs/labelling [--atlases ID ...] [--scans ID ...]

FOLDER holds ID_t1.nii.gz and ID_seg.nii.gz of the MICCAI 2012 multi-atlas challenge. By default the atlases are its 15
training brains, and the scans those of its test brains that the folder has. Registered atlases are kept in --out, a
file each, so the same command continues a run that was stopped, and compares other fusions without registering again.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from benchmarks.demons import EXCLUDE
from drivenmorph_jax.evaluation import metrics
from drivenmorph_jax.files import json_text, read_rows, replacing
from drivenmorph_jax.images.reading import load_labels
from drivenmorph_jax.labelling.align import prepared_scan, registered_atlas
from drivenmorph_jax.labelling.atlases import read_atlases
from drivenmorph_jax.labelling.fusion import FUSIONS, fused
from drivenmorph_jax.registration.progress import Progress
from drivenmorph_jax.registration.read import Request, millilitres
from drivenmorph_jax.registration.register import begun
from drivenmorph_jax.runtime import sharding

TRAINING = "1000 1001 1002 1006 1007 1008 1009 1010 1011 1012 1013 1014 1015 1017 1036".split()
TEST = "1004 1005 1018 1023 1024 1038 1039 1101 1107 1113 1116 1122".split()


def registered(folder, scan, atlases, out):
    """(the prepared scan, its registered atlases [(image, labels)])."""
    request = Request(fixed=str(folder / f"{scan}_t1.nii.gz"), moving=atlases.mean, method="demons", strip="no")
    prepared = prepared_scan(begun(request, Progress(quiet=True)))
    found = []
    for id, image, labels in zip(atlases.ids, atlases.images, atlases.labels, strict=True):
        path = out / scan / f"{id}.npz"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            image, labels = registered_atlas(prepared, image, labels)
            with replacing(path) as temporary:
                np.savez(temporary, image=image.astype(np.float16), labels=labels)
            print(scan, id, flush=True)
        with np.load(path) as kept:
            found.append((kept["image"].astype(np.float32), kept["labels"]))
    return prepared, found


BINS = np.linspace(0, 1, 11)


def scored(folder, scan, atlases, prepared, found, fusion):
    """The scores of one scan: {"dice", "labels", "volumes": [[manual ml, found ml]], "bins": [[right, all]]}."""
    start = time.perf_counter()
    truth = load_labels(folder / f"{scan}_seg.nii.gz")
    images, labels = map(np.stack, zip(*found, strict=True))
    places, confidence = fused(np.asarray(prepared.fixed_on_grid), images, labels, prepared.grid, prepared.fixed,
                               fusion)
    seconds = time.perf_counter() - start
    got = atlases.values[places]
    there = [label for label in np.unique(truth.data) if label not in EXCLUDE]
    dice = metrics.dice(truth.data, got, EXCLUDE, moving_labels=np.array(there))  # a label that is not found counts 0
    assert list(dice) == there
    size = millilitres(np.ones(1), truth.affine)
    counted = np.isin(got, there) | np.isin(truth.data, there)
    which = np.clip(np.digitize(confidence[counted], BINS) - 1, 0, len(BINS) - 2)
    right = (got == truth.data)[counted]
    bins = [np.bincount(which, x, minlength=len(BINS) - 1).tolist() for x in (right, np.ones_like(right),
                                                                          confidence[counted])]
    return {"scan": scan, "fusion": fusion, "dice": float(np.mean(list(dice.values()))), "labels": len(there),
            "by_label": {str(label): value for label, value in dice.items()}, "seconds": seconds, "bins": bins,
            "volumes": [[int(np.sum(x == label)) * size for x in (truth.data, got)] for label in there]}


def told(rows):
    """The tables of all scored scans."""
    print("| fusion | scans | Dice | lowest | highest | labels | seconds |\n| --- |" + 6 * " ---: |")
    for fusion in FUSIONS:
        some = [row for row in rows if row["fusion"] == fusion]
        dice = [row["dice"] for row in some]
        print(f"| {fusion} | {len(some)} | {np.mean(dice):.4f} | {min(dice):.4f} | {max(dice):.4f} | "
              f"{min(row['labels'] for row in some)} to {max(row['labels'] for row in some)} | "
              f"{np.mean([row['seconds'] for row in some]):.0f} |")
    best = [row for row in rows if row["fusion"] == "joint"]
    right, every, said = np.sum([row["bins"] for row in best], 0)
    print("\n| confidence | voxels (%) | mean confidence | right (%) |\n| --- | ---: | ---: | ---: |")
    for low, high, r, n, s in zip(BINS, BINS[1:], right, every, said, strict=False):
        if n:
            print(f"| {low:.1f} to {high:.1f} | {100 * n / every.sum():.1f} | {s / n:.2f} | {100 * r / n:.1f} |")
    manual, found = np.concatenate([row["volumes"] for row in best]).T
    error = abs(found - manual) / manual
    alike = np.corrcoef(np.log(manual), np.log(np.maximum(found, 1e-3)))[0, 1]
    print(f"\nvolumes: correlation of logarithms {alike:.3f}, median error {100 * np.median(error):.1f} %, found / "
          f"manual {found.sum() / manual.sum():.3f}, median of the labels {np.median(found / manual):.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--atlases", nargs="+", default=TRAINING)
    parser.add_argument("--scans", nargs="+", default=TEST)
    flags = parser.parse_args()
    sharding.start()
    flags.out.mkdir(parents=True, exist_ok=True)
    results = flags.out / "results.jsonl"
    for scan in flags.scans:
        left = [fusion for fusion in FUSIONS if not any(
            (row["scan"], row["fusion"]) == (scan, fusion) for row in read_rows(results))]
        if left:
            atlases = read_atlases(flags.folder, [id for id in flags.atlases if id != scan])
            prepared, found = registered(flags.folder, scan, atlases, flags.out)
        for fusion in left:
            row = scored(flags.folder, scan, atlases, prepared, found, fusion)
            with results.open("a") as file:
                file.write(json_text(row) + "\n")
            print(f"{scan} {fusion} {row['dice']:.4f}", flush=True)
    told([row for row in read_rows(results) if row["scan"] in flags.scans])


if __name__ == "__main__":
    main()
