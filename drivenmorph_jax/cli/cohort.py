"""Align many pairs of brain images: a table of pairs, or all T1w images of a BIDS folder to one template."""

import argparse
import re
import sys

from drivenmorph_jax.cli import program, register

EPILOG = """\
The folder gets a folder for each pair with all that `register` writes, cohort.csv, and report.html, which has what is
doubtful first. The same command, given again, continues a run that was stopped. A pair that fails is named and skipped,
and the exit status is then 4. Examples:

  %(prog)s --pairs pairs.csv --out results
  %(prog)s --bids study --to template.nii.gz --out results
  %(prog)s --pairs pairs.csv --out results --shard 2/10
  %(prog)s --pairs pairs.csv --out results --scheduler tcp://host:8786"""


def main(arguments=None, prog="drivenmorph cohort"):
    """Run the program with `arguments`, by default those of the command line. Raises InputError."""
    parser = program.parser(prog, __doc__, EPILOG)
    _pairs(parser)
    register.add_results(parser.add_argument)
    register.add_reading(parser.add_argument)
    register.add_method(parser.add_argument)
    _processes(parser.add_argument)
    flags = parser.parse_args(arguments)
    if (flags.bids is None) != (flags.to is None):
        parser.error("--bids and --to must be given together")
    if flags.scheduler and flags.shard != (1, 1):
        parser.error("--shard and --scheduler exclude each other")
    check_cluster(parser, flags)

    # Imported late, so that --help answers at once.
    from drivenmorph_jax.files import check_folder
    from drivenmorph_jax.registration.cohort import register_cohort
    from drivenmorph_jax.registration.job import DONE, FAILED
    from drivenmorph_jax.registration.pairs import pairs_of_bids, pairs_of_table
    from drivenmorph_jax.runtime import sharding

    sharding.start()
    check_folder(flags.out)
    pairs = pairs_of_bids(flags.bids, flags.to) if flags.bids else pairs_of_table(flags.pairs)
    states = register_cohort(
        pairs,
        flags.out,
        formats=flags.formats,
        shard=flags.shard,
        scheduler=flags.scheduler,
        time_limit=flags.time_limit,
        **register.settings(flags),
    )
    number = {status: sum(state["status"] == status for state in states.values()) for status in (DONE, FAILED)}
    print(f"{number[DONE]} of {len(states)} pairs are registered, {number[FAILED]} failed", end="; ")
    print(f"look at {flags.out}/report.html")
    if number[FAILED]:
        sys.exit(4)


def _pairs(parser):
    """Flags of what is registered."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--pairs",
        metavar="FILE",
        help="CSV table with the columns fixed and moving and, where you like, name, fixed_labels, moving_labels, "
        "fixed_mask, moving_mask, landmarks, extra_fixed and extra_moving. Paths are relative to its folder. The name "
        "is that of the folder of the pair",
    )
    what.add_argument("--bids", metavar="DIR", help="BIDS folder; each of its T1w images is aligned to --to")
    parser.add_argument("--to", metavar="FILE", help="the fixed image for --bids, such as a template")


def _processes(add):
    """Flags of many processes."""
    add(
        "--shard",
        type=_shard,
        default=(1, 1),
        metavar="I/N",
        help="register every N-th pair only, from the I-th on, as one of N processes with a common --out; I is 1 to N",
    )
    add_cluster(add, "a pair", "it counts as failed")


def add_cluster(add, task, outcome):
    """Flags of a Dask cluster, by `add`, the method `add_argument` of a parser; `task` is what a worker computes."""
    add(
        "--scheduler",
        metavar="ADDRESS",
        help=f"scheduler of a Dask cluster, such as tcp://host:8786, whose workers each compute {task} at a time. They "
        "see the same files. It needs the package distributed",
    )
    add(
        "--time_limit",
        type=program.positive,
        metavar="SECONDS",
        help=f"with --scheduler: time for {task}, after which {outcome}",
    )


def check_cluster(parser, flags):
    """End the program where these flags do not fit each other."""
    if flags.time_limit is not None and not flags.scheduler:
        parser.error("--time_limit needs --scheduler, whose workers can be ended")


def _shard(text):
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no part such as 1/10, the first of ten")
    return int(found[1]), int(found[2])
