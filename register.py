"""Align one brain image to another: two NIfTI files in, the aligned image and the transform out."""

import argparse

from drivenmorph_jax.cli.program import run, size


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Writes warped, displacement, inverse_displacement, jacobian, force (and warped_labels) .nii.gz,\n"
               "affine.tfm, overview.png, report.html and summary.json. Other images follow by apply.py. Examples:\n\n"
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
                             "descriptors, which an inverted image has as well; default: lncc")
    parser.add_argument("--contrast", default="auto", choices=["auto", "same", "other"],
                        help="of the two images: other, as of T1 and T2, lets the moving image take the values of the "
                             "fixed one, in three passes; default: auto, by the correlation of their values")
    parser.add_argument("--no-affine", action="store_true",
                        help="skip the affine alignment: the files' world coordinates agree already")
    parser.add_argument("--initial_affine", metavar="FILE",
                        help="ITK affine (.tfm, .txt, .mat) from fixed to moving, taken in place of one that is found")
    parser.add_argument("--refine_steps", type=int, metavar="N",
                        help="iterations of Demons by local correlation after the network, both ways, before it looks "
                             "twice at what is left; 0: the network alone, once, in a quarter of the time. After "
                             "--method demons they come at the end, by MIND after --force mind. Default: 10, 0 after "
                             "Demons")
    parser.add_argument("--moving_labels", metavar="FILE", help="label map of the moving image, to be warped with it")
    parser.add_argument("--fixed_labels", metavar="FILE",
                        help="label map of the fixed image; with --moving_labels, Dice is reported")
    parser.add_argument("--fixed_mask", metavar="FILE",
                        help="label map on the fixed image, above 0 where tissue is missing or sick: no force is taken "
                             "from there, and the field goes on smoothly inside")
    parser.add_argument("--moving_mask", metavar="FILE", help="the same on the moving image")
    parser.add_argument("--memory", metavar="SIZE", type=size,
                        help="such as 4GB: the network takes half or a quarter of the resolution where it would need "
                             "more")
    parser.add_argument("--formats", nargs="+", default=["itk"], choices=["itk", "ras", "h5", "l2r"],
                        help="of the transform and its inverse: itk, displacement fields in LPS mm; ras, the same in "
                             "RAS mm with intent 1006; h5, ITK composites; l2r, Learn2Reg's field in voxels; "
                             "default: itk")
    parser.add_argument("--bids", nargs=3, metavar=("PREFIX", "FROM", "TO"),
                        help="name the transforms as BIDS derivatives do, FROM the moving image's space TO the fixed "
                             "one's, such as sub-01 T1w MNI152NLin2009cAsym")
    flags = parser.parse_args()
    if flags.refine_steps is not None and flags.refine_steps < 0:
        parser.error("--refine_steps must be 0 or more")
    if flags.no_affine and flags.initial_affine:
        parser.error("--no-affine and --initial_affine exclude each other")

    from drivenmorph_jax.files import check_folder
    from drivenmorph_jax.registration.register import register
    from drivenmorph_jax.runtime import sharding
    from drivenmorph_jax.runtime.checkpoint import SHIPPED
    sharding.start()
    check_folder(flags.out)
    result = register(flags.fixed, flags.moving, checkpoint=flags.checkpoint or SHIPPED, method=flags.method,
                      force=flags.force, contrast=flags.contrast,
                      affine=flags.initial_affine or not flags.no_affine, refine_steps=flags.refine_steps,
                      fixed_labels=flags.fixed_labels, moving_labels=flags.moving_labels,
                      fixed_mask=flags.fixed_mask, moving_mask=flags.moving_mask, memory=flags.memory)
    print("write ...", end=" ", flush=True)
    result.save(flags.out, flags.formats, flags.bids)
    print("done")
    summary = result.summary
    for name in ("similarity", "dice"):
        if f"{name}_after" in summary:
            print(f"{name} {summary[f'{name}_before']:.4f} before, {summary[f'{name}_after']:.4f} after")
    if summary["similarity_after"] <= summary["similarity_before"]:
        print("warning: the registration did not make the images more alike; look at the pictures before you use it")
    print(f"folding {summary['fold_pct']:.4f} %; look at {flags.out}/overview.png")


if __name__ == "__main__":
    run(main)
