"""Label a brain image from atlases: images whose structures are labelled are registered to it and vote."""

from functools import partial

from drivenmorph_jax.cli import label
from drivenmorph_jax.cli.program import run

main = partial(label.main, prog="python label.py")

if __name__ == "__main__":
    run(main)
