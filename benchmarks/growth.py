"""How the time and the memory of a registration grow: with the voxels of the images, and with the network's updates.

python -m benchmarks.growth FOLDER FIXED MOVING [--spacing 4 2 1 0.7 0.5] [--out runs/growth]

Two brains of FOLDER, with labels, are resampled to each spacing, and registered by `register.py` as a command of its
own, by Demons and by the network, twice each. The second run counts, since it finds its programs; of runs longer than
two minutes, the first. Demons works at the spacing of the images, but not below 1 mm; the network always at that of its
training, 1 mm. "Updates" is a forward pass of the network with so many updates at its finest level, compiled. A power
law y = a x^k is fitted to voxels and to updates. The table and the picture lie in --out.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import matplotlib
import numpy as np

from drivenmorph_jax.data.folder import IMAGE, LABELS
from drivenmorph_jax.images.intensity import normalise
from drivenmorph_jax.images.reading import load_image, load_labels
from drivenmorph_jax.images.volume import on_grid, resample, smoothed
from drivenmorph_jax.images.working_grid import working_grid
from drivenmorph_jax.images.writing import save
from drivenmorph_jax.network.inference import grid_multiple, load_checkpoint, network_pass
from drivenmorph_jax.runtime import sharding
from drivenmorph_jax.runtime.checkpoint import SHIPPED

METHODS = "demons", "drivenmorph"
UPDATES = 1, 2, 4, 8, 16
LONG = 120  # seconds of a run beside which the loading of programs does not count


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="holds ID_t1.nii.gz and ID_seg.nii.gz")
    parser.add_argument("fixed", metavar="FIXED", help="id of the fixed image")
    parser.add_argument("moving", metavar="MOVING", help="id of the moving image")
    parser.add_argument("--spacing", type=float, nargs="+", default=[4, 2, 1, 0.7, 0.5], help="mm")
    parser.add_argument("--out", type=Path, default=Path("runs/growth"), help="default: runs/growth")
    flags = parser.parse_args()
    print("| mm | method | million voxels | seconds | CPU seconds | GB | told, GB | Dice | folding (%) |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    rows = []
    for spacing in flags.spacing:
        files = [resampled(flags.folder, id, spacing, flags.out) for id in (flags.fixed, flags.moving)]
        for method in METHODS:
            row = registered(*files, method, flags.out / "result")
            if row["seconds"] < LONG:
                row = registered(*files, method, flags.out / "result")
            rows.append(row)
            print(f"| {spacing:g} | {method} | {row['voxels'] / 1e6:.2f} | {row['seconds']:.1f} | {row['cpu']:.1f} | "
                  f"{row['gb']:.2f} | {row['told']:.2f} | {row['dice']:.4f} | {row['folding']:.5f} |", flush=True)
    print("\n| updates at the finest level | seconds | CPU seconds |\n| ---: | ---: | ---: |")
    passes = []
    for number, seconds, cpu in forward_passes(load_image(flags.folder / f"{flags.fixed}{IMAGE}"),
                                               load_image(flags.folder / f"{flags.moving}{IMAGE}")):
        passes.append((number, seconds, cpu))
        print(f"| {number} | {seconds:.2f} | {cpu:.2f} |", flush=True)
    drawn(rows, passes, flags.out / "growth.png")


def resampled(folder, id, spacing, out):
    """The files of an image and of its labels with voxels of `spacing` mm."""
    out.mkdir(parents=True, exist_ok=True)
    image = load_image(folder / f"{id}{IMAGE}")
    labels = load_labels(folder / f"{id}{LABELS}", image)
    scale = spacing / image.spacing
    shape = tuple(np.round(image.data.shape / scale).astype(int).tolist())
    affine = image.affine @ np.diag([*scale, 1])
    affine[:3, 3] = image.affine[:3, 3] + image.affine[:3, :3] @ ((scale - 1) / 2)
    paths = out / f"{id}{IMAGE}", out / f"{id}{LABELS}"
    like = on_grid(shape, affine, image.header)
    save(paths[0], resample(smoothed(image, spacing), shape, affine), like)
    save(paths[1], resample(labels, shape, affine, order=0), like)
    return paths


def registered(fixed, moving, method, out):
    """Seconds, CPU seconds and the largest memory of one command, and what its summary says."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "register.py", "--fixed", fixed[0], "--moving", moving[0],
                                "--fixed_labels", fixed[1], "--moving_labels", moving[1], "--method", method,
                                "--out", out], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"register.py failed on {fixed[0]} and {moving[0]} by {method}")
    summary = json.loads((out / "summary.json").read_text())
    return {"method": method, "voxels": load_image(fixed[0]).data.size, "seconds": seconds,
            "cpu": used.ru_utime + used.ru_stime, "gb": 1024 * used.ru_maxrss / 1e9, "told": summary["memory_gb"],
            "dice": summary["dice_after"], "folding": summary["fold_pct"]}


def forward_passes(fixed, moving):
    """(updates at the finest level, seconds, CPU seconds) of one pass of the shipped network, the fastest of three."""
    sharding.start()
    config, params, about = load_checkpoint(SHIPPED)
    shape, affine = working_grid(fixed, about["spacing"], grid_multiple(config))
    images = [normalise(resample(image, shape, affine))[None] for image in (fixed, moving)]
    for number in UPDATES:
        config = config.copy_and_resolve_references()
        config.model.updates = (number, *config.model.updates[1:])
        program = network_pass(config, levels=False).compiled(params, *images, None)
        clocks = []
        for _ in range(4):
            before = time.perf_counter(), time.process_time()
            jax.block_until_ready(program(params=params, fixed=images[0], moving=images[1], weights=None))
            clocks.append([now - then for now, then in zip((time.perf_counter(), time.process_time()), before,
                                                           strict=True)])
        yield number, *np.min(clocks[1:], 0)


def drawn(rows, passes, path):
    """One picture: seconds and GB against voxels, seconds of a pass against updates, on logarithmic axes."""
    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for axes_of, key, title in ((axes[0], "seconds", "seconds of the command"), (axes[1], "gb", "largest memory, GB")):
        for method in METHODS:
            own = [row for row in rows if row["method"] == method]
            _line(axes_of, [row["voxels"] for row in own], [row[key] for row in own], method)
        axes_of.set(xlabel="voxels of an image", title=title)
    _line(axes[2], *zip(*((number, seconds) for number, seconds, _ in passes), strict=True), "network")
    axes[2].set(xlabel="updates at the finest level", title="seconds of one pass, 1 mm")
    figure.savefig(path, dpi=100)


def _line(axes, x, y, name):
    """Points, and the power law through the larger half of them: small sizes are all start."""
    large = slice(len(x) // 2, None)
    k, _ = np.polyfit(np.log(x[large]), np.log(y[large]), 1)
    axes.loglog(x, y, "o-", label=f"{name}, exponent {k:.2f}")
    axes.legend(frameon=False, fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


if __name__ == "__main__":
    main()
