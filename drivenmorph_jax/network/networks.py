"""The networks that a configuration can name in `model.name`; all map two images to a `model.Registration`."""

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.network import baselines, settings
from drivenmorph_jax.network.model import DrivenMorph
from drivenmorph_jax.network.settings import with_dtype

NETWORKS = {  # name: (module, what checks its settings, what every side of its images must be a multiple of)
    "drivenmorph": (DrivenMorph, settings.checked, settings.field_multiple),
    "voxelmorph": (baselines.VoxelMorph, with_dtype, lambda config: 2 ** len(config.encoder)),
    "transmorph": (baselines.TransMorph, with_dtype, lambda config: 2 ** (len(config.channels) + 1)),
}


def make_network(config):
    """The Flax module of the settings `config.model`. Raises InputError where they do not fit together."""
    network, checked, _ = _of(config)
    return network(checked(config))


def multiple(config):
    """What every side of the network's images must be a multiple of."""
    return _of(config)[2](config)


def _of(config):
    name = config.get("name", "drivenmorph")  # checkpoints from before there were others do not say
    if name not in NETWORKS:
        raise InputError(f"model.name is {name!r}: set it to one of {', '.join(NETWORKS)}")
    return NETWORKS[name]
