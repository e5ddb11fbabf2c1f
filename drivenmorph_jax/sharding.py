"""The mesh: batches are split over every device, parameters are on all of them."""

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def data_parallel_mesh():
    """All devices of all processes along one axis, "data"."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh):
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh):
    """Every device holds its part of the leading axis."""
    return NamedSharding(mesh, PartitionSpec("data"))


def global_batch(batch, mesh):
    """One array over the mesh from what each process holds: leaves (B / processes, ...) -> (B, ...)."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split_batch(mesh), x), batch)
