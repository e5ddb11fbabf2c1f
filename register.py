"""Align one brain image to another: two NIfTI files in, the aligned image and the transform out."""

from functools import partial

from drivenmorph_jax.cli import register
from drivenmorph_jax.cli.program import run

main = partial(register.main, prog="python register.py")

if __name__ == "__main__":
    run(main)
