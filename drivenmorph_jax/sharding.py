"""The devices: how a program starts on them, and the mesh. Batches are split over it, parameters are everywhere."""

from pathlib import Path

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def start(distributed=False):
    """What a program does first: keep compiled code for the next run, and join the other processes if there are any.

    The code lies in ~/.cache/drivenmorph_jax, or where JAX_COMPILATION_CACHE_DIR says.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "drivenmorph_jax"))
    # By default what compiles within a second is not kept: a program of many small parts waits for all of them again.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    if distributed:
        jax.distributed.initialize()


def compiler_options():
    """For `jax.jit`: on CPU a lower effort of LLVM's, which compiles in three quarters of the time and runs as fast."""
    return {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else {}


def data_parallel_mesh(devices=None):
    """The devices, by default all of all processes, along one axis, "data"."""
    devices = devices or jax.devices()
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh):
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh):
    """Every device holds its part of the leading axis."""
    return NamedSharding(mesh, PartitionSpec("data"))


def global_batch(batch, mesh):
    """One array over the mesh from what each process holds: leaves (B / processes, ...) -> (B, ...)."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split_batch(mesh), x), batch)
