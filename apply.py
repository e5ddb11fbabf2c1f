"""Move other images, label maps, series or points by a transform of `register`, of ITK or of ANTs."""

from functools import partial

from drivenmorph_jax.cli import apply
from drivenmorph_jax.cli.program import run

main = partial(apply.main, prog="python apply.py")

if __name__ == "__main__":
    run(main)
