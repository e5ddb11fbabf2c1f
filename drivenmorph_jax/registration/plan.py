"""Stage 4: the working grid, the method that will run on it, and the memory that this needs."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from drivenmorph_jax import demons
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.images.working_grid import working_grid
from drivenmorph_jax.network.inference import grid_multiple, network_pass
from drivenmorph_jax.network.refinement import refined
from drivenmorph_jax.registration.align import Aligned
from drivenmorph_jax.registration.read import kept
from drivenmorph_jax.runtime import sharding

DEMONS_SPACING = 1.0  # mm, the finest working grid of Demons
BASE_BYTES = 600e6  # Python, JAX and SimpleITK
# Bytes for each voxel. FIXED_BYTES, MOVING_BYTES: on the images' own grids, as measured from 1 to .5 mm, for images,
# two displacements and the force (three float32 each), Jacobian, confidence, uncertainty, and a displacement with its
# margin while it is written. On the working grid: DEMONS_BYTES for the classical algorithm, REFINE_BYTES for its
# iterations after the network, PASS_BYTES for what is kept between the passes of the network, which is images, three
# fields, and the forces of every level; CHANNEL_BYTES for an extra channel of both images.
FIXED_BYTES, MOVING_BYTES, DEMONS_BYTES, REFINE_BYTES, PASS_BYTES, CHANNEL_BYTES = 66, 22, 160, 100, 60, 80


@dataclass(frozen=True, eq=False, kw_only=True)
class Planned(Aligned):
    """An aligned pair, the working grid, and the method as a function of images (D, H, W, C) on this grid.

      whole(fixed, moving, weights) -> (u, u_inverse or None, force)

    The first channel is that of the two images, the others are the extra ones. The fields are (D, H, W, 3) in voxels.
    The weights are (fixed, moving), (D, H, W, 1) each, 0 at voxels to ignore; or None.
    """

    shape: tuple[int, int, int]
    grid: np.ndarray  # (4, 4), voxel to RAS mm
    spacing: float  # mm
    needed: float  # bytes, estimated
    whole: Callable | None  # None for a stiff field, which needs no method


def plan(aligned: Aligned) -> Planned:
    """Choose the working grid and compile the programs for it.

    Raises InputError where the memory does not suffice.
    """
    limit = aligned.request.memory or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    host = BASE_BYTES + FIXED_BYTES * aligned.fixed.data.size + MOVING_BYTES * aligned.moving.data.size
    planned = (_network if aligned.network else _demons)(aligned, limit - host)
    needed = planned["needed"] + host
    if needed > limit:
        remedy = "give more" if aligned.request.memory else "give --memory with less"
        raise InputError(f"{aligned.fixed.path} and {aligned.moving.path} need about {needed / 1e9:.1f} GB of memory, "
                         f"more than {limit / 1e9:.1f} GB: {remedy}, crop or downsample them")
    return Planned(**kept(aligned), **planned | {"needed": needed})


def demons_grid(fixed, **how):
    """(shape, affine, spacing in mm) of the working grid of Demons for a Volume; `how` as `working_grid` takes it."""
    spacing = max(DEMONS_SPACING, float(fixed.spacing.min()))
    return *working_grid(fixed, spacing, demons.MULTIPLE, **how), spacing


def _demons(aligned, limit):
    """The fields of `Planned` for classical Demons."""
    force, (shape, grid, spacing) = aligned.request.force, demons_grid(aligned.fixed)

    def whole(fixed, moving, weights):
        u = demons.registered(fixed, moving, force, weights)
        if aligned.refine_steps:
            u = demons.refine(fixed, moving, u, aligned.refine_steps, weights, "mind" if force == "mind" else "lncc")
        return u, None, demons.force_between(fixed, moving, force, weights)

    bytes_each = DEMONS_BYTES + CHANNEL_BYTES * len(aligned.extra)
    return {"shape": shape, "grid": grid, "spacing": spacing, "needed": bytes_each * int(np.prod(shape)),
            "whole": whole}


def _network(aligned, limit):
    """The fields of `Planned` for the network.

    The network runs at full, half or quarter resolution: at the finest that needs no more than the limit, else at a
    quarter.
    """
    config, params, about = aligned.network
    if aligned.request.stiffness == "high":  # `deform` then registers by Demons
        shape, grid = working_grid(aligned.fixed, about["spacing"], grid_multiple(config))
        return {"shape": shape, "grid": grid, "spacing": about["spacing"], "needed": DEMONS_BYTES * np.prod(shape),
                "whole": None}
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: params))
    for coarser in (1, 2, 4):
        config = config.copy_and_resolve_references()
        config.data.downsample = coarser * aligned.network[0].data.downsample
        shape, grid = working_grid(aligned.fixed, about["spacing"], grid_multiple(config))
        beside = np.prod(shape) * (PASS_BYTES if aligned.refine_steps else 0)
        program, needed = _program(network_pass(config, levels=False), tree, tuple(leaves), shape, aligned.masked,
                                   limit - beside)
        refining = REFINE_BYTES + CHANNEL_BYTES * len(aligned.extra) if aligned.refine_steps else 0
        needed = max(needed, np.prod(shape) * refining) + beside
        if needed <= limit:
            break

    def network(fixed, moving, weights):
        return program(params=params, fixed=fixed, moving=moving, weights=weights)

    def whole(fixed, moving, weights):
        images, weights = (fixed[None, ..., 0], moving[None, ..., 0]), _of_a_batch(weights)
        if not aligned.refine_steps:
            return tuple(x[0] for x in network(*images, weights))
        extra = (fixed[None, ..., 1:], moving[None, ..., 1:]) if aligned.extra else None
        return tuple(x[0] for x in refined(network, *images, aligned.refine_steps, weights, extra))

    return {"shape": shape, "grid": grid, "spacing": about["spacing"], "needed": needed, "whole": whole}


def _of_a_batch(weights):
    return None if weights is None else jnp.concatenate(weights, -1)[None]


@lru_cache(maxsize=4)
def _program(network, tree, leaves, shape, masked, limit):
    """The result of `sharding.compiled_and_memory`, cached, so that many images of one size are compiled for once."""
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    weights = jax.ShapeDtypeStruct((1, *shape, 2), jnp.float32) if masked else None
    return sharding.compiled_and_memory(
        partial(network.compiled, jax.tree.unflatten(tree, leaves), image, image, weights), limit)
