"""The network of weights/brain-any, for pairs of any contrast: configs/malf.py on MIND descriptors, which an inverted
image has as well, and images that get random curves of contrast while the loss compares the originals.

python train.py --config configs/brain_any.py --workdir runs/brain_any --config.data.root=FOLDER
"""

from configs.malf import get_config as malf


def get_config():
    config = malf()
    config.model.descriptor = "mind"
    config.model.channels = (8, 16, 32)
    config.model.updates = (3, 4, 4)
    config.loss.window = 7
    config.loss.smoothness = 1.0
    config.data.curve = 1.0
    return config
