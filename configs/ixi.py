"""IXI, skull-stripped, brain to brain: the network of configs/brain_t1.py, from its weights.

python -m drivenmorph_jax.data.prepare ixi SOURCE data/ixi
python train.py --config configs/ixi.py --workdir runs/ixi

Layouts of the preparation: ixi or ixi-pkl.
Meant for one GPU or more (batch_size a multiple of them); not measured: we did not have the data.
"""

from configs.brain_t1 import get_config as brain_t1


def get_config():
    config = brain_t1()
    config.steps = 15_000
    config.val_every = 1000
    config.checkpoint_every = 250
    config.learning_rate = 4e-4
    config.init = "weights/brain-t1"
    config.data.root = "data/ixi"
    config.data.exclude = (0,)
    return config
