"""The network of weights/brain-t1: configs/malf.py at half resolution, and a level at full resolution on top of it.

python train.py --config configs/malf.py --workdir runs/malf --config.data.root=FOLDER
python train.py --config configs/brain_t1.py --workdir runs/brain_t1 --config.data.root=FOLDER --config.init=runs/malf
"""

from configs.malf import get_config as malf


def get_config():
    config = malf()
    config.steps = 800
    config.val_every = 150
    config.data.downsample = 1
    config.data.crop = (96, 96, 96)
    config.model.strides = (1, 2, 4, 8)
    config.model.channels = (2, 4, 16, 32)
    config.model.updates = (4, 4, 4, 4)
    config.model.cross_radius = (0, 0, 1, 2)
    config.model.self_radius = (0, 0, 0, 0)
    config.model.self_window = (0, 0, 0, 5)
    config.loss.window = 9
    config.loss.smoothness = 3.0
    config.data.intensity = 0.3
    config.data.bias = 0.2
    return config
