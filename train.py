"""Train a network and score it on held-out pairs. The same command, given again, continues the training."""

from functools import partial

from drivenmorph_jax.cli import train
from drivenmorph_jax.cli.program import run

main = partial(train.main, prog="python train.py")

if __name__ == "__main__":
    run(main)
