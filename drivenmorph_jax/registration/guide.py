"""Stage 6b: landmarks, curves and pairs of labels continue the deformation, where the request has them."""

import math
import warnings
from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from drivenmorph_jax import demons
from drivenmorph_jax.errors import InputError, InputWarning
from drivenmorph_jax.fields.inverse import coarse_inverse
from drivenmorph_jax.fields.warp import warp
from drivenmorph_jax.network.refinement import INVERSE_STEPS
from drivenmorph_jax.registration.deform import Deformed
from drivenmorph_jax.registration.prepare import sampler
from drivenmorph_jax.transforms.maps import Affine, rescaled
from drivenmorph_jax.transforms.points import Landmarks
from drivenmorph_jax.transforms.world import channels_first, map_points, sample

RADIUS = 10.0  # mm, of a landmark without one
APART = 0.5  # radii between landmarks along a curve
BORDER_RADIUS = 5.0  # mm, of the border of a structure
OPPOSED = 2.5  # mm, how precisely the centre of a structure tells where it has to go
SLACK = 0.5  # mm, how precisely landmarks can be placed
ITERATIONS = 20  # of `demons.guided`


def guide(deformed: Deformed) -> Deformed:
    """Continue the deformation by landmarks and borders, see `demons.guidance`. Images of little in common do not take
    part.

    A landmark is left out where it contradicts another one after the affine, or where it is out of reach. So is a pair
    of labels, see `labels_left_out`. A warning names it. `landmarks_told` gets {"name", "fixed", "weight", "before_mm",
    "left_out"} of each landmark, and `labels_told` {"fixed", "moving", "dice_before", "dice_after", "left_out"} of each
    pair of labels. Landmarks along the curves are added to `landmarks`.

    Raises InputError where one of the labels is on no voxel of the working grid.
    """
    request, way = deformed.request, _way(deformed)
    marks = _marks(deformed, way)
    points, targets, radius, told = _landmarks(deformed, marks, way)
    borders, labels = _borders(deformed)
    deformed = replace(deformed, landmarks=marks, landmarks_told=told, labels_told=labels)
    used, lines = ([k for k, one in enumerate(some) if one["left_out"] is None] for some in (told, labels))
    if not used and not lines:
        return deformed
    borders = tuple(jnp.asarray(x[..., lines]) for x in borders) if lines else None
    u = demons.guided(*deformed.channels, deformed.u, points[used], targets[used], radius[used],
                      iterations=ITERATIONS if deformed.stiffness == "low" else 0,
                      force=request.force if request.method == "demons" else "lncc", weights=deformed.weights,
                      trust=marks.weight[used], borders=borders, border_radius=BORDER_RADIUS / deformed.spacing)
    if lines:
        overlaps = iter(_dice(borders, u))
        labels = tuple(one | {"dice_after": next(overlaps)} if one["left_out"] is None else one for one in labels)
    return replace(deformed, u=np.asarray(u), u_inverse=np.asarray(coarse_inverse(u, steps=INVERSE_STEPS)),
                   labels_told=labels)


def _way(deformed):
    """The map from the fixed world to the moving one with which the deformation began, in scaled lengths."""
    return Affine(deformed.affine) if deformed.start is None else rescaled(deformed.start, deformed.scale)


def _marks(deformed, way):
    """The landmarks of the request, with those along its curves."""
    scale, grid, u = deformed.scale, deformed.grid, channels_first(deformed.u)
    if deformed.landmarks is None:
        return Landmarks((), *np.zeros((2, 0, 3)), *np.zeros((2, 0)))

    def moved(points):
        voxels = map_points(np.linalg.inv(grid), scale * points)
        return map_points(grid, voxels + sample(u, voxels)) / scale

    return with_curves(deformed.landmarks, moved, rescaled(way, 1 / scale), RADIUS / scale)


def with_curves(marks, moved, way, radius):
    """`Landmarks` with those along their curves, `APART` radii from each other, see `demons.curves`; all have weights.

    Args:
      marks: the `Landmarks`, in RAS mm.
      moved: function of points (N, 3) of the fixed world, where the deformation found so far has them.
      way: the map from there to the moving world, with its inverse, one of `transforms.maps`.
      radius: mm, of a curve without one.
    """
    weight = np.ones(len(marks.names)) if marks.weight is None else marks.weight
    found = [(marks.names, marks.fixed, marks.moving, marks.radius, weight)]
    for curve in marks.curves:
        apart = APART * (radius if np.isnan(curve.radius) else curve.radius)
        number = 1 + max(1, math.ceil(demons.curves.length(curve.fixed) / apart))
        fixed = demons.curves.along(curve.fixed, number)
        places, line = moved(fixed), way.inverse(curve.moving)
        # It may be drawn from its other end.
        ends = min((demons.curves.matching(places, one) for one in (line, line[::-1])), key=lambda both: both[1])[0]
        found.append((tuple(f"{curve.name} ({k} of {number})" for k in range(1, number + 1)), fixed, way(ends),
                      *(np.full(number, x) for x in (curve.radius, curve.weight))))
    names, *values = zip(*found, strict=True)
    return Landmarks(sum(names, ()), *map(np.concatenate, values))


def _landmarks(deformed, marks, way):
    """(points, targets and radii in voxels of the working grid, what is told of each landmark)."""
    scale, spacing, grid = deformed.scale, deformed.spacing, deformed.grid
    if not marks.names:
        return marks.fixed, marks.moving, marks.radius, ()
    points, targets = (map_points(np.linalg.inv(grid), x) for x in (scale * marks.fixed,
                                                                    way.inverse(scale * marks.moving)))
    radius = np.where(np.isnan(marks.radius), RADIUS, scale * marks.radius) / spacing
    lacked = np.asarray(demons.remaining(deformed.u, points, targets))
    left_out = contradicting(marks.names, points, targets, lacked / marks.weight, SLACK / spacing)
    far = demons.out_of_reach(deformed.u, points, targets, radius)
    left_out |= too_far(set(np.flatnonzero(far)) - set(left_out), *(x * spacing / scale for x in (lacked, radius)))
    warn(marks.names, left_out)
    return points, targets, radius, tuple(
        {"name": name, "fixed": marks.fixed[k].tolist(), "weight": float(marks.weight[k]),
         "before_mm": float(lacked[k] * spacing / scale), "left_out": left_out.get(k)}
        for k, name in enumerate(marks.names))


def _borders(deformed):
    """(the signed distances in the fixed and in the moving image (D, H, W, C), what is told of each pair of labels)."""
    wanted = deformed.request.label_pairs
    if not wanted:
        return None, ()
    on_working_grid = sampler(deformed)
    sides = (deformed.fixed_labels, None), (deformed.moving_labels, deformed.affine)
    distances = []
    for (labels, through), numbers in zip(sides, zip(*wanted, strict=True), strict=True):
        inside = [np.asarray(on_working_grid(replace(labels, data=(labels.data == number).astype(np.float32)), through))
                  > 0.5 for number in numbers]
        for number, one in zip(numbers, inside, strict=True):
            if not one.any():
                raise InputError(f"label {number} of {labels.path} fills no voxel of {deformed.spacing:.2g} mm: leave "
                                 "it out of --guide_labels")
        distances.append(np.stack(list(map(demons.signed_distance, inside)), -1))
    moved = np.asarray(warp(jnp.asarray(distances[1]), deformed.u))
    left_out = labels_left_out(wanted, distances[0], moved, deformed.spacing / deformed.scale, deformed.scale)
    warn_of_labels(wanted, left_out)
    return distances, tuple({"fixed": pair[0], "moving": pair[1], "dice_before": dice, "dice_after": dice,
                             "left_out": left_out.get(k)}
                            for k, (pair, dice) in enumerate(zip(wanted, _dice(distances, deformed.u), strict=True)))


def labels_left_out(pairs, fixed, moved, spacing, scale):
    """{index: why it is left out} of pairs of labels that are out of reach, or contradict others.

    A pair is out of reach where the two borders are more than `demons.FARTHEST` radii from each other in the mean. The
    centres of the structures contradict each other as landmarks do, see `demons.contradictory`: two neighbours that are
    to change their places, for instance.

    Args:
      pairs: (label of the fixed image, label of the moving image) of each.
      fixed, moved: their signed distances (D, H, W, C), in voxels, the latter after the registration found so far.
      spacing: mm, of the voxels.
      scale: that of the registration, in whose lengths `BORDER_RADIUS` and `OPPOSED` are.
    """
    apart = [np.abs(b)[np.abs(a) < 1].mean() * spacing for a, b in zip(*(np.moveaxis(x, -1, 0) for x in (fixed, moved)),
                                                                      strict=True)]
    found = {k: f"lies {mm:.1f} mm from its partner, too far to be brought there"
             for k, mm in enumerate(apart) if mm > demons.FARTHEST * BORDER_RADIUS / scale}
    near = [k for k in range(len(pairs)) if k not in found and (moved[..., k] < 0).any()]
    centres = [np.array([np.argwhere(x[..., k] < 0).mean(0) for k in near]).reshape(-1, 3) for x in (fixed, moved)]
    lacked = np.linalg.norm(centres[1] - centres[0], axis=-1)
    against = demons.contradictory(*centres, lacked, OPPOSED / scale / spacing)
    return found | {near[k]: f"contradicts label {pairs[near[other]][0]}: no smooth deformation brings both to their "
                             "partners" for k, other in against.items()}


def warn_of_labels(pairs, left_out):
    """Warn of each pair of labels that is left out."""
    for k, why in left_out.items():
        warnings.warn(InputWarning(f"label {pairs[k][0]} {why}, and is left out; correct --guide_labels"), stacklevel=3)


def overlap(a, b):
    """Dice of two structures, bool."""
    return float(2 * (a & b).sum() / max(a.sum() + b.sum(), 1))


def _dice(borders, u):
    """Dice of each pair of structures on the working grid, from their signed distances, by the displacement u."""
    fixed, moved = np.asarray(borders[0]) < 0, np.asarray(warp(jnp.asarray(borders[1]), u)) < 0
    return list(map(overlap, np.moveaxis(fixed, -1, 0), np.moveaxis(moved, -1, 0)))


def contradicting(names, points, targets, lacked, slack):
    """{index: why it is left out} of landmarks that contradict others, see `demons.contradictory`."""
    return {k: f"contradicts {_called(names[other])}"
            for k, other in demons.contradictory(points, targets, lacked, slack).items()}


def too_far(far, lacked, radius):
    """{index: why it is left out} of the landmarks with the indices `far`; lengths (N,) in mm, in the moving image."""
    return {k: f"lies {lacked[k]:.1f} mm from its place in the moving image, and in the fixed image too far for its "
               f"radius of {radius[k]:.1f} mm" for k in far}


def warn(names, left_out):
    """Warn of each landmark that is left out."""
    for k, why in left_out.items():
        warnings.warn(InputWarning(f"{_called(names[k])} {why}, and is left out; correct or delete it, or change its "
                                   "radius"), stacklevel=3)


def _called(name):
    return name if name.startswith("landmark") else f"landmark {name}"
