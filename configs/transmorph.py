"""A TransMorph-style network on the data and the budget of configs/malf.py: a rival trained as DrivenMorph is.

python train.py --config configs/transmorph.py --workdir runs/transmorph --config.data.root=FOLDER
"""

from ml_collections import ConfigDict

from drivenmorph_jax.runtime.configuration import load


def get_config():
    config = load("malf")
    config.model = ConfigDict({
        "name": "transmorph",
        "channels": (32, 64, 128),  # of the tokens, a stage each
        "heads": 4,
        "window": 5,  # side of the windows, tokens
        "dtype": "float32",
    })
    config.loss.level = config.loss.force = 0.0
    return config
