"""Stage 7: the transform in millimetres, and its results on the images' own grids."""

from dataclasses import dataclass, replace

import numpy as np

from drivenmorph_jax.images.intensity import background
from drivenmorph_jax.registration.deform import Deformed
from drivenmorph_jax.registration.read import kept, scaled, scaled_grid, scaled_transform
from drivenmorph_jax.transforms.maps import Chain, Field
from drivenmorph_jax.transforms.transform import Transform
from drivenmorph_jax.transforms.world import (
    displacement_of,
    force_on_grid,
    jacobian_determinant_of_displacement,
    pull_back,
    total_displacement,
    total_inverse_displacement,
    unfolded_in_world,
)


@dataclass(frozen=True, eq=False, kw_only=True)
class Transferred(Deformed):
    """A deformation, and its transform and results on the grid of the fixed image, (X, Y, Z)."""

    transform: Transform  # from the fixed to the moving image, with its inverse
    warped: np.ndarray
    warped_labels: np.ndarray | None
    jacobian: np.ndarray  # determinant of the total transform
    vectors: np.ndarray  # (X, Y, Z, 3), the force in RAS mm


def transfer(deformed: Deformed) -> Transferred:
    """Compute the total transform, affine and deformable. It warps the moving image and its labels. Its Jacobian
    determinant and the force are given on the same grid. From here on, lengths are those of the files."""
    deformed = unscaled(deformed)
    fixed, moving, grid, affine = deformed.fixed, deformed.moving, deformed.grid, deformed.affine
    displacement, backward = _displacements(deformed)
    vectors = force_on_grid(fixed.data.shape, fixed.affine, deformed.force, grid)
    if deformed.fixed_mask is not None:
        vectors[deformed.fixed_mask.data > 0] = 0  # resampled from the working grid, the force has no sharp edge
    labels = deformed.moving_labels
    return Transferred(
        **kept(deformed), transform=Transform(displacement, fixed, affine, moving, backward),
        warped=pull_back(deformed.source, displacement, fixed.affine, outside=background(deformed.source.data)),
        warped_labels=None if labels is None else pull_back(labels, displacement, fixed.affine, "nearest"),
        jacobian=jacobian_determinant_of_displacement(displacement, fixed.affine), vectors=vectors)


def _displacements(deformed):
    """The displacements from the fixed to the moving world, on the fixed grid, and back, on the moving grid."""
    fixed, moving, grid, affine, start = (deformed.fixed, deformed.moving, deformed.grid, deformed.affine,
                                          deformed.start)
    if start is None:
        return (total_displacement(fixed.data.shape, fixed.affine, deformed.u, grid, affine),
                total_inverse_displacement(moving.data.shape, moving.affine, deformed.u_inverse, grid, affine))
    there, back = (Field(u @ grid[:3, :3].T.astype(np.float32), grid, np.eye(4)) for u in (deformed.u,
                                                                                         deformed.u_inverse))
    ways = ((there, start), fixed, affine), ((start.inverse, back), moving, np.linalg.inv(affine))
    return tuple(unfolded_in_world(displacement_of(Chain(maps), volume.data.shape, volume.affine), volume.affine,
                                   linear) for maps, volume, linear in ways)


def unscaled(deformed):
    """The same with the lengths of the files."""
    if deformed.scale == 1:
        return deformed
    back = 1 / deformed.scale
    volumes = {name: getattr(deformed, name) and scaled(getattr(deformed, name), back) for name in (
        "fixed", "moving", "source", "fixed_labels", "moving_labels", "fixed_mask", "moving_mask", "fixed_head",
        "moving_head", "fixed_brain", "moving_brain")}
    extra = tuple(tuple(scaled(volume, back) for volume in both) for both in deformed.extra)
    return replace(deformed, **volumes, extra=extra, affine=scaled_transform(deformed.affine, back),
                   grid=scaled_grid(deformed.grid, back), spacing=deformed.spacing * back)
