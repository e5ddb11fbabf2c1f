"""VoxelMorph-2, diffeomorphic, on the data and the budget of configs/malf.py: a rival trained as DrivenMorph is.

python train.py --config configs/voxelmorph.py --workdir runs/voxelmorph --config.data.root=FOLDER
"""

from ml_collections import ConfigDict

from drivenmorph_jax.runtime.configuration import load


def get_config():
    config = load("malf")
    config.model = ConfigDict({
        "name": "voxelmorph",
        "encoder": (16, 32, 32, 32),
        "decoder": (32, 32, 32, 32, 32, 16, 16),  # after the first four the resolution doubles
        "dtype": "float32",
    })
    config.loss.level = config.loss.force = 0.0
    return config
