"""Dice, folding and seconds of classical Demons, of the network, and of other tools on the ordered pairs of a split.

python -m benchmarks.demons --data FOLDER [--split test] [--pairs 12] [--methods affine demons ...] [--out results.json]

The network runs with the weights of the project, alone and refined. The other tools are SimpleITK, greedy, ANTsPy and
syntx, where they are installed.

The folder is as for `eval.py --data`: ID_t1.nii.gz and ID_seg.nii.gz, affinely aligned on one grid. The methods and the
timing are those of `drivenmorph_jax/evaluation/rivals.py`. The first pair of a method of this project includes
compilation. Later pairs find the compiled code, as they do for users. `eval.py --rivals` compares with every metric and
a test.

At the end, the seconds of one iteration at the finest level are printed, with their lower bound. It is the time to read
both images, to write the warped one and read it, and to read and write the field and its update at an eighth of the
voxels: 4 + 12 / 8 floats a voxel, at the rate of a plain copy.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from drivenmorph_jax import data
from drivenmorph_jax.data.folder import IMAGE
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.evaluation import metrics, rivals

REFINED = "drivenmorph refined"


def score(fixed, moving, u):
    """`metrics.pair_metrics` of a displacement in voxels, without the metrics in mm."""
    return metrics.pair_metrics(u, None, fixed.labels, moving.labels, None, metrics.brain(fixed.image), EXCLUDE,
                                hausdorff=False)


def iteration(force, shape=(160, 192, 160)):
    """(seconds of one iteration at the finest level, their lower bound), both measured on this machine."""
    import jax
    import jax.numpy as jnp

    from benchmarks.fields import seconds
    from drivenmorph_jax import demons
    from drivenmorph_jax.fields.smooth import gaussian_smooth

    copied = jnp.zeros((*shape, 16))
    rate = 2 * copied.nbytes / seconds(lambda x: x + 1, copied)
    fixed, moving = (gaussian_smooth(jax.random.uniform(jax.random.key(k), (*shape, 1)), 1.0) for k in (0, 1))
    settings = demons.INTENSITY if force == "intensity" else demons.LNCC
    settings = settings | {"update": "compositional", "tolerance": 0.0}

    def run(count):
        return seconds(lambda *x: demons.demons_level(*x, **settings | {"iterations": count}), fixed, moving,
                       jnp.zeros((*(n // 2 for n in shape), 3)))

    return (run(6) - run(2)) / 4, 4 * (4 + 12 / 8) * np.prod(shape) / rate


EXCLUDE = (0, 1, 42, 43, 46, 63, 64)  # background and fragments in the MICCAI 2012 label set


def pairs(folder, split, count):
    """The first `count` ordered pairs of a split; all pairs if `count` is None."""
    cohort = data.load(ConfigDict({"name": "folder", "root": folder, "exclude": EXCLUDE, "splits": None}), (split,))
    return data.ordered_pairs(getattr(cohort, split))[:count]


def arguments(doc):
    """The parser of a benchmark on the pairs of a folder, `pairs(flags.data, flags.split, flags.pairs)`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of aligned images and labels")
    parser.add_argument("--split", default="test", choices=["train", "val", "test"])
    parser.add_argument("--pairs", type=int, help="only the first of them")
    return parser


def main():
    parser = arguments(__doc__)
    parser.add_argument("--methods", nargs="+", choices=[*rivals.METHODS, REFINED],
                        default=["affine", "itk-demons", "demons-intensity", "greedy", "demons"])
    parser.add_argument("--out", help="JSON file for every number")
    flags = parser.parse_args()

    rows, methods = [], [REFINED] if REFINED in flags.methods else []
    methods = rivals.installed(method for method in flags.methods if method != REFINED) + methods
    for fixed, moving in pairs(flags.data, flags.split, flags.pairs):
        files = [Path(flags.data) / f"{subject.id}{IMAGE}" for subject in (fixed, moving)]
        for method in methods:
            try:
                u, seconds = (rivals.run("drivenmorph", *files, "", 20) if method == REFINED
                              else rivals.run(method, *files))
            except InputError as error:
                print(error, flush=True)
                continue
            rows.append({"fixed": fixed.id, "moving": moving.id, "method": method, "seconds": seconds,
                         **score(fixed, moving, u)})
            print("{fixed} {moving} {method:20} Dice {dice:.4f}  folding {fold_pct:.5f} %  NDV {ndv_pct:.5f} %  "
                  "SDlogJ {sdlogj:.3f}  {seconds:6.1f} s".format(**rows[-1]), flush=True)
        if flags.out:
            Path(flags.out).write_text(json.dumps(rows, indent=1))

    print(f"\n{'':20}{'pairs':>6}{'Dice':>8}{'median':>8}{'folding %':>11}{'NDV %':>10}{'SDlogJ':>8}{'median s':>10}")
    for method in methods:
        mine = [row for row in rows if row["method"] == method]
        if mine:
            d, f, n, j, s = (np.array([row[key] for row in mine])
                             for key in ("dice", "fold_pct", "ndv_pct", "sdlogj", "seconds"))
            print(f"{method:20}{len(mine):6}{d.mean():8.4f}{np.median(d):8.4f}{f.mean():11.5f}{n.mean():10.5f}"
                  f"{j.mean():8.3f}{np.median(s):10.1f}")
    for force in ("intensity", "lncc"):
        taken, floor = iteration(force)
        print(f"one iteration of {force} at 160x192x160: {taken:.3f} s, {taken / floor:.1f} times the floor")


if __name__ == "__main__":
    main()
