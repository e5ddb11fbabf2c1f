"""DrivenMorph on the embedded cohort: real anatomy with known deformations, nothing to download.

python train.py --config configs/default.py --workdir runs/default

2 CPU cores: under 10 minutes, most of them 70 steps at 3 to 4 seconds and 90 seconds of compilation. Expect a mean Dice
of .748 on the 6 test pairs, from .434, without folding (measured; the times beside other work).
"""

from ml_collections import ConfigDict, config_dict


def get_config():
    config = ConfigDict()
    config.seed = 0
    config.steps = 70
    config.batch_size = 1  # pairs, over all devices
    config.space = 1  # devices to a volume, each with a part of its first axis
    config.learning_rate = 1e-3
    config.warmup_steps = 10
    config.clip = 1.0  # largest norm of the gradient
    config.init = config_dict.placeholder(str)  # a checkpoint to begin with, whose levels are the coarsest of the model
    config.val_every = 35
    config.checkpoint_every = 10

    config.data = ConfigDict({
        "name": "embedded",
        "seed": 0,
        "shape": (64, 80, 64),
        "spacing": 2.5,  # mm
        "num_train": 10,
        "num_val": 2,
        "num_test": 3,
        "strength": 5.0,  # root mean square of the velocity, mm: Dice starts where affinely aligned real brains do
        "smoothness": (16.0, 8.0),  # mm
        "downsample": 1,  # the network sees images pooled by this factor
        "crop": (0, 0, 0),  # shape of the random part of them that a step sees; 0 is a whole side
        "flip": False,  # mirror half of the pairs
        "affine": 0.0,  # strengths of random changes of each image, see `data/augmentation.py`
        "intensity": 0.1,
        "bias": 0.0,
        "noise": 0.0,
    })

    # Levels are listed finest first.
    config.model = ConfigDict({
        "name": "drivenmorph",  # or "voxelmorph", "transmorph", which have settings of their own
        "channels": (4, 16, 32),  # the first two of each are the image and its local normalisation
        "strides": (1, 2, 4),
        "field_stride": 2,  # the field of a level is this many times coarser than its features
        "updates": (2, 2, 2),
        "cross_radius": (0, 1, 2),  # of the neighbourhood cross-attention, 0 is off
        "self_radius": (0, 1, 0),  # of the neighbourhood self-attention
        "self_window": (0, 0, 5),  # side of the windows of self-attention
        "heads": 2,
        "max_step": 2.0,  # L, voxels of the level's features
        "demons_features": 4,
        "sigma_fluid": 0.7,  # voxels of the field, learned from there
        "sigma_diffusion": 0.7,  # voxels, for update_rule "log"
        "update_rule": "compositional",  # or "log"
        "remat": False,  # compute each update again in the backward pass: less memory, more time
        "dtype": "float32",  # or "bfloat16", for convolutions and attention
    })

    config.loss = ConfigDict({
        "similarity": "lncc",  # or "mse"
        "window": 7,
        "smoothness": 0.1,
        "level": 0.5,
        "force": 0.1,
        "dice": 0.0,  # above 0: soft Dice of the label maps
        "dice_labels": 0,  # labels that a step draws for it, 0 is all
    })
    return config
