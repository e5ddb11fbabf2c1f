"""Show a result of `register` in the browser, and correct it there; or show the pairs of a cohort."""

from drivenmorph_jax.cli import program

EPILOG = """\
The page is for this machine alone: nothing is sent elsewhere, and nothing is loaded from elsewhere. The program ends
when the page is closed. Corrections are kept in history.json of the result, decisions on pairs in cohort.csv. It needs
NiiVue: pip install --no-deps ipyniivue==2.4.4. Examples:

  %(prog)s result
  %(prog)s cohort
  %(prog)s result --no_browser --port 8000"""


def main(arguments=None, prog="drivenmorph view"):
    """Run the program with `arguments`, by default those of the command line. Raises InputError."""
    parser = program.parser(prog, __doc__, EPILOG)
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="folder that was the --out of register or of cohort")
    add("--port", type=program.count, default=0, metavar="N", help="port of the page; default: a free one")
    add("--no_browser", action="store_true", help="print the address and open no browser")
    flags = parser.parse_args(arguments)

    # Imported late, so that --help answers at once.
    from drivenmorph_jax.view.server import view

    view(flags.folder, flags.port, not flags.no_browser)
