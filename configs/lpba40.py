"""LPBA40, 40 brains with 56 structures: the network of configs/brain_t1.py, from its weights.

python -m drivenmorph_jax.data.prepare lpba40 SOURCE data/lpba40
python train.py --config configs/lpba40.py --workdir runs/lpba40

Layouts of the preparation: lpba40.
Meant for one GPU or more (batch_size a multiple of them); not measured: we did not have the data.
"""

from drivenmorph_jax.runtime.configuration import load


def get_config():
    config = load("oasis")
    config.data.root = "data/lpba40"
    return config
