"""Inference: a trained network is loaded from a checkpoint and registers pairs of images."""

import math
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError
from ml_collections import ConfigDict

from drivenmorph_jax.backends.programs import compiler_options, pairs_ahead
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.fields.grid import average_pool, resize_field
from drivenmorph_jax.network.networks import make_network, multiple
from drivenmorph_jax.network.outputs import by_level, driving_force
from drivenmorph_jax.network.refinement import refined
from drivenmorph_jax.runtime import configuration, sharding
from drivenmorph_jax.runtime.checkpoint import read_about, read_params, read_shapes
from drivenmorph_jax.runtime.stored import stored


def grid_multiple(config):
    """The number of voxels of which every side of an image must be a multiple."""
    return config.data.downsample * math.lcm(multiple(config.model), config.get("space", 1))


def downsample_to(voxel, spacing):
    """The whole factor, at least 1, that brings voxels of `spacing` mm nearest to voxels of `voxel` mm."""
    return max(1, round(voxel / spacing))


def make_predict(config, refine_steps=0):
    """A function (params, fixed, moving, weights=None) that registers a batch of images (B, D, H, W).

    It returns u, u_inverse and the driving force, (B, D, H, W, 3) each, and the levels, all in voxels of the images.
    With `refine_steps` > 0 it is `refinement.refined` with at most as many iterations of Demons. With 0 it is
    `network_pass`. The force and the levels are always those of the network's first pass. A batch that is split over
    devices is computed on these devices.

    The same settings give the same function, so one process compiles it once.
    """
    network = network_pass(config)
    return _refining(network, refine_steps) if refine_steps else network


@lru_cache(maxsize=8)
def _refining(network, steps):
    def predict(params, fixed, moving, weights=None):
        return refined(partial(network, params), fixed, moving, steps, weights)

    return predict


def network_pass(config, levels=True):
    """One pass of the network, jitted: (params, fixed, moving, weights=None) -> (u, u_inverse, force, levels).

    The images are (B, D, H, W). The network gets them pooled by `data.downsample`. Its fields are resampled to the grid
    of the images. `levels` are its `LevelForces`, coarse to fine, (B, D, H, W, 3) each on the grid of its level, in
    voxels of the images. `weights` (B, D, H, W, 2) are those of the fixed and of the moving image: 0 at voxels to
    ignore, 1 elsewhere. Without `levels`, which take more memory than the rest, it is (u, u_inverse, force).
    """
    return _network_pass(make_network(config.model), config.data.downsample, levels)


@lru_cache(maxsize=8)
def _network_pass(model, downsample, with_levels):
    @stored(compiler_options=compiler_options())
    def network(params, fixed, moving, weights=None):
        small = [average_pool(x[..., None], downsample) for x in (fixed, moving)]
        if weights is not None:
            small.append(average_pool(weights, downsample))
        try:
            registration = model.apply({"params": params}, *small)
        except FlaxError as error:
            raise InputError("the checkpoint belongs to another version of its model: train it again") from error
        fields = registration.u, registration.u_inverse, driving_force(registration)
        found = tuple(resize_field(field, fixed.shape[1:]) for field in fields)
        return (*found, jax.tree.map(lambda x: downsample * x, by_level(registration))) if with_levels else found

    return network


def predictions(predict, params, pairs, space=1):
    """Register pairs in turn: yields (what `predict` returned, seconds) for each (fixed, moving).

    The results are NumPy arrays without the batch axis. The process registers as many pairs at a time as it has
    devices, one on each. With `space` > 1 it splits each volume over gcd(`space`, number of devices) devices. An
    accelerator computes the next pairs while the caller works on the last ones, see `backends.programs.pairs_ahead`.
    """
    mesh = sharding.device_mesh(math.gcd(space, jax.local_device_count()), jax.local_devices())
    params = jax.device_put(params, sharding.replicated(mesh))
    at_once = mesh.shape["data"]
    groups = [pairs[i:i + at_once] for i in range(0, len(pairs), at_once)]

    def run(group):
        whole = group + group[:1] * (at_once - len(group))
        start = time.perf_counter()
        images = (np.stack([pair[role].image for pair in whole]) for role in (0, 1))
        found = jax.block_until_ready(predict(params, *jax.device_put(tuple(images), sharding.split_batch(mesh))))
        return jax.device_get(found), (time.perf_counter() - start) / len(group)

    with ThreadPoolExecutor(1) as ahead:
        running = deque()
        for i, group in enumerate(groups):
            running.extend(ahead.submit(run, later) for later in groups[i + len(running):i + 1 + pairs_ahead()])
            found, seconds = running.popleft().result()
            for k in range(len(group)):
                yield jax.tree.map(lambda x, k=k: x[k], found), seconds


def load_checkpoint(folder: str | Path, overrides: Iterable[str] = ()) -> tuple[ConfigDict, dict, dict]:
    """(config, params, about) of a checkpoint, with its settings changed by `--config.KEY=VALUE` arguments.

    Raises InputError where the folder holds no checkpoint, or where its parameters do not fit the model of the
    settings.
    """
    about = read_about(folder)
    config = configuration.override(configuration.from_dict(about["config"]), overrides)
    model = make_network(config.model)
    if config.model == configuration.from_dict(about["config"]["model"]):
        shapes = read_shapes(folder)
    else:  # tracing the model takes seconds
        image = jax.ShapeDtypeStruct((1, *[2 * multiple(config.model)] * 3, 1), jnp.float32)
        shapes = jax.eval_shape(model.init, jax.random.key(0), image, image)["params"]
    on_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_device), shapes)
    return config, read_params(folder, shapes), about
