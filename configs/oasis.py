"""OASIS, 414 brains, as neurite or Learn2Reg prepared them: the network of configs/brain_t1.py, from its weights.

python -m drivenmorph_jax.data.prepare oasis SOURCE data/oasis
python train.py --config configs/oasis.py --workdir runs/oasis

Layouts of the preparation: oasis (neurite) or oasis-l2r.
Meant for one GPU or more (batch_size a multiple of them); not measured: we did not have the data.
"""

from drivenmorph_jax.runtime.configuration import load
from drivenmorph_jax.runtime.shipped import shipped


def get_config():
    config = load("brain_t1")
    config.steps = 15_000
    config.val_every = 1000
    config.checkpoint_every = 250
    config.learning_rate = 4e-4
    config.init = str(shipped("weights", "brain-t1"))
    config.data.root = "data/oasis"
    config.data.exclude = (0,)
    return config
