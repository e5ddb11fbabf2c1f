"""Maps of points from one world to another, in RAS mm: affine maps, fields on a grid, their inverses, and chains.

Each map is a function of points (..., 3). Its attribute `inverse` is the map back.
"""

from dataclasses import dataclass
from functools import cached_property

import jax.numpy as jnp
import numpy as np
from scipy.spatial import KDTree

from drivenmorph_jax.fields.inverse import inverse_at
from drivenmorph_jax.transforms.world import channels_first, linear_part, map_points, sample, without_affine

FADE = 2.0  # mm beyond the grid of a field over which a residual of 1 mm at its rim fades to 0
MARGIN = 40.0  # mm, the widest margin in which it fades
SMALL = 0.01  # mm; a residual below it need not fade
BLOCK = 2**12  # points for which a compiled inverse is computed at once
ITERATIONS = 6, 40  # of an inverse, for all points and for those that have not converged
NODES, STARTS = 2, 4  # every second voxel is a node; the nodes from which a point starts again, nearest first


@dataclass(frozen=True, eq=False)
class Affine:
    """x -> A x, where `matrix` is A (4, 4)."""

    matrix: np.ndarray

    def __call__(self, points):
        return map_points(self.matrix, np.asarray(points, np.float64))

    @property
    def inverse(self):
        return Affine(np.linalg.inv(self.matrix))


@dataclass(frozen=True, eq=False)
class Field:
    """x -> L (x + n(x)), where n is sampled linearly on a grid and is 0 at its rim and beyond.

    L is the affine part of the map, so beyond the grid the affine part continues. `faded` makes such a field.
    """

    near: np.ndarray  # (X, Y, Z, 3), n in RAS mm, float32
    affine: np.ndarray  # (4, 4), voxel to RAS mm
    linear: np.ndarray  # L (4, 4)

    @cached_property
    def _channels(self):
        return channels_first(self.near)

    def __call__(self, points):
        points = np.asarray(points, np.float64)
        return map_points(self.linear, points + sample(self._channels, map_points(np.linalg.inv(self.affine), points)))

    @property
    def inverse(self):
        return FieldInverse(self)


@dataclass(frozen=True, eq=False)
class FieldInverse:
    """The inverse of a `Field`: y -> the x with L (x + n(x)) = y. It is found for each point by an iteration."""

    inverse: Field

    @cached_property
    def _in_voxels(self):
        """(n, the inverse of the affine closest to x + n(x), the map from the second world to the target of the
        iteration), in voxels of the grid of n."""
        field, to_voxel = self.inverse, np.linalg.inv(self.inverse.affine)
        closest = to_voxel @ linear_part(field.near, field.affine) @ field.affine
        return (jnp.asarray(field.near @ to_voxel[:3, :3].T.astype(np.float32)), np.linalg.inv(closest),
                to_voxel @ np.linalg.inv(field.linear))

    @cached_property
    def _nodes(self):
        """Some voxels x of the grid of n, and a tree of the points x + n(x) to which they are mapped."""
        u = np.asarray(self._in_voxels[0])[(slice(None, None, NODES),) * 3]
        nodes = NODES * np.moveaxis(np.indices(u.shape[:3]), 0, -1).reshape(-1, 3).astype(np.float32)
        return nodes, KDTree(nodes + u.reshape(-1, 3))

    def __call__(self, points):
        points = np.asarray(points, np.float64)
        u, closest, to_voxel = self._in_voxels
        target = map_points(to_voxel, points).reshape(-1, 3).astype(np.float32)
        found = map_points(closest, target).astype(np.float32)
        left = np.arange(len(target))
        for most in ITERATIONS:
            left = left[~self._improve(found, target, left, most)]
        for k in range(STARTS):  # where the field bends sharply, Newton's method may stand still; begin again close by
            if len(left):
                nodes, tree = self._nodes
                again = nodes[tree.query(target[left], [k + 1])[1][:, 0]]
                done = self._improve(again, target[left], np.arange(len(left)), ITERATIONS[-1])
                found[left[done]] = again[done]
                left = left[~done]
        return map_points(self.inverse.affine, found.astype(np.float64)).reshape(points.shape)

    def _improve(self, found, target, some, most):
        """Iterate `found` in place at the indices `some`; returns which of them have converged."""
        done = np.empty(len(some), bool)
        for start in range(0, len(some), BLOCK):
            index = some[start:start + BLOCK]
            filled = np.resize(index, BLOCK)  # one shape is compiled once
            v, converged = inverse_at(self._in_voxels[0], target[filled], found[filled], most)
            found[index], done[start:start + BLOCK] = np.asarray(v)[:len(index)], np.asarray(converged)[:len(index)]
        return done


@dataclass(frozen=True, eq=False)
class Chain:
    """x -> the last of `maps` of ... of the first of them of x."""

    maps: tuple

    def __call__(self, points):
        for one in self.maps:
            points = one(points)
        return points

    @property
    def inverse(self):
        return Chain(tuple(one.inverse for one in reversed(self.maps)))


def faded(displacement, affine, linear):
    """The `Field` of a displacement (X, Y, Z, 3) in RAS mm on a grid with `affine`, whose affine part is `linear`.

      n(x) = L^-1 (x + displacement(x)) - x    on the grid

    Beyond the grid, n is the one at the nearest point of the rim, times a weight that falls from 1 to 0. At each side
    of the grid it falls over FADE times the longest n of that side, so slowly that the map stays invertible, but not
    over more than MARGIN.
    """
    near = without_affine(displacement, affine, linear)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    pads, beyond = [], []
    for axis, (size, n) in enumerate(zip(spacing, near.shape, strict=False)):
        rims = (float(np.linalg.norm(np.take(near, place, axis), axis=-1).max()) for place in (0, -1))
        reach = [0.0 if rim < SMALL else max(min(FADE * rim, MARGIN), 2 * size) for rim in rims]
        low, high = (int(np.ceil(r / size)) for r in reach)
        pads.append((low, high))
        beyond.append(np.concatenate([np.arange(low, 0, -1) * size / (reach[0] or 1), np.zeros(n),
                                      np.arange(1, high + 1) * size / (reach[1] or 1)]).astype(np.float32))
    if not np.any(pads):
        return Field(near, affine, linear)
    weight = np.maximum(1 - np.sqrt(sum(np.square(x) for x in np.ix_(*beyond))), 0)
    shifted = affine.copy()
    shifted[:3, 3] -= affine[:3, :3] @ [low for low, _ in pads]
    near = np.pad(near, [*pads, (0, 0)], mode="edge")
    near *= weight[..., None]
    return Field(near, shifted, linear)


def rescaled(move, scale):
    """The map of a world in which all lengths are multiplied by `scale`."""
    if scale == 1:
        return move
    return Chain((Affine(np.diag([1 / scale] * 3 + [1])), move, Affine(np.diag([scale] * 3 + [1]))))
