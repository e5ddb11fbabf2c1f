"""The region of a correction: a box of voxels around it, on which it is computed, and its way back to the fixed grid.

The voxels are those of the working grid of Demons, which is continued beyond its sides. Few lengths of a side are used,
since each shape is compiled for once.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from drivenmorph_jax.images.volume import affine_of_part
from drivenmorph_jax.transforms.world import by_planes, channels_first, map_points

SIDES = 32, 48, 80, 128, 192, 256  # voxels
PAD = 8  # voxels around what moves, as far as the windows of the force reach
APART = 2.0  # voxels between places that are computed by themselves
STILL = 1e-4  # voxels; what moves less does not move


@dataclass(frozen=True, eq=False)
class Box:
    """A box of isotropic voxels in the fixed world."""

    shape: tuple[int, int, int]
    affine: np.ndarray  # (4, 4), voxel to RAS mm

    def voxels(self, points):
        """Points (..., 3) of the fixed world in voxels of the box."""
        return map_points(np.linalg.inv(self.affine), points)


def box_around(low, high, grid):
    """The smallest `Box` with sides of `SIDES` around voxels of a grid with the affine `grid`.

    The voxels go from `low` to `high` (3,), and `PAD` voxels are left on each side. The box has the voxels of the grid.
    """
    low, high = np.floor(low).astype(int), np.ceil(high).astype(int)
    shape = tuple(next((side for side in SIDES if side >= least), -(-least // 64) * 64)
                  for least in (high - low + 1 + 2 * PAD).tolist())
    affine = grid.copy()
    affine[:3, 3] = map_points(grid, (low + high - shape + 1) // 2)
    return Box(shape, affine)


def reaching(low, high, reach, apart):
    """Which boxes reach each other, by way of others as well: a list of arrays of indices.

    Boxes (N, 3) from `low` to `high` reach each other where no more than reach_i + reach_j + `apart` lies between them.
    """
    between = np.maximum(np.maximum(low[:, None] - high[None], low[None] - high[:, None]), 0)
    close = np.linalg.norm(between, axis=-1) <= reach[:, None] + reach[None] + apart
    number, group = connected_components(csr_array(close), directed=False)
    return [np.flatnonzero(group == k) for k in range(number)]


def part_within(box, shape, affine):
    """The slices of a grid (shape, affine) around its part within a box, a voxel wider where there is one."""
    corners = np.array(list(itertools.product(*((0, n - 1) for n in box.shape))))
    found = map_points(np.linalg.inv(affine) @ box.affine, corners)
    low, high = np.floor(found.min(0)).astype(int) - 1, np.ceil(found.max(0)).astype(int) + 2
    return tuple(slice(int(np.clip(a, 0, n - 1)), int(np.clip(b, 1, n)))
                 for a, b, n in zip(low, high, shape, strict=True))


def on_box(field, affine, box):
    """A field (X, Y, Z, 3) on a grid with an affine, sampled linearly on a box and clamped at the edge."""
    matrix = np.linalg.inv(affine) @ box.affine

    def sampled(channel):
        return ndimage.affine_transform(channel, matrix[:3, :3], matrix[:3, 3], box.shape, order=1, mode="nearest",
                                        prefilter=False)

    with ThreadPoolExecutor(3) as pool:
        return np.stack(list(pool.map(sampled, channels_first(field))), -1)


def on_part(move, box, part, affine):
    """A field `move` of a box (D, H, W, 3), in its voxels, on a part of a grid with an affine, in RAS mm.

    It is sampled linearly, and 0 beyond the box and where it is shorter than `STILL`.
    """
    channels, linear = channels_first(move), box.affine[:3, :3].T.astype(np.float32)

    def plane(_, x):
        voxel = np.moveaxis(box.voxels(x), -1, 0)
        found = np.stack([ndimage.map_coordinates(c, voxel, order=1, mode="constant", prefilter=False)
                          for c in channels], -1)
        return np.where(np.linalg.norm(found, axis=-1, keepdims=True) < STILL, 0, found) @ linear

    return by_planes((*(one.stop - one.start for one in part), 3), affine_of_part(affine, part), plane)


def bounds(marked, part):
    """The slices of a grid around the voxels that are marked in a part of it; empty slices where none is."""
    found = ndimage.find_objects(marked.astype(np.uint8))
    if not found:
        return NOWHERE
    return tuple(slice(a.start + b.start, a.start + b.stop) for a, b in zip(part, found[0], strict=True))


NOWHERE = (slice(0, 0),) * 3
