"""The devices: the start of a program, and the mesh. Batches are split over it; parameters are on every device.

The mesh has two axes. Pairs are split over "data", and the first axis of every volume over "space". XLA inserts the
exchange between the parts of a volume that convolutions, box sums, attention and warps need.
"""

import logging
import os
import re
import sys
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from drivenmorph_jax.backends import programs
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.runtime.memory import return_large_arrays


def start(distributed=False, deterministic=False, **process):
    """Prepare JAX, before a program does anything else: cache of compiled code, and connection to other processes.

    The cache lies in ~/.cache/drivenmorph_jax, or in the folder JAX_COMPILATION_CACHE_DIR. `deterministic` makes sums
    on GPUs reproducible. `distributed` joins the other processes. `process` holds arguments of
    `jax.distributed.initialize`, for machines that do not provide them (Slurm, Kubernetes and Cloud TPU do).
    """
    # Operations on CPU are ordered for little memory and not for concurrency, since every operation uses all cores. The
    # training step and the network then take half the memory and the same time. XLA reads the flags when the first
    # device is requested. Of two values of a flag the last one counts.
    flags = os.environ.get("XLA_FLAGS", "").split()
    if not any(flag.startswith("--xla_cpu_enable_concurrency_optimized_scheduler=") for flag in flags):
        flags.insert(0, "--xla_cpu_enable_concurrency_optimized_scheduler=false")
    if deterministic and flags[-1] != "--xla_gpu_deterministic_ops=true":
        flags.append("--xla_gpu_deterministic_ops=true")
    os.environ["XLA_FLAGS"] = " ".join(flags)  # the same when called again: JAX caches programs by their flags
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "drivenmorph_jax"))
    # By default, JAX caches no program that compiles within a second. A command of many small programs would compile
    # all of them again.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs each of its actions
    return_large_arrays()
    if distributed:
        jax.distributed.initialize(**process)
    if programs.slow_scatter(version("jaxlib")):
        print(f"warning: on a GPU jaxlib {version('jaxlib')} trains far more slowly than others (jax issue 38806): "
              "install it with -c constraints-gpu.txt", file=sys.stderr)


def device_mesh(space=1, devices=None):
    """The devices as a mesh ("data", "space"), with `space` devices for each volume; by default those of all processes.

    A volume lies within one process. Raises InputError where `space` does not divide the devices of a process.
    """
    devices = sorted(devices or jax.devices(), key=lambda device: device.process_index)
    here = sum(device.process_index == devices[0].process_index for device in devices)
    if space < 1 or here % space:
        raise InputError(f"space is {space}, which does not divide the {here} devices of a process: "
                         "set --config.space to a divisor")
    return Mesh(np.reshape(devices, (-1, space)), ("data", "space"))


def compiled_and_memory(compile, limit):
    """(the program that `compile` returns, the bytes that it takes of each device), for a caller that wants at most
    `limit` bytes.

    The compiler for TPU refuses a program that needs more memory than the device has. Then the result is (None, the
    bytes that the compiler reports, in any case more than `limit`).
    """
    try:
        compiled = compile()
        return compiled, programs.device_memory(compiled)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or limit == np.inf:
            raise
        told = re.search(r"required .*?\(([\d.]+)G\)", str(error))  # "memory required ... (20.31G) exceeds"
        return None, max(float(told[1]) * 2**30 if told else 0, np.nextafter(limit, np.inf))


def replicated(mesh):
    """Sharding by which every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh):
    """Sharding of (B, D, ...) by which every device holds its part of the first axis and of the first spatial axis."""
    return NamedSharding(mesh, PartitionSpec("data", "space"))


def global_batch(batch, mesh):
    """One array over the mesh from the parts that the processes hold: leaves (B / processes, ...) -> (B, ...).

    Volumes (B, D, H, W, ...) are split over pairs and space. Other arrays are split over the pairs alone.
    """
    pairs = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split_batch(mesh) if x.ndim > 3 else pairs, x),
                        batch)
