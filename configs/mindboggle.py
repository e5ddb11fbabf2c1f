"""Mindboggle-101, 101 brains with cortical labels: the network of configs/brain_t1.py, from its weights.

python -m drivenmorph_jax.data.prepare mindboggle SOURCE data/mindboggle
python train.py --config configs/mindboggle.py --workdir runs/mindboggle

Layouts of the preparation: mindboggle.
Meant for one GPU or more (batch_size a multiple of them); not measured: we did not have the data.
"""

from drivenmorph_jax.runtime.configuration import load


def get_config():
    config = load("oasis")
    config.data.root = "data/mindboggle"
    return config
