"""The `model` settings of a network: checks, and the sides of the images that they imply."""

from ml_collections import FrozenConfigDict

from drivenmorph_jax.errors import InputError


def field_multiple(config):
    """Every side of DrivenMorph's images must be a multiple of this number: coarsest stride times `field_stride`."""
    return config.strides[-1] * config.field_stride


def checked(config):
    """The settings of `DrivenMorph`, checked and frozen.

    Raises InputError where the levels do not fit together or a name is unknown.
    """
    levels = len(config.strides)
    for name in ("channels", "updates", "cross_radius", "self_radius", "self_window"):
        if len(config[name]) != levels:
            raise InputError(f"model.{name} has {len(config[name])} entries and model.strides {levels}: "
                             "give each level one in both")
    for coarse, fine in zip(config.strides[1:], config.strides, strict=False):
        if coarse % fine or coarse == fine:
            raise InputError(f"model.strides is {tuple(config.strides)}: each must be a multiple of the one before")
    if config.get("field_stride", 0) < 1:
        raise InputError("model.field_stride is missing or below 1: set it to 1 or more; weights of an earlier version "
                         "must be trained again")
    if min(config.channels) < 2:
        raise InputError(f"model.channels is {tuple(config.channels)}: give each level at least 2, the image and its "
                         "local normalisation")
    for channels, *attention in zip(config.channels, config.cross_radius, config.self_radius, config.self_window,
                                    strict=True):
        if any(attention) and channels % config.heads:
            raise InputError(f"model.heads is {config.heads}, which does not divide {channels} of model.channels: "
                             "choose a divisor")
    if config.update_rule not in ("compositional", "log"):
        raise InputError(f"model.update_rule is {config.update_rule!r}: set it to 'compositional' or 'log'")
    return with_dtype(config)


def with_dtype(config):
    """The settings of any network, frozen. Raises InputError where `dtype` is neither "float32" nor "bfloat16"."""
    if config.dtype not in ("float32", "bfloat16"):
        raise InputError(f"model.dtype is {config.dtype!r}: set it to 'float32' or 'bfloat16'")
    return FrozenConfigDict(config)
