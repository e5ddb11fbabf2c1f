"""Unfolding: local smoothing of a displacement where its Jacobian determinant is not positive."""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from drivenmorph_jax.backends import current
from drivenmorph_jax.fields.grid import inside, widened
from drivenmorph_jax.fields.jacobian import determinant_by_slabs, determinant_on_host, jacobian_determinant
from drivenmorph_jax.fields.smooth import gaussian_smooth
from drivenmorph_jax.runtime.stored import stored

MOST = 20  # smoothing steps
NEAR = 2  # voxels around a fold that count as folded
SIGMA = 1.0  # voxels
RADIUS = 5  # voxels, where the Gaussian has fallen below 1e-5
KERNEL = np.exp(-0.5 * (np.arange(-RADIUS, RADIUS + 1) / SIGMA) ** 2)
REACH = NEAR + RADIUS  # voxels from a fold that a step changes
TILE = 32  # voxels


def unfolded(u):
    """u, smoothed locally around its folds until det(I + grad u) > 0 everywhere.

      u <- u + w (K * u - u)

    K is a Gaussian of 1 voxel. The weight w falls from 1 at a fold to 0 some 4 voxels from it. A field without folds is
    returned unchanged. Folds that are left after `MOST` steps stay.

    Args:
      u: (*space, n) displacement in voxels.

    Returns:
      The displacement (*space, n), in voxels.
    """
    # Folds are few. Around them alone, a CPU is 3 to 8 times as fast. From an accelerator, the field would have to be
    # copied.
    if current() == "cpu" and not isinstance(u, jax.core.Tracer):
        return jnp.asarray(unfolded_around_folds(u))
    return unfolded_everywhere(u)


@stored
def unfolded_everywhere(u):
    """`unfolded`, computed as its formula: each step smooths the whole field."""
    dims = u.shape[-1]

    def step(state):
        i, u, folded = state
        side = 2 * NEAR + 1
        near = jax.lax.reduce_window(folded.astype(u.dtype), 0.0, jax.lax.max, (side,) * dims, (1,) * dims, "SAME")
        weight = gaussian_smooth(near[..., None], SIGMA, dims)
        u = u + weight * (gaussian_smooth(u, SIGMA, dims) - u)
        return i + 1, u, jacobian_determinant(u) <= 0

    return jax.lax.while_loop(lambda state: (state[0] < MOST) & state[2].any(), step,
                              (0, u, jacobian_determinant(u) <= 0))[1]


def unfolded_around_folds(u, to_voxel=None):
    """`unfolded` of an array in the memory of the host: each step smooths the tiles that a fold reaches.

    Args:
      u: (*space, n) displacement.
      to_voxel: (n, n), takes vectors u to voxels. None where they are in voxels.

    Returns:
      The displacement, a NumPy array; u itself where it has no folds.
    """
    u = np.asarray(u, np.float32)
    folded = determinant_by_slabs(u, to_voxel) <= 0
    if not folded.any():
        return u
    u = u.copy()

    def find_folds(changed):
        part = widened(changed, folded.shape, 1)
        wide = widened(part, folded.shape, 1)
        folded[part] = (determinant_on_host(u[wide], to_voxel) <= 0)[inside(part, wide)]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in range(MOST):
            parts = _reached(folded)
            made = list(pool.map(lambda part: _step(u, folded, part), parts))  # of the field before this step
            for part, new in zip(parts, made, strict=True):
                u[part] = new
            list(pool.map(find_folds, parts))
            if not folded.any():
                break
    return u


def _reached(folded):
    """Boxes, as tuples of slices, that hold every voxel within REACH of one where `folded` (*space) is True. They do
    not overlap."""
    places, last = np.argwhere(folded), np.array(folded.shape) - 1
    low, high = np.maximum(places - REACH, 0), np.minimum(places + REACH, last)
    found = {}  # tile: the first and the last voxel that is reached there
    for signs in itertools.product((0, 1), repeat=folded.ndim):  # a fold reaches at most two tiles along an axis
        tiles = np.where(signs, high, low) // TILE
        first, end = np.maximum(low, tiles * TILE), np.minimum(high, tiles * TILE + TILE - 1)
        for tile, a, b in zip(map(tuple, tiles.tolist()), first, end, strict=True):
            before = found.get(tile, (a, b))
            found[tile] = np.minimum(before[0], a), np.maximum(before[1], b)
    return [tuple(slice(int(a), int(b) + 1) for a, b in zip(*ends, strict=True)) for ends in found.values()]


def _step(u, folded, part):
    """One step of `unfolded` at a box: its new u."""
    wide = widened(part, folded.shape, REACH)
    near = ndimage.maximum_filter(folded[wide], 2 * NEAR + 1, mode="constant")
    weight, smooth = near[..., None].astype(np.float32), u[wide]
    for axis, n in enumerate(near.shape):
        weight, smooth, whole = (ndimage.correlate1d(x, KERNEL, axis, mode="constant")
                                 for x in (weight, smooth,
                                           np.ones([n if k == axis else 1 for k in range(u.ndim)], np.float32)))
        weight, smooth = weight / whole, smooth / whole  # at the border, the weights of the Gaussian add up to less
    inner = inside(part, wide)
    return u[part] + weight[inner] * (smooth[inner] - u[part])
