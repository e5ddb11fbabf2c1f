"""Score a checkpoint on held-out pairs: report.html to look at, report.md, summary.json, pairs.csv and figures."""

from functools import partial

from drivenmorph_jax.cli import eval
from drivenmorph_jax.cli.program import run

main = partial(eval.main, prog="python eval.py")

if __name__ == "__main__":
    run(main)
