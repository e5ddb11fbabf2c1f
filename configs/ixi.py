"""IXI, skull-stripped, brain to brain: the network of configs/brain_t1.py, from its weights.

python -m drivenmorph_jax.data.prepare ixi SOURCE data/ixi
python train.py --config configs/ixi.py --workdir runs/ixi

Layouts of the preparation: ixi or ixi-pkl.
Meant for one GPU or more (batch_size a multiple of them); not measured: we did not have the data.
"""

from configs.oasis import get_config as oasis


def get_config():
    config = oasis()
    config.data.root = "data/ixi"
    return config
