"""IXI, skull-stripped, atlas to patient: the network of configs/brain_t1.py, from its weights.

python -m drivenmorph_jax.data.prepare ixi-pkl SOURCE data/ixi
python train.py --config configs/ixi.py --workdir runs/ixi

Layouts of the preparation: ixi-pkl, whose atlas this takes; ixi, with --config.data.atlas=mni152.
Meant for one GPU or more (batch_size a multiple of them); not measured: we did not have the data.
"""

from drivenmorph_jax.runtime.configuration import load


def get_config():
    config = load("oasis")
    config.data.root = "data/ixi"
    config.data.atlas = "atlas"
    return config
