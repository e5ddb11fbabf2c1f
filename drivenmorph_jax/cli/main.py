"""Deformable registration of 3-D brain MRI by an explicit driving force."""

import argparse
import difflib
import sys
from functools import partial

from drivenmorph_jax.cli import apply, cohort, correct, label, prepare, register, strip, template, train, view
from drivenmorph_jax.cli import eval as evaluate
from drivenmorph_jax.cli.program import run
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.runtime.shipped import VERSION

# Each imports JAX when it has read its arguments: that takes seconds, which --help must not cost.
COMMANDS = {
    "register": register,
    "cohort": cohort,
    "template": template,
    "label": label,
    "apply": apply,
    "strip": strip,
    "view": view,
    "correct": correct,
    "train": train,
    "eval": evaluate,
    "prepare": prepare,
}


def main(arguments=None):
    """Run the subcommand that `arguments` name, by default those of the command line. Raises InputError."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = "\n".join(f"  {name:10}{module.__doc__.splitlines()[0]}" for name, module in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="drivenmorph",
        usage="%(prog)s COMMAND ...",
        description=__doc__,
        epilog=f"commands:\n{commands}\n\n%(prog)s COMMAND --help explains a command and its options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    parser.add_argument("command", metavar="COMMAND", help=argparse.SUPPRESS)
    name = parser.parse_args(arguments[:1]).command
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        remedy = f"did you mean {close[0]}?" if close else f"the commands are {', '.join(COMMANDS)}"
        raise InputError(f"{name} is not a command of {parser.prog}: {remedy}")
    COMMANDS[name].main(arguments[1:], f"{parser.prog} {name}")


console = partial(run, main)  # what the installed program calls

if __name__ == "__main__":
    console()
