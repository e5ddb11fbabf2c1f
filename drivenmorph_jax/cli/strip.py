"""Find the brain in images of whole heads: the mask, the stripped image and a picture of both."""

from drivenmorph_jax.cli import program

EPILOG = """\
For each image NAME.nii.gz, the folder gets NAME_stripped.nii.gz, which is 0 outside the brain, the mask
NAME_brain.nii.gz, and NAME_brain.png. `register` does this by itself where an image shows a whole head. Of several
images, one that cannot be used is named and skipped, and the exit status is then 4. Examples:

  %(prog)s --image head.nii.gz --out brains
  %(prog)s --image heads/*.nii.gz --out brains"""


def main(arguments=None, prog="drivenmorph strip"):
    """Run the program with `arguments`, by default those of the command line. Raises InputError."""
    parser = program.parser(prog, __doc__, EPILOG)
    add = parser.add_argument
    add("--image", required=True, nargs="+", action=program.Once, metavar="FILE", help="3-D images of whole heads")
    add("--out", required=True, metavar="DIR", help="folder for the results")
    program.add_geometry(add)
    flags = parser.parse_args(arguments)

    # Imported late, so that --help answers at once.
    from drivenmorph_jax.registration.strip import strip_files
    from drivenmorph_jax.runtime import sharding

    sharding.start()
    program.tell(strip_files(flags.image, flags.out, flags.geometry), "{}")
