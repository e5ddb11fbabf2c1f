"""Correct a finished result of `register` at a place: by landmarks, labels, a mask where not to trust the images."""

from drivenmorph_jax.cli import program

EPILOG = """\
The deformation changes around the landmarks, labels and mask only. The folder gets all that `register` writes, and
history.json, which says what led to it. RESULT stays as it is. Examples:

  %(prog)s result --landmarks landmarks.csv --out corrected
  %(prog)s result --distrust lesion.nii.gz --stiffness 3 --out corrected
  %(prog)s result --history result/history.json --out corrected"""


def main(arguments=None, prog="drivenmorph correct"):
    """Run the program with `arguments`, by default those of the command line. Raises InputError."""
    parser = program.parser(prog, __doc__, EPILOG)
    _flags(parser.add_argument)
    flags = parser.parse_args(arguments)
    asked = flags.landmarks or flags.guide_labels or flags.distrust
    if flags.history and (asked or flags.stiffness):
        parser.error("--history excludes --landmarks, --guide_labels, --distrust and --stiffness, which it holds")
    if not flags.history and not asked:
        parser.error("give --landmarks, --guide_labels, --distrust or --history; --stiffness alone has no place")

    # Imported late, so that --help answers at once.
    from drivenmorph_jax.files import check_folder
    from drivenmorph_jax.registration.correct import Session
    from drivenmorph_jax.registration.history import History
    from drivenmorph_jax.runtime import sharding

    sharding.start()
    check_folder(flags.out)
    session = Session(flags.result)
    session.check_out(flags.out)  # refused before the work, not after
    if flags.history:
        history = History.read(flags.history, session)
    else:
        history = History.of(session)
        correction = session.correction(flags.landmarks, flags.distrust, flags.stiffness, flags.guide_labels)
        history.add(correction, session.corrected(correction, _tell))
    session.save(history, flags.out, _tell)
    print("done")
    print(*_described(history.current), sep="\n", end=f"; look at {flags.out}/overview.png\n")


def _flags(add):
    add("result", metavar="RESULT", help="folder that was the --out of register, or of this program")
    add("--out", required=True, metavar="DIR", help="folder for the corrected result; another one than RESULT")
    add(
        "--landmarks",
        metavar="FILE",
        help="CSV with columns fixed_x, fixed_y, fixed_z, moving_x, moving_y, moving_z in RAS mm and, where you like, "
        "name, radius, weight and curve, as `register` takes it. They drive the deformation around them, up to three "
        "radii of 10 mm",
    )
    add(
        "--guide_labels",
        nargs="+",
        default=(),
        metavar="LABEL",
        help="labels whose borders are brought to each other, as `register` takes them: 17, or 10=49. RESULT needs the "
        "label maps of both images",
    )
    add(
        "--distrust",
        metavar="FILE",
        help="label map on the fixed image, above 0 where the images are not to be trusted. No force is taken from "
        "there, and the deformation is interpolated from around",
    )
    add(
        "--stiffness",
        type=program.positive,
        default=0.0,
        metavar="MM",
        help="standard deviation of the Gaussian that smooths the deformation where the correction acts; default: as "
        "the result has it",
    )
    add(
        "--history",
        metavar="FILE",
        help="history.json of corrections of RESULT; the correction that is in force there is made again",
    )


def _tell(words, share):
    print(f"{words} ...", end=" ", flush=True)


def _described(step):
    """The lines that tell of a correction."""
    for one in step.told:
        left = f"; left out: it {one['left_out']}" if one["left_out"] else ""
        yield f"landmark {one['name']} {one['before_mm']:.2f} mm before, {one['after_mm']:.2f} mm after{left}"
    for one in step.labels_told:
        left = f"; left out: it {one['left_out']}" if one["left_out"] else ""
        yield f"label {one['fixed']} Dice {one['dice_before']:.3f} before, {one['dice_after']:.3f} after{left}"
    if "similarity_after" in step.numbers:
        before, after = (step.numbers[f"similarity_{when}"] for when in ("before", "after"))
        yield f"similarity where the correction acts {before:.4f} before, {after:.4f} after"
    yield f"folding there {step.numbers.get('fold_pct', 0):.4f} %"
