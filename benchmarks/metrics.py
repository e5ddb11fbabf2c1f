"""Seconds of the scores of one pair, each metric by itself and all together, beside surface-distance on whole volumes.

python -m benchmarks.metrics --data FOLDER

One test pair of the folder is deformed by a field that resembles that of a registration. Only NumPy and SciPy run.
"""

import argparse
import time

import numpy as np
import surface_distance
from scipy import ndimage

from benchmarks.demons import pairs
from drivenmorph_jax.cli.program import run
from drivenmorph_jax.evaluation import metrics
from drivenmorph_jax.evaluation.explanation import of_pair


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of aligned images and labels")
    flags = parser.parse_args()
    fixed, moving = pairs(flags.data, "test", 1)[0]
    rng, shape, spacing = np.random.default_rng(0), fixed.image.shape, (1.0,) * 3
    u = ndimage.gaussian_filter(rng.standard_normal((*shape, 3)).astype(np.float32), (8, 8, 8, 0))
    u *= 3 / np.abs(u).max()
    brain, moved = metrics.brain(fixed.image), metrics.warp_labels(moving.labels, u)
    jacobian = metrics.jacobian(u)
    labels = np.intersect1d(fixed.labels, moved)[1:]
    forces = {"total": (0.5 * u, u)}
    parts = {
        "all scores of a pair": lambda: metrics.pair_metrics(u, -u, fixed.labels, moving.labels, spacing, brain),
        "HD95": lambda: metrics.hd95(fixed.labels, moved, spacing),
        "Dice": lambda: metrics.dice(fixed.labels, moved),
        "Jacobian": lambda: metrics.jacobian(u),
        "SDlogJ and folding": lambda: (metrics.sdlogj(jacobian, brain), metrics.sdlogj_l2r(jacobian, brain),
                                       metrics.fold_pct(jacobian, brain)),
        "NDV": lambda: metrics.ndv_pct(u, brain),
        "inverse consistency": lambda: metrics.inverse_consistency(u, -u, spacing, brain),
        "force, one level at full resolution": lambda: of_pair(forces, forces, brain),
    }
    print(f"{fixed.id} and {moving.id}, {shape}, {len(labels)} labels\n\n| | seconds |\n| --- | ---: |")
    for name, function in parts.items():
        print(f"| {name} | {min(seconds(function) for _ in range(2)):.2f} |", flush=True)
    alone = seconds(lambda: [surface_distance.compute_robust_hausdorff(
        surface_distance.compute_surface_distances(fixed.labels == k, moved == k, spacing), 95) for k in labels])
    print(f"| HD95 by surface-distance on whole volumes | {alone:.2f} |")


if __name__ == "__main__":
    run(main)
