"""The devices: how a program starts on them, and the mesh. Batches are split over it, parameters are everywhere.

The mesh has two axes: "data", over which pairs are split, and "space", over which the first axis of every volume is.
What crosses a border between two parts of a volume (convolutions, box sums, attention, warps) XLA exchanges by itself.
"""

import logging
import os
import re
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from drivenmorph_jax.backends import programs
from drivenmorph_jax.errors import InputError


def start(distributed=False, deterministic=False, **process):
    """What a program does first: keep compiled code for the next run, and join the other processes if there are any.

    The code lies in ~/.cache/drivenmorph_jax, or where JAX_COMPILATION_CACHE_DIR says. `deterministic` leaves no order
    of a sum to chance on GPUs. `process` is what `jax.distributed.initialize` takes, where nothing on the machine tells
    it (Slurm, Kubernetes and Cloud TPU do).
    """
    # An order of operations for little memory, not for many at once, of which each uses all cores: the step and the
    # network take half as much, and no longer. XLA reads the flags when the first device is asked for; the last counts.
    flags = ["--xla_cpu_enable_concurrency_optimized_scheduler=false", os.environ.get("XLA_FLAGS", "")]
    if deterministic:
        flags.append("--xla_gpu_deterministic_ops=true")
    os.environ["XLA_FLAGS"] = " ".join(flags)
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "drivenmorph_jax"))
    # By default what compiles within a second is not kept: a program of many small parts waits for all of them again.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs every step that it takes
    if distributed:
        jax.distributed.initialize(**process)


def device_mesh(space=1, devices=None):
    """The devices, by default all of all processes, as a mesh ("data", "space"), `space` of them to a volume.

    Raises InputError where the devices of a process cannot be divided so: a volume lies within one process.
    """
    devices = sorted(devices or jax.devices(), key=lambda device: device.process_index)
    here = sum(device.process_index == devices[0].process_index for device in devices)
    if space < 1 or here % space:
        raise InputError(f"space is {space}, which does not divide the {here} devices of a process: "
                         "set --config.space to a divisor")
    return Mesh(np.reshape(devices, (-1, space)), ("data", "space"))


def compiled_and_memory(lowered, limit):
    """(the compiled program, the bytes that it takes of each device), for a caller that wants at most `limit` of them.

    The compiler for TPU refuses what does not fit: (None, what it says that it takes, more than `limit` in any case).
    """
    try:
        compiled = lowered.compile()
        return compiled, programs.device_memory(compiled)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or limit == np.inf:
            raise
        told = re.search(r"required .*?\(([\d.]+)G\)", str(error))  # "memory required ... (20.31G) exceeds"
        return None, max(float(told[1]) * 2**30 if told else 0, np.nextafter(limit, np.inf))


def replicated(mesh):
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh):
    """Every device holds its part of the leading axis, and of the first spatial one, of (B, D, ...)."""
    return NamedSharding(mesh, PartitionSpec("data", "space"))


def global_batch(batch, mesh):
    """One array over the mesh from what each process holds: leaves (B / processes, ...) -> (B, ...).

    What is no volume (B, D, H, W, ...) is split over the pairs alone.
    """
    pairs = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split_batch(mesh) if x.ndim > 3 else pairs, x),
                        batch)
