"""Move further images, label maps, series or points by a transform that register.py wrote, or that ITK or ANTs did."""

import argparse

from drivenmorph_jax.cli.program import run


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Images come from the moving space onto the grid of the fixed image, points go from fixed to moving;\n"
               "--inverse turns both round. Examples:\n\n"
               "  python apply.py --transform result/displacement.nii.gz --moving t2.nii.gz --out t2_aligned.nii.gz\n"
               "  python apply.py --transform result/displacement.nii.gz --moving seg.nii.gz --out seg_aligned.nii.gz "
               "--interpolation nearest\n"
               "  python apply.py --transform result/displacement.nii.gz --inverse --moving atlas.nii.gz "
               "--out atlas_back.nii.gz\n"
               "  python apply.py --transform result/displacement.nii.gz --points p.csv --out q.csv")
    parser.add_argument("--transform", required=True, metavar="FILE",
                        help="displacement field: NIfTI of shape (X, Y, Z, 1, 3) with intent 1007 (LPS) or 1006 (RAS)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--moving", nargs="+", metavar="FILE", help="3-D images, label maps or 4-D series, in any number")
    what.add_argument("--points", metavar="FILE",
                      help="CSV with columns x, y, z in RAS mm; other columns are kept")
    parser.add_argument("--out", required=True, metavar="FILE",
                        help="file for the result; a folder where there are several moving images")
    parser.add_argument("--interpolation", default="linear", choices=["linear", "nearest"],
                        help="nearest for label maps; default: linear")
    parser.add_argument("--inverse", action="store_true", help="the other way, from fixed to moving space")
    parser.add_argument("--reference", metavar="FILE",
                        help="image on whose grid the result lies; default: the fixed one; with --inverse the moving")
    flags = parser.parse_args()

    from drivenmorph_jax.registration.apply import apply_files
    from drivenmorph_jax.runtime import sharding
    sharding.start()
    for path in apply_files(flags.transform, flags.out, flags.moving, flags.points, flags.interpolation, flags.inverse,
                            flags.reference):
        print(path)


if __name__ == "__main__":
    run(main)
