"""The same run in under a minute on 2 cores, for tests: a smaller cohort, two levels, a few steps.

python train.py --config configs/smoke.py --workdir runs/smoke
"""

from drivenmorph_jax.runtime.configuration import load


def get_config():
    config = load("default")
    config.steps = 6
    config.warmup_steps = 1
    config.val_every = config.checkpoint_every = 3
    config.data.shape = (32, 40, 32)
    config.data.spacing = 5.0
    config.data.num_train = 3
    config.data.num_test = 2
    config.model.channels = (4, 8)
    config.model.strides = (1, 4)
    config.model.updates = (1, 1)
    config.model.cross_radius = (0, 1)
    config.model.self_radius = (0, 0)
    config.model.self_window = (0, 4)
    config.loss.window = 5
    return config
