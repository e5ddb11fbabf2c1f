"""Align many pairs of brain images: a table of pairs, or all T1w images of a BIDS folder to one template."""

from functools import partial

from drivenmorph_jax.cli import cohort
from drivenmorph_jax.cli.program import run

main = partial(cohort.main, prog="python cohort.py")

if __name__ == "__main__":
    run(main)
