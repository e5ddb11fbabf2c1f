"""What a registration loses where the moving image is cut.

    python -m benchmarks.field_of_view FOLDER FIXED MOVING [--method drivenmorph] [--step 1] [--cuts "25% below" ...]

FOLDER holds ID_t1.nii.gz and ID_seg.nii.gz; FIXED and MOVING are two IDs. The images are registered as they are, and
with the moving one cut in the ways of `benchmarks.affine`. A cut pair and the whole pair are compared where the
anatomy is there: at the voxels that the transform of the whole pair leads into what is left. "Dice" is that of both
there, "distance" the mean distance in mm between both transforms in the brain there, and "beyond" the largest
displacement in mm of the cut pair against its own affine more than 30 mm beyond the cut.
"""

import argparse
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine
from scipy import ndimage

from benchmarks.affine import cuts
from benchmarks.checks import read
from drivenmorph_jax.cli.program import run
from drivenmorph_jax.evaluation.metrics import mean_dice
from drivenmorph_jax.images.reading import load_image
from drivenmorph_jax.images.volume import canonical, part_of
from drivenmorph_jax.registration.register import register

FAR = 30.0  # mm


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("fixed", help="ID of the fixed subject")
    parser.add_argument("moving", help="ID of the moving subject")
    parser.add_argument("--method", default="drivenmorph")
    parser.add_argument("--step", type=int, default=1, help="voxels of the files that become one; default: 1")
    parser.add_argument("--cuts", nargs="+", help="names of the cuts, such as '25% below'; default: all")
    flags = parser.parse_args()
    (fixed, fixed_labels, at), (moving, moving_labels, to) = (
        read(flags.folder, subject, flags.step) for subject in (flags.fixed, flags.moving))

    def registered(image, labels, affine):
        return register(nib.Nifti1Image(fixed, at), nib.Nifti1Image(image, affine),
                        fixed_labels=nib.Nifti1Image(fixed_labels, at), moving_labels=nib.Nifti1Image(labels, affine),
                        method=flags.method, quiet=True)

    whole, brain = registered(moving, moving_labels, to), fixed_labels > 0
    print(f"whole: Dice {whole.summary['dice_after']:.4f}, folding {whole.summary['fold_pct']:.4f} %\n\n"
          "| cut | Dice of the whole pair | of the cut pair | distance (mm) | beyond (mm) | folding (%) |\n"
          "| --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
    points = apply_affine(at, np.argwhere(brain))
    for name, volume in cuts(canonical(load_image(nib.Nifti1Image(moving, to)))):
        if flags.cuts and name not in flags.cuts:
            continue
        labels = moving_labels[part_of(to, volume.data.shape, volume.affine)]
        found = registered(volume.data, labels, volume.affine)
        known = whole.transform.apply(nib.Nifti1Image(np.ones(labels.shape, np.uint8), volume.affine), "nearest")
        there = np.asarray(known.dataobj) > 0
        dice = [mean_dice(np.where(there, fixed_labels, 0), np.where(there, np.asarray(one.warped_labels.dataobj), 0))
                for one in (whole, found)]
        apart, moved = (np.linalg.norm(found.transform.points(points) - other, axis=1) for other in (
            whole.transform.points(points), apply_affine(found.transform.linear, points)))
        far = ndimage.distance_transform_edt(~there, np.linalg.norm(at[:3, :3], axis=0))[brain] > FAR
        print(f"| {name} | {dice[0]:.4f} | {dice[1]:.4f} | {apart[there[brain]].mean():.2f} "
              f"| {moved[far].max(initial=0):.2f} | {found.summary['fold_pct']:.4f} |", flush=True)


if __name__ == "__main__":
    run(main)
