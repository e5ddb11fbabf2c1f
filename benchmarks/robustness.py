"""The effect of another scanner: Dice of the shipped weights on changed images, minus Dice on the unchanged images.

python -m benchmarks.robustness [--data FOLDER] [--pairs 3]

The pairs are those of the folder's test split; without a folder, those of the embedded cohort at 1 mm. Only the moving
image is changed, which is harder than a change of both.
"""

import argparse
from functools import partial

import jax
import numpy as np
from scipy import ndimage
from tqdm import tqdm

from benchmarks.demons import pairs, score
from configs.default import get_config as default
from drivenmorph_jax import data
from drivenmorph_jax.cli.program import run
from drivenmorph_jax.data import augmentation
from drivenmorph_jax.network.inference import load_checkpoint, make_predict
from drivenmorph_jax.runtime import sharding
from drivenmorph_jax.runtime.checkpoint import SHIPPED


def coarse(image, voxels):
    """The image as if scanned with voxels that many times larger: smoothed, sampled, and resampled to its grid."""
    smooth = ndimage.gaussian_filter(image, voxels / 2.355)
    matrix = np.full(3, voxels)
    small = ndimage.affine_transform(smooth, matrix, output_shape=[int(n / voxels) for n in image.shape], order=1)
    return ndimage.affine_transform(small, 1 / matrix, output_shape=image.shape, order=1)


CHANGES = {
    "unchanged": lambda image, key: image,
    "gamma 0.6": lambda image, key: image**np.float32(0.6),
    "gamma 1.6": lambda image, key: image**np.float32(1.6),
    "bias, 20 %": partial(augmentation.add_bias, strength=0.2),
    "noise, 5 %": partial(augmentation.add_noise, strength=0.05),
    "1.5 mm": lambda image, key: coarse(image, 1.5),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of aligned images and labels; default: the embedded cohort")
    parser.add_argument("--checkpoint", default=SHIPPED, help="default: the weights of the project")
    parser.add_argument("--pairs", type=int, default=3, help="how many; default: 3")
    parser.add_argument("--refine_steps", type=int, default=0, help="default: 0")
    flags = parser.parse_args()
    sharding.start()
    config, params, _ = load_checkpoint(flags.checkpoint)
    predict = make_predict(config, flags.refine_steps)
    if flags.data:
        found = pairs(flags.data, "test", flags.pairs)
    else:
        settings = default().data
        settings.update({"shape": (160, 192, 160), "spacing": 1.0})
        found = data.ordered_pairs(data.load(settings, ("test",)).test)[:flags.pairs]
    rows = {name: [] for name in CHANGES}
    for fixed, moving in tqdm(found, unit="pair"):
        for name, change in CHANGES.items():
            image = np.asarray(change(moving.image, jax.random.key(0)), np.float32)
            u = np.asarray(predict(params, fixed.image[None], image[None])[0][0])
            rows[name].append(score(fixed, moving, u))
    clean = np.mean([row["dice"] for row in rows["unchanged"]])
    for name, scores in rows.items():
        dice = np.mean([row["dice"] for row in scores])
        fold = np.mean([row["fold_pct"] for row in scores])
        print(f"{name:12} Dice {dice:.4f}  change {dice - clean:+.4f}  folding {fold:.4f} %")


if __name__ == "__main__":
    run(main)
