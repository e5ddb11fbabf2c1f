"""Make an unbiased template of brain images: their mean in the middle of their shapes, and the way to each of them."""

from functools import partial

from drivenmorph_jax.cli import template
from drivenmorph_jax.cli.program import run

main = partial(template.main, prog="python template.py")

if __name__ == "__main__":
    run(main)
