"""Align one brain image to another: two NIfTI files in, the aligned image and the transform out."""

import argparse

from drivenmorph_jax import errors


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Writes warped, displacement, inverse_displacement, jacobian, force (and warped_labels) .nii.gz,\n"
               "overview.png, report.html and summary.json. Examples:\n\n"
               "  python register.py --fixed a.nii.gz --moving b.nii.gz --out result\n"
               "  python register.py --fixed a.nii.gz --moving b.nii.gz --out result --checkpoint runs/default\n"
               "  python register.py --fixed a.nii.gz --moving b.nii.gz --out result --method demons")
    parser.add_argument("--fixed", required=True, metavar="FILE", help="NIfTI image that stays")
    parser.add_argument("--moving", required=True, metavar="FILE",
                        help="NIfTI image that is aligned to it; may differ in shape, spacing and orientation")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the results; made where it is missing")
    parser.add_argument("--checkpoint", metavar="DIR", help="the --workdir of a training, for --method drivenmorph; "
                                                          "default: the weights that come with it, brain-t1")
    parser.add_argument("--method", default="drivenmorph", choices=["drivenmorph", "demons"],
                        help="the network, or the classical Demons algorithm, which needs no weights; "
                             "default: drivenmorph")
    parser.add_argument("--force", default="lncc", choices=["lncc", "intensity", "mind"],
                        help="of --method demons: local correlation; intensities, for images of one scanner; or MIND "
                             "descriptors, for images of two contrasts; default: lncc")
    parser.add_argument("--no-affine", action="store_true",
                        help="skip the affine alignment: the files' world coordinates agree already")
    parser.add_argument("--refine_steps", type=int, metavar="N",
                        help="iterations of Demons by local correlation after the method; default: 20 after the "
                             "network, 0 after Demons")
    parser.add_argument("--moving_labels", metavar="FILE", help="label map of the moving image, to be warped with it")
    parser.add_argument("--fixed_labels", metavar="FILE",
                        help="label map of the fixed image; with --moving_labels, Dice is reported")
    flags = parser.parse_args()
    if flags.refine_steps is not None and flags.refine_steps < 0:
        parser.error("--refine_steps must be 0 or more")

    from drivenmorph_jax import sharding
    from drivenmorph_jax.checkpoint import SHIPPED
    from drivenmorph_jax.registration import register
    sharding.start()
    summary = register(flags.fixed, flags.moving, flags.out, checkpoint=flags.checkpoint or SHIPPED,
                       method=flags.method, force=flags.force, affine=not flags.no_affine,
                       refine_steps=flags.refine_steps, fixed_labels=flags.fixed_labels,
                       moving_labels=flags.moving_labels)
    for name in ("similarity", "dice"):
        if f"{name}_after" in summary:
            print(f"{name} {summary[f'{name}_before']:.4f} before, {summary[f'{name}_after']:.4f} after")
    print(f"folding {summary['fold_pct']:.4f} %; look at {flags.out}/overview.png")


if __name__ == "__main__":
    errors.run(main)
