"""Label a brain image from atlases: images whose structures are labelled are registered to it and vote."""

from drivenmorph_jax.cli import program

EPILOG = """\
The folder of the atlases holds ID_t1.nii.gz and ID_seg.nii.gz for each, skull-stripped and on one grid, as `prepare`
writes them, and a labels.csv with names if you like. The folder of the results gets labels.nii.gz, confidence.nii.gz,
volumes.csv, overview.png and summary.json; with several images it gets a folder with these for each image, and a
volumes.csv of all. Images that are done already are not labelled again. Of several images, one that cannot be used is
named and skipped, and the exit status is then 4. Examples:

  %(prog)s --atlases brains --image scan.nii.gz --out result
  %(prog)s --atlases brains --image scans/*.nii.gz --out results"""


def main(arguments=None, prog="drivenmorph label"):
    """Run the program with `arguments`, by default those of the command line. Raises InputError."""
    parser = program.parser(prog, __doc__, EPILOG)
    add = parser.add_argument
    add("--atlases", required=True, metavar="DIR", help="folder with the images and label maps of the atlases")
    add("--image", required=True, nargs="+", action=program.Once, metavar="FILE", help="3-D images to label")
    add("--out", required=True, metavar="DIR", help="folder for the results; it is made if it does not exist")
    add(
        "--fusion",
        default="joint",
        choices=["joint", "local", "majority"],
        help="weights of the atlases' votes. joint: joint label fusion, by local similarity and by what the atlases "
        "have in common; local: by local similarity; majority: all alike; default: joint",
    )
    add(
        "--strip",
        default="auto",
        choices=["auto", "no"],
        help="find the brain in images of whole heads. auto: in those that show a whole head; no: all images are "
        "skull-stripped; default: auto",
    )
    program.add_geometry(add)
    flags = parser.parse_args(arguments)

    # Imported late, so that --help answers at once.
    from drivenmorph_jax.files import check_folder
    from drivenmorph_jax.labelling.label import label_files
    from drivenmorph_jax.runtime import sharding

    sharding.start()
    check_folder(flags.out)
    settings = {name: getattr(flags, name) for name in ("fusion", "strip", "geometry")}
    program.tell(label_files(flags.image, flags.atlases, flags.out, **settings), "look at {}/overview.png")
