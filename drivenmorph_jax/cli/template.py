"""Make an unbiased template of brain images: their mean in the middle of their shapes, and the way to each of them."""

from drivenmorph_jax.cli import cohort, program, register

EPILOG = """\
The folder gets template.nii.gz, template_labels.nii.gz and template_confidence.nii.gz where label maps are given, for
each image a folder subjects/ID with its transform and inverse, report.html with the rounds, and summary.json. `apply`
moves images and label maps by these transforms. The same command, given again, continues a run that was stopped.
Examples:

  %(prog)s --images brains --out template
  %(prog)s --bids study --out template
  %(prog)s --images brains --out template --spacing 2"""


def main(arguments=None, prog="drivenmorph template"):
    """Run the program with `arguments`, by default those of the command line. Raises InputError."""
    parser = program.parser(prog, __doc__, EPILOG)
    what, add = parser.add_mutually_exclusive_group(required=True), parser.add_argument
    what.add_argument(
        "--images",
        metavar="DIR",
        help="folder of ID.nii.gz, or of ID_t1.nii.gz with label maps ID_seg.nii.gz where there are any",
    )
    what.add_argument("--bids", metavar="DIR", help="BIDS folder, whose T1w images and label maps *_dseg are taken")
    register.add_results(add)
    add(
        "--spacing",
        type=program.positive,
        metavar="MM",
        help="size of the voxels of the template; default: that of the images, but not finer than 1 mm",
    )
    add(
        "--affine",
        default="affine",
        choices=["affine", "similarity", "rigid", "none"],
        help="alignment of the images before the rounds, as that of `register`; rigid: sizes are kept, as for images "
        "of one person; none: the world coordinates of the files agree already; default: affine",
    )
    program.add_strip(add)
    program.add_geometry(add)
    cohort.add_cluster(add, "one stage of an image", "the template cannot be made")
    flags = parser.parse_args(arguments)
    cohort.check_cluster(parser, flags)

    # Imported late, so that --help answers at once.
    from drivenmorph_jax.files import check_folder
    from drivenmorph_jax.registration.template import build_template, images_of_bids, images_of_folder
    from drivenmorph_jax.runtime import sharding

    sharding.start()
    check_folder(flags.out)
    summary = build_template(
        images_of_bids(flags.bids) if flags.bids else images_of_folder(flags.images),
        flags.out,
        spacing=flags.spacing,
        affine=flags.affine,
        strip=flags.strip,
        geometry=flags.geometry,
        formats=flags.formats,
        scheduler=flags.scheduler,
        time_limit=flags.time_limit,
    )
    still = "stands still" if summary["still"] else "does not stand still"
    print(f"the template of {summary['images']} images {still} after {len(summary['rounds'])} rounds", end="; ")
    print(f"look at {flags.out}/report.html")
