"""The training step: the optimizer, the compiled step and its memory, and the augmentation of a batch.

The same settings give the same functions, so one process traces and compiles them once.
"""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import FrozenConfigDict

from drivenmorph_jax.backends import programs
from drivenmorph_jax.data.augmentation import augmented
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.network.losses import total_loss
from drivenmorph_jax.network.networks import make_network
from drivenmorph_jax.runtime import sharding


def make_optimizer(config):
    """Adam with clipping by the global norm, and a learning rate with linear warm-up and cosine decay."""
    steps = max(config.steps, config.warmup_steps + 1)
    return _optimizer(config.learning_rate, config.warmup_steps, steps, config.clip)


@lru_cache(maxsize=8)
def _optimizer(learning_rate, warmup_steps, steps, clip):
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps, steps)
    return optax.chain(optax.clip_by_global_norm(clip), optax.adam(schedule))


def make_train_step(model, optimizer, config, mesh):
    """Jitted (params, opt_state, batch) -> (params, opt_state, row); donates the state, splits the batch over `mesh`.

    The loss is a mean over the global batch, so its gradient is the same on any number of devices. A step whose loss or
    gradient is not finite leaves the state unchanged.
    """
    return _train_step(model, optimizer, FrozenConfigDict(config.loss), mesh)


@lru_cache(maxsize=8)
def _train_step(model, optimizer, settings, mesh):
    def loss(params, batch):
        return total_loss(settings, model.apply({"params": params}, batch["fixed"], batch["moving"]), batch)

    def train_step(params, opt_state, batch):
        (value, parts), gradient = jax.value_and_grad(loss, has_aux=True)(params, batch)
        norm = optax.tree.norm(gradient)
        update, new_state = optimizer.update(gradient, opt_state, params)
        new = optax.apply_updates(params, update), new_state
        row = {"loss": value, **parts, "gradient_norm": norm, "update_norm": optax.tree.norm(update),
               "parameter_norm": optax.tree.norm(new[0])}
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        return *jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, (params, opt_state)), row

    whole = sharding.replicated(mesh)
    return jax.jit(train_step, donate_argnums=(0, 1), in_shardings=(whole, whole, sharding.split_batch(mesh)),
                   out_shardings=whole, compiler_options=programs.compiler_options())


def chosen_labels(key, fixed, moving, labels, count):
    """`count` of the `labels`, drawn at random from those that both label maps (D, H, W) hold.

    Where fewer labels are in both maps, others fill up. The draw depends only on the key (2,) of a pair of
    `training_batches` and on the maps.
    """
    labels = jnp.asarray(labels)
    key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), 4)
    # One label at a time: all at once would take an image of bools for each of a hundred labels.
    shared = jax.lax.map(lambda label: (fixed == label).any() & (moving == label).any(), labels)
    return labels[jax.lax.top_k(shared + jax.random.uniform(key, labels.shape), count)[1]]


# Settings that `compiled_step` tries, in this order, to need less memory.
SMALLER = ({}, {"remat": True}, {"remat": True, "dtype": "bfloat16"})


def compiled_step(optimizer, config, mesh, params, opt_state, batch, memory=None):
    """(the step compiled for these shapes, the configuration that it was compiled with).

    It prints the memory of the step before any of that memory is allocated.

    Args:
      memory: bytes of each device that the step may take. The first settings of `SMALLER` that need no more are used.
        By default the limit is the memory of the device, and the configuration is not changed.

    Raises InputError where the limit does not suffice.
    """
    limit = memory or (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", np.inf)  # a CPU reports no limit
    for settings in SMALLER if memory else SMALLER[:1]:
        config = config.copy_and_resolve_references()
        config.model.update({key: value for key, value in settings.items() if key in config.model})
        train_step = make_train_step(make_network(config.model), optimizer, config, mesh)
        compiled, needed = sharding.compiled_and_memory(train_step.lower(params, opt_state, batch).compile, limit)
        if needed <= limit:
            break
    shape = "x".join(map(str, batch["fixed"].shape[1:4]))
    taken = "".join(f", {key} {config.model[key]}" for key in settings if key in config.model)
    told = f"a step on images of {shape}{taken} takes {needed / 2**30:.1f} GiB of each device"
    if needed > limit:
        remedy = "" if memory else "--memory for remat and bfloat16, "
        raise InputError(f"{told}, more than {limit / 2**30:.1f}: set {remedy}a --config.data.crop, or more devices to "
                         "a volume by --config.space")
    if jax.process_index() == 0:
        print(told)
    return compiled, config


def make_augment(config, mesh, labels=None):
    """Jitted: a batch of `training_batches` over `mesh` -> the batch for a step.

    The images are augmented at random with the settings of `config.data`. Label maps, where the batch has them, become
    one channel for each of `labels`, or for `config.loss.dice_labels` of them that `chosen_labels` draws.
    """
    settings = tuple((key, config.data[key]) for key in ("crop", "flip", "affine", "intensity", "bias", "noise"))
    labels = None if labels is None else tuple(np.asarray(labels).tolist())
    return _augment(settings, mesh, labels, config.loss.dice_labels)


@lru_cache(maxsize=8)
def _augment(settings, mesh, labels, count):
    def augment(batch):
        keys, batch = batch["key"], augmented(batch, **dict(settings))
        if "fixed_labels" not in batch:
            return batch
        fixed, moving = batch["fixed_labels"], batch["moving_labels"]
        if 0 < count < len(labels):
            drawn = jax.vmap(partial(chosen_labels, labels=labels, count=count))(keys, fixed, moving)
        else:
            drawn = jnp.broadcast_to(jnp.asarray(labels), (len(fixed), len(labels)))
        channels = drawn[:, None, None, None]
        return batch | {"fixed_labels": (fixed[..., None] == channels).astype(jnp.float32),
                        "moving_labels": (moving[..., None] == channels).astype(jnp.float32)}

    return jax.jit(augment, out_shardings=sharding.split_batch(mesh), compiler_options=programs.compiler_options())
