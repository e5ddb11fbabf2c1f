"""Correct a finished result of `register` at a place: by landmarks, and by a mask where not to trust the images."""

from functools import partial

from drivenmorph_jax.cli import correct
from drivenmorph_jax.cli.program import run

main = partial(correct.main, prog="python correct.py")

if __name__ == "__main__":
    run(main)
