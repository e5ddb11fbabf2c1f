"""DrivenMorph on 27 real brains with manual labels (MICCAI 2012 multi-atlas challenge), at half resolution, without
the labels: what two CPU cores learn in an hour. configs/brain_t1.py is for a GPU.

python train.py --config configs/malf.py --workdir runs/malf --config.data.root=FOLDER
"""

from ml_collections import ConfigDict, config_dict

from drivenmorph_jax.runtime.configuration import load


def get_config():
    config = load("default")
    config.steps = 800
    config.warmup_steps = 20
    config.learning_rate = 1e-3
    config.val_every = 100
    config.checkpoint_every = 25
    config.model.updates = (3, 3, 3)
    config.model.cross_radius = (0, 0, 2)
    config.model.self_radius = (0, 0, 0)
    config.loss.window = 5
    config.data = ConfigDict({
        "name": "folder",
        "root": "data/malf/aligned",
        "atlas": config_dict.placeholder(str),  # id of the image that moves in every pair; else pairs of subjects
        "splits": config_dict.placeholder(str),  # a splits.json, where it is neither in the folder nor in its parent
        "exclude": (0, 1, 42, 43, 46, 63, 64),  # background and scraps
        "downsample": 2,
        "crop": (0, 0, 0),
        "flip": True,
        "affine": 0.02,
        "intensity": 0.2,
        "bias": 0.1,
        "noise": 0.02,
    })
    return config
