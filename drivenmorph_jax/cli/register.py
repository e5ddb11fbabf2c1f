"""Align one brain image to another: two NIfTI files in, the aligned image and the transform out."""

import sys
import warnings

from drivenmorph_jax.cli import program

EPILOG = """\
Of an image of a whole head, only the brain is registered, and the whole image is warped. The folder gets warped,
displacement, inverse_displacement, jacobian, force (and warped_labels, fixed_brain, moving_brain) .nii.gz, affine.tfm,
overview.png, report.html and summary.json. `apply` moves other images by the same transform. Examples:

  %(prog)s --fixed a.nii.gz --moving b.nii.gz --out result
  %(prog)s --fixed a.nii.gz --moving b.nii.gz --out result --checkpoint runs/default
  %(prog)s --fixed a.nii.gz --moving b.nii.gz --out result --method demons"""


def main(arguments=None, prog="drivenmorph register"):
    """Run the program with `arguments`, by default those of the command line. Raises InputError."""
    parser = program.parser(prog, __doc__, EPILOG)
    _images(parser.add_argument)
    add_reading(parser.add_argument)
    add_method(parser.add_argument)
    _start(parser.add_argument)
    add_results(parser.add_argument)
    _names(parser.add_argument)
    flags = parser.parse_args(arguments)
    if flags.affine and flags.initial_transform:
        parser.error("--affine and --initial_transform exclude each other")

    # Imported late, so that --help answers at once; JAX after the files have been looked at.
    from drivenmorph_jax.files import check_folder

    check_folder(flags.out)
    _check_files(flags)

    from drivenmorph_jax.registration.register import register
    from drivenmorph_jax.registration.result import check_out, transform_names
    from drivenmorph_jax.runtime import sharding

    sharding.start()
    # Refused before the work, not after.
    check_out(flags.out, _files(flags))
    transform_names(flags.bids)
    result = register(
        flags.fixed,
        flags.moving,
        initial_transform=flags.initial_transform,
        convention=flags.convention,
        fixed_labels=flags.fixed_labels,
        moving_labels=flags.moving_labels,
        fixed_mask=flags.fixed_mask,
        moving_mask=flags.moving_mask,
        landmarks=flags.landmarks,
        extra_fixed=flags.extra_fixed or (),
        extra_moving=flags.extra_moving or (),
        **settings(flags),
    )
    print("write ...", end=" ", flush=True)
    result.save(flags.out, flags.formats, flags.bids)
    print("done")
    print(*described(result.summary), sep="\n", end=f"; look at {flags.out}/overview.png\n")
    doubts = [one for one in result.summary["checks"] if one["status"] != "ok"]
    for one in doubts:
        print(f"warning: {one['name']} {told(one)}", file=sys.stderr)
    if flags.strict and doubts:
        sys.exit(3)


def _check_files(flags):
    """Raises the `InputError` of a file that is missing, of an image with a header of no use, or of bad landmarks."""
    from drivenmorph_jax.images.reading import open_nifti
    from drivenmorph_jax.transforms.points import read_landmarks

    with warnings.catch_warnings(action="ignore"):  # `register` warns
        for path in _images_of(flags):
            open_nifti(path, flags.geometry)
    if flags.landmarks is not None:
        read_landmarks(flags.landmarks)


def _images_of(flags):
    one_each = (flags.fixed, flags.moving, flags.fixed_labels, flags.moving_labels, flags.fixed_mask, flags.moving_mask)
    return [path for path in (*one_each, *(flags.extra_fixed or ()), *(flags.extra_moving or ())) if path is not None]


def _files(flags):
    """All files that the flags name."""
    from drivenmorph_jax.transforms.reading import BACK

    transforms = [path.removesuffix(BACK) for path in flags.initial_transform or ()]
    return [*_images_of(flags), *transforms, *filter(None, [flags.landmarks])]


def settings(flags):
    """The arguments of `register` that the flags of `add_reading` and `add_method` set."""
    from drivenmorph_jax.errors import InputError
    from drivenmorph_jax.runtime.checkpoint import SHIPPED

    if flags.checkpoint and flags.method != "drivenmorph":
        raise InputError(f"--checkpoint is for the network, and --method is {flags.method}: leave one of them out")
    names = (
        "strip",
        "method",
        "force",
        "contrast",
        "stiffness",
        "refine_steps",
        "mask_sense",
        "guide_labels",
        "geometry",
        "memory",
    )
    return {name: getattr(flags, name) for name in names} | {
        "checkpoint": flags.checkpoint or SHIPPED,
        "affine": flags.affine or True,
    }


def _images(add):
    """Flags of the two images and what belongs to them."""
    add("--fixed", required=True, metavar="FILE", help="NIfTI image that stays where it is")
    add(
        "--moving",
        required=True,
        metavar="FILE",
        help="NIfTI image that is aligned to the fixed one; shape, spacing and orientation may differ",
    )
    add("--moving_labels", metavar="FILE", help="label map of the moving image; it is warped as the image is")
    add(
        "--fixed_labels",
        metavar="FILE",
        help="label map of the fixed image; together with --moving_labels, Dice is reported",
    )
    add(
        "--fixed_mask",
        metavar="FILE",
        help="label map on the fixed image, above 0 where tissue is missing or sick. No force is taken from there, and "
        "the deformation is interpolated smoothly inside",
    )
    add("--moving_mask", metavar="FILE", help="the same for the moving image")
    add(
        "--landmarks",
        metavar="FILE",
        help="CSV with columns fixed_x, fixed_y, fixed_z, moving_x, moving_y, moving_z in RAS mm and, where you like, "
        "name, radius, weight and curve: points of the fixed image and where each lies in the moving image. Rows of "
        "one name in the column curve are a line in both images. They drive the deformation around them, up to three "
        "radii of 10 mm",
    )
    add(
        "--extra_fixed",
        nargs="+",
        action=program.Once,
        metavar="FILE",
        help="further images of the fixed brain, such as T2 beside T1, on any grid, aligned to --fixed. They drive "
        "Demons, or the refinement after the network, together with --fixed",
    )
    add(
        "--extra_moving",
        nargs="+",
        action=program.Once,
        metavar="FILE",
        help="the same for the moving brain: as many, in the same order",
    )


def add_reading(add):
    """Flags of how images are read, by `add`, the method `add_argument` of a parser."""
    add(
        "--mask_sense",
        default="ignore",
        choices=["ignore", "use"],
        help="meaning of the masks. ignore: above 0 where the image is ignored; use: above 0 where it is used, as in "
        "ANTs; default: ignore",
    )
    program.add_strip(add)
    program.add_geometry(add)


def add_method(add):
    """Flags of how images are registered."""
    add(
        "--checkpoint",
        metavar="DIR",
        help="weights of --method drivenmorph: the --workdir of a training; default: the shipped weights, brain-t1",
    )
    add(
        "--method",
        default="drivenmorph",
        choices=["drivenmorph", "demons"],
        help="drivenmorph: the network; demons: classical Demons, which needs no weights; default: drivenmorph",
    )
    add(
        "--force",
        default="lncc",
        choices=["lncc", "intensity", "mind"],
        help="force of --method demons. lncc: local correlation; intensity: differences of intensities, for images of "
        "one scanner; mind: differences of MIND descriptors, which an inverted contrast does not change; default: lncc",
    )
    add(
        "--contrast",
        default="auto",
        choices=["auto", "same", "other"],
        help="contrast of the two images. same: both have one contrast; other: they differ, as T1 and T2 do, and the "
        "moving image gets the intensities of the fixed one in three passes; auto: decided by the correlation of "
        "their intensities; default: auto",
    )
    add(
        "--stiffness",
        default="auto",
        choices=["auto", "low", "high"],
        help="of the deformation. low: as the method finds it; high: a stiff field, for images that have little in "
        "common, such as a patient and an atlas; auto: decided by what they have in common; default: auto",
    )
    add(
        "--affine",
        choices=["affine", "similarity", "rigid", "none"],
        help="alignment before the deformation. affine; similarity: turns, shifts and one scale; rigid: turns and "
        "shifts; none: the world coordinates of the two files agree already; default: affine",
    )
    add("--no-affine", dest="affine", action="store_const", const="none", help="the same as --affine none")
    add(
        "--refine_steps",
        type=program.count,
        metavar="N",
        help="iterations of Demons after the network. The network registers forward and backward, both results are "
        "averaged, N iterations by local correlation follow, and the network registers the residual. "
        "0: the network runs once, forward, in a third of the time. With --method demons, N iterations follow at "
        "the end, by MIND with --force mind. Default: 5; with --method demons 0",
    )
    add(
        "--guide_labels",
        nargs="+",
        action=program.Once,
        metavar="LABEL",
        help="structures whose borders in the two label maps are brought to each other: 17, or 10=49 for label 10 of "
        "the fixed image and 49 of the moving one. They drive the deformation up to 15 mm around",
    )
    add(
        "--memory",
        metavar="SIZE",
        type=program.size,
        help="memory that may be used, such as 4GB. Where the network would need more, it works at half or a quarter "
        "of the resolution",
    )


def _start(add):
    """Flags of a transform to start from."""
    add(
        "--initial_transform",
        "--initial_affine",
        nargs="+",
        action=program.Once,
        metavar="FILE",
        help="transform from the fixed to the moving image, or several, as `apply` takes them. It replaces the "
        "affine alignment. A deformable one is where the registration starts, and the result includes it",
    )
    add(
        "--convention",
        metavar="NAME",
        help="what the numbers of this transform are, as `apply` takes it",
    )


def add_results(add):
    """Flags of what is written, and where."""
    add("--out", required=True, metavar="DIR", help="folder for the results; it is made if it does not exist")
    add(
        "--formats",
        nargs="+",
        default=["itk"],
        choices=["itk", "ras", "h5", "l2r", "freesurfer", "fsl", "spm", "afni"],
        help="formats of the transform and its inverse. itk: displacement fields in LPS mm; ras: displacement fields "
        "in RAS mm with intent 1006; h5: ITK composite transforms; l2r: the field of Learn2Reg in voxels; freesurfer: "
        "warps .mgz and the affine .lta; fsl: relative warps for applywarp; spm: deformations y_; afni: displacement "
        "fields for 3dNwarpApply; default: itk",
    )


def _names(add):
    """Flags of the names of the transforms and of the exit status."""
    add(
        "--bids",
        nargs=3,
        metavar=("PREFIX", "FROM", "TO"),
        help="name the transforms as BIDS derivatives. FROM is the space of the moving image and TO that of the fixed "
        "image, such as sub-01 T1w MNI152NLin2009cAsym",
    )
    add(
        "--strict",
        action="store_true",
        help="end with exit status 3 where a check warns; all files are written nevertheless",
    )


def described(summary):
    """The lines that tell the numbers of a registration's summary. A number that does not exist is "none"."""

    def number(name):
        return "none" if summary[name] is None else f"{summary[name]:.4f}"

    for name in ("similarity", "dice"):
        if f"{name}_after" in summary:
            yield f"{name} {number(f'{name}_before')} before, {number(f'{name}_after')} after"
    before, after = summary["similarity_before"], summary["similarity_after"]
    if before is None or after is None or after <= before:
        yield "warning: the registration did not make the images more similar; look at the pictures before you use it"
    yield f"folding {number('fold_pct')} %"


def told(check):
    """The value of a check, its limits and its sentence."""
    value, (low, high) = check["value"], check["limits"]
    if low is None or (None not in (value, high) and value > high):
        broken = f"at most {high:g}"
    elif high is None or value is not None:
        broken = f"at least {low:g}"
    else:
        broken = f"{low:g} to {high:g}"
    return f"is {'none' if value is None else f'{value:.3g}'}, not {broken}: {check['sentence']}"
