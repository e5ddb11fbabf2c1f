"""The networks that `model.name` of a configuration can name. Each maps two images to an `outputs.Registration`."""

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.network import baselines, settings
from drivenmorph_jax.network.model import DrivenMorph
from drivenmorph_jax.network.settings import with_dtype

NETWORKS = {  # name: (module, check of its settings, number of which every side of its images must be a multiple)
    "drivenmorph": (DrivenMorph, settings.checked, settings.field_multiple),
    "voxelmorph": (baselines.VoxelMorph, with_dtype, lambda config: 2 ** len(config.encoder)),
    "transmorph": (baselines.TransMorph, with_dtype, lambda config: 2 ** (len(config.channels) + 1)),
}


def make_network(config):
    """The Flax module for `config`, the `model` settings. Raises InputError where they do not fit together."""
    network, checked, _ = _of(config)
    return network(checked(config))


def multiple(config):
    """The number of which every side of the network's images must be a multiple."""
    return _of(config)[2](config)


def _of(config):
    name = config.get("name", "drivenmorph")  # checkpoints older than the other networks have no name
    if name not in NETWORKS:
        raise InputError(f"model.name is {name!r}: set it to one of {', '.join(NETWORKS)}")
    return NETWORKS[name]
