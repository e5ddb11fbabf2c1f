"""Stage 6b: landmarks continue the deformation, where the request has them."""

import warnings
from dataclasses import replace

import numpy as np

from drivenmorph_jax import demons
from drivenmorph_jax.errors import InputWarning
from drivenmorph_jax.fields.inverse import coarse_inverse
from drivenmorph_jax.network.refinement import INVERSE_STEPS
from drivenmorph_jax.registration.deform import Deformed
from drivenmorph_jax.transforms.maps import Affine, rescaled
from drivenmorph_jax.transforms.world import map_points

RADIUS = 10.0  # mm, of a landmark without one
SLACK = 0.5  # mm, how precisely landmarks can be placed
ITERATIONS = 20  # of `demons.guided`


def guide(deformed: Deformed) -> Deformed:
    """Continue the deformation by the landmarks, see `demons.guidance`. Images of little in common do not take part.

    A landmark is left out where it contradicts another one after the affine, or where it is out of reach. A warning
    names it. `landmarks_told` gets {"name", "fixed", "before_mm", "left_out"} of each.
    """
    marks, request, scale, spacing = deformed.landmarks, deformed.request, deformed.scale, deformed.spacing
    to_voxel = np.linalg.inv(deformed.grid)
    aligned = (Affine(deformed.affine) if deformed.start is None else rescaled(deformed.start, scale)).inverse
    points, targets = (map_points(to_voxel, x) for x in (scale * marks.fixed, aligned(scale * marks.moving)))
    radius = np.where(np.isnan(marks.radius), RADIUS, scale * marks.radius) / spacing
    lacked = np.asarray(demons.remaining(deformed.u, points, targets))
    left_out = contradicting(marks.names, points, targets, lacked, SLACK / spacing)
    far = demons.out_of_reach(deformed.u, points, targets, radius)
    left_out |= too_far(set(np.flatnonzero(far)) - set(left_out), *(x * spacing / scale for x in (lacked, radius)))
    warn(marks.names, left_out)
    told = tuple({"name": name, "fixed": marks.fixed[k].tolist(), "before_mm": float(lacked[k] * spacing / scale),
                  "left_out": left_out.get(k)} for k, name in enumerate(marks.names))
    used = [k for k in range(len(points)) if k not in left_out]
    if not used:
        return replace(deformed, landmarks_told=told)
    u = demons.guided(deformed.fixed_on_grid[..., None], deformed.seen[..., None], deformed.u, points[used],
                      targets[used], radius[used], iterations=ITERATIONS if deformed.stiffness == "low" else 0,
                      force=request.force if request.method == "demons" else "lncc", weights=deformed.weights)
    return replace(deformed, u=np.asarray(u), u_inverse=np.asarray(coarse_inverse(u, steps=INVERSE_STEPS)),
                   landmarks_told=told)


def contradicting(names, points, targets, lacked, slack):
    """{index: why it is left out} of landmarks that contradict others, see `demons.contradictory`."""
    return {k: f"contradicts landmark {names[other]}"
            for k, other in demons.contradictory(points, targets, lacked, slack).items()}


def too_far(far, lacked, radius):
    """{index: why it is left out} of the landmarks with the indices `far`; lengths (N,) in mm."""
    return {k: f"is {lacked[k]:.1f} mm away, too far for its radius of {radius[k]:.1f} mm" for k in far}


def warn(names, left_out):
    """Warn of each landmark that is left out."""
    for k, why in left_out.items():
        warnings.warn(InputWarning(f"landmark {names[k]} {why}, and is left out; correct or delete it, or change its "
                                   "radius"), stacklevel=3)
