"""The network of weights/brain-t1: configs/malf.py with a level at full resolution on top, on whole images.

python train.py --config configs/brain_t1.py --workdir runs/brain_t1 --config.data.root=FOLDER

For a GPU: 9.8 GB and .07 s a step in bfloat16 (H100). A CPU learns from boxes, --config.data.crop="(96,96,96)".
"""

from drivenmorph_jax.runtime.configuration import load


def get_config():
    config = load("malf")
    config.steps = 4000
    config.warmup_steps = 100
    config.learning_rate = 1.5e-3
    config.val_every = 1000
    config.data.downsample = 1
    config.model.strides = (1, 2, 4, 8)
    config.model.channels = (2, 8, 24, 32)
    config.model.updates = (4, 6, 6, 6)
    config.model.cross_radius = (0, 0, 1, 2)
    config.model.self_radius = (0, 0, 0, 0)
    config.model.self_window = (0, 0, 0, 5)
    config.loss.window = 9
    config.loss.smoothness = 6.0
    config.data.intensity = 0.3
    config.data.bias = 0.2
    return config
