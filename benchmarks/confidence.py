"""How far label borders lie from their place, by the confidence of the registration there.

python -m benchmarks.confidence FOLDER [--split val] [--method demons] [--pairs 6]

FOLDER holds ID_t1.nii.gz and ID_seg.nii.gz, and a splits.json lies there or in its parent. Pairs of this split are
registered. The distance of a border voxel of a warped label is that to the nearest border voxel of the same label in
the fixed image, in mm, and the other way round. Each distance is sorted by the confidence at its voxel.

"Mean" and "90 %" are of these distances. "Held" is the share of voxels whose distance is at most the uncertainty: .9
where the intervals are right. The rank correlations are Spearman's between uncertainty and distance: of voxels, and of
means over cubes of 5 and 10 mm. The last line is the curve `WITHIN` that these pairs would give.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
from scipy import ndimage, stats

from benchmarks.demons import EXCLUDE
from drivenmorph_jax.cli.program import run
from drivenmorph_jax.data.folder import beside
from drivenmorph_jax.images.reading import load_labels
from drivenmorph_jax.registration.confidence import CONFIDENCE
from drivenmorph_jax.registration.register import register

SIDES = (5, 10)  # mm, of the cubes
WINDOW = 0.02  # of confidence, around a point of the curve
FEWEST = 100  # border voxels in a cube that counts
BINS = (0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1)  # of confidence


def border_distances(fixed, warped, spacing):
    """Places (N, 3), in voxels, and distances (N,), in mm, of the border voxels of two label maps (X, Y, Z)."""
    places, distances = [], []
    for label in np.setdiff1d(np.intersect1d(fixed, warped), EXCLUDE):
        masks = fixed == label, warped == label
        (box,) = ndimage.find_objects((masks[0] | masks[1]).astype(np.uint8))
        box = tuple(slice(max(0, one.start - 1), one.stop + 1) for one in box)
        borders = [mask[box] & ~ndimage.binary_erosion(mask[box]) for mask in masks]
        for here, there in (borders, borders[::-1]):
            places.append(np.argwhere(here) + [one.start for one in box])
            distances.append(ndimage.distance_transform_edt(~there, spacing)[here])
    return np.concatenate(places), np.concatenate(distances)


def cubes(places, side, *values):
    """Means of `values` (N,) over cubes of `side` voxels that hold `FEWEST` places (N, 3) or more."""
    _, cube, number = np.unique(places // side, axis=0, return_inverse=True, return_counts=True)
    return [(np.bincount(cube.ravel(), x) / number)[number >= FEWEST] for x in values]


def table(rows):
    """The table and the lines of the docstring, from (places, distances, confidence, uncertainty) of each pair."""
    distance, sure, limit = (np.concatenate(x) for x in list(zip(*rows, strict=True))[1:])
    lines = ["| confidence | border voxels (%) | mean (mm) | 90 % (mm) | held |", "| --- | ---: | ---: | ---: | ---: |"]
    for low, high in itertools.pairwise(BINS):
        there = (sure >= low) & (sure < high + (high == 1))
        if there.any():
            found = distance[there]
            lines.append(f"| {low} to {high} | {100 * there.mean():.1f} | {found.mean():.2f} | "
                         f"{np.percentile(found, 90):.2f} | {np.mean(found <= limit[there]):.3f} |")
    lines.append(f"| all | 100 | {distance.mean():.2f} | {np.percentile(distance, 90):.2f} | "
                 f"{np.mean(distance <= limit):.3f} |")
    by = {"voxels": [stats.spearmanr(limit, distance)[0] for _, distance, _, limit in rows]}
    for side in SIDES:
        by[f"{side} mm"] = [stats.spearmanr(*cubes(places, side, -sure, distance))[0]
                            for places, distance, sure, _ in rows]
    lines.append("\nRank correlation, mean over pairs: " + ", ".join(
        f"{name} {np.mean(found):.2f}" for name, found in by.items()))
    curve = [np.percentile(distance[abs(sure - at) < WINDOW], 90) for at in CONFIDENCE]
    return "\n".join([*lines, f"WITHIN at {CONFIDENCE}: " + ", ".join(f"{x:.2f}" for x in curve)])


def measured(folder, fixed, moving, method):
    """(places, distances, confidence, uncertainty) of the border voxels of one pair."""
    files = {role: folder / f"{name}_t1.nii.gz" for role, name in (("fixed", fixed), ("moving", moving))}
    labels = {f"{role}_labels": folder / f"{name}_seg.nii.gz" for role, name in (("fixed", fixed), ("moving", moving))}
    result = register(**files, **labels, affine="none", strip="no", method=method, quiet=True)
    maps = np.asarray(load_labels(labels["fixed_labels"]).data), np.asarray(result.warped_labels.dataobj)
    places, distances = border_distances(*maps, result.warped.header.get_zooms()[:3])
    return places, distances, result.confidence[tuple(places.T)], result.uncertainty[tuple(places.T)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", default="val")
    parser.add_argument("--method", default="drivenmorph")
    parser.add_argument("--pairs", type=int, default=6)
    flags = parser.parse_args()
    names = json.loads(beside(flags.folder, "splits.json").read_text())[flags.split]
    pairs = list(itertools.permutations(names, 2))
    rows = [measured(flags.folder, *pairs[k], flags.method)
            for k in np.linspace(0, len(pairs), flags.pairs, endpoint=False).astype(int)]
    print(table(rows))


if __name__ == "__main__":
    run(main)
