"""Move other images, label maps, series or points by a transform of `register` or of another tool."""

from drivenmorph_jax.cli import program

EPILOG = """\
Images are moved from the moving space to the grid of the fixed image. Points are moved from the fixed space to the
moving space. --inverse does both in the other direction. Examples:

  %(prog)s --transform result/displacement.nii.gz --moving t2.nii.gz --out t2_aligned.nii.gz
  %(prog)s --transform result/displacement.nii.gz --moving seg.nii.gz --out seg_aligned.nii.gz --interpolation nearest
  %(prog)s --transform result/displacement.nii.gz --inverse --moving atlas.nii.gz --out atlas_back.nii.gz
  %(prog)s --transform result/displacement.nii.gz --points p.csv --out q.csv
  %(prog)s --transform t1Warp.nii.gz t0GenericAffine.mat --moving t2.nii.gz --out t2_aligned.nii.gz"""


def main(arguments=None, prog="drivenmorph apply"):
    """Run the program with `arguments`, by default those of the command line. Raises InputError."""
    parser = program.parser(prog, __doc__, EPILOG)
    add = parser.add_argument
    add(
        "--transform",
        required=True,
        nargs="+",
        action=program.Once,
        metavar="FILE",
        help="displacement field or affine of this package, ITK, ANTs, greedy, FSL, FreeSurfer, SPM, NiftyReg, AFNI, "
        "dipy or Learn2Reg; or several, in the order in which a point passes them from the fixed to the moving space, "
        "as antsApplyTransforms has them. FILE:inverse is the inverse of a file",
    )
    add(
        "--convention",
        metavar="NAME",
        help="what the numbers of a transform are whose file does not tell it: itk, ras, spm, fsl or l2r for a field, "
        "greedy or flirt for a matrix",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--moving", nargs="+", metavar="FILE", help="3-D images, label maps or 4-D series, one or more")
    what.add_argument(
        "--points",
        metavar="FILE",
        help="CSV with columns x, y, z in RAS mm, or .fcsv of 3D Slicer in RAS or LPS; all other text is kept",
    )
    add(
        "--out",
        required=True,
        metavar="FILE",
        help="file for the result; with several moving images, a folder",
    )
    add(
        "--interpolation",
        default="linear",
        choices=["linear", "cubic", "nearest", "label"],
        help="nearest and label are for label maps, and keep values and type; label has smoother borders; "
        "default: linear",
    )
    add("--inverse", action="store_true", help="use the inverse transform, from the fixed to the moving space")
    add(
        "--reference",
        metavar="FILE",
        help="image or series on whose grid the result lies; default: the fixed image; with --inverse the moving image",
    )
    add(
        "--source",
        metavar="FILE",
        help="image of the space that the images come from, for transforms of FSL and Learn2Reg; default: "
        "the first of --moving",
    )
    program.add_geometry(add)
    flags = parser.parse_args(arguments)

    # Imported late, so that --help answers at once.
    from drivenmorph_jax.registration.apply import apply_files
    from drivenmorph_jax.runtime import sharding

    sharding.start()
    paths = apply_files(
        flags.transform,
        flags.out,
        flags.moving,
        flags.points,
        flags.interpolation,
        flags.inverse,
        flags.reference,
        flags.geometry,
        flags.convention,
        flags.source,
    )
    program.tell(paths, "{}")
