"""The benefit of a mask: Dice of a pair with a bright lesion added to one of its brains, with and without the mask.

python -m benchmarks.lesion --data FOLDER [--radius 12] [--method drivenmorph]

The pair is the first test pair. The lesion is a ball in the white matter of one brain, twice as bright as its brightest
tissue. "Far" is the mean change of the displacement by the lesion, outside the ball. Labels are scored outside the
ball.
"""

import argparse
from pathlib import Path

import numpy as np
from scipy import ndimage

from benchmarks.demons import pairs
from drivenmorph_jax import register
from drivenmorph_jax.cli.program import run
from drivenmorph_jax.evaluation import metrics
from drivenmorph_jax.images.intensity import foreground
from drivenmorph_jax.images.reading import load_image, load_labels
from drivenmorph_jax.runtime import sharding


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of aligned images and labels")
    parser.add_argument("--radius", type=float, default=12.0, help="of the ball, voxels; default: 12")
    parser.add_argument("--method", default="drivenmorph", choices=["drivenmorph", "demons"])
    flags = parser.parse_args()
    sharding.start()
    fixed, moving = (Path(flags.data) / f"{subject.id}_t1.nii.gz" for subject in pairs(flags.data, "test", 1)[0])
    images = {"fixed": load_image(fixed), "moving": load_image(moving)}
    labels = {role: load_labels(str(path).replace("_t1", "_seg")).data
              for role, path in (("fixed", fixed), ("moving", moving))}

    def found(sick=None, masked=False):
        data = {role: image.data.copy() for role, image in images.items()}
        masks = {}
        if sick:
            data[sick][lesion] = 2 * np.percentile(data[sick], 99.9)
            masks = {f"{sick}_mask": lesion.astype(np.int32)} if masked else {}
        return register(data["fixed"], data["moving"], affine=False, method=flags.method, quiet=True, **masks)

    brain = foreground(images["fixed"].data)
    centre = np.array(ndimage.center_of_mass(brain)) + (30, 5, 15)
    lesion = np.linalg.norm(np.moveaxis(np.indices(brain.shape), 0, -1) - centre, axis=-1) < flags.radius
    outside = brain & ~ndimage.binary_dilation(lesion, iterations=3)

    def dice(result):
        moved = metrics.warp_labels(labels["moving"], result.transform.displacement)
        return metrics.mean_dice(labels["fixed"] * outside, moved * outside, moving_labels=labels["moving"])

    healthy = found()
    print(f"healthy: Dice {dice(healthy):.4f}\n\n| lesion in | mask | Dice | change | far (mm) | J <= 0 (%) |\n"
          "| --- | --- | ---: | ---: | ---: | ---: |")
    for sick in images:
        for masked in (False, True):
            result = found(sick, masked)
            far = np.linalg.norm(result.transform.displacement - healthy.transform.displacement, axis=-1)[outside]
            score, mask = dice(result), "yes" if masked else "no"
            print(f"| {sick} | {mask} | {score:.4f} | {score - dice(healthy):+.4f} | {far.mean():.3f} | "
                  f"{result.summary['fold_pct']:.4f} |", flush=True)


if __name__ == "__main__":
    run(main)
