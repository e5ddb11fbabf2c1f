"""The files of a corrected result: those of `register`, with the numbers and checks of the corrected transform."""

from dataclasses import replace

import jax.numpy as jnp
import nibabel
import numpy as np
from scipy import ndimage

from drivenmorph_jax.fields.grid import widened
from drivenmorph_jax.fields.unfold import REACH
from drivenmorph_jax.fields.warp import warp
from drivenmorph_jax.images.contrast import recoloured
from drivenmorph_jax.images.volume import affine_of_part
from drivenmorph_jax.images.working_grid import working_grid
from drivenmorph_jax.registration import region
from drivenmorph_jax.registration.align import align
from drivenmorph_jax.registration.checks import check
from drivenmorph_jax.registration.deform import Deformed
from drivenmorph_jax.registration.plan import Planned
from drivenmorph_jax.registration.prepare import prepare
from drivenmorph_jax.registration.read import kept, scaled, scaled_grid
from drivenmorph_jax.registration.result import Result, result_of
from drivenmorph_jax.registration.score import score
from drivenmorph_jax.registration.transfer import Transferred, unscaled
from drivenmorph_jax.transforms.maps import Affine, Chain, Field, faded
from drivenmorph_jax.transforms.reading import read_chain
from drivenmorph_jax.transforms.world import (
    by_planes,
    displacement_of,
    force_on_grid,
    map_points,
    sample,
    unfolded_part,
    without_affine,
)

FLIP = np.float32([-1, -1, 1])  # from LPS, the frame of a force file, to RAS
STEPS = 2  # by which the inverse is corrected
NEAR = 8  # voxels around the region, from which the inverse may come
# Of a summary, what the corrected transform changes; the rest is that of the result that was corrected.
NEW = ("similarity_before", "similarity_after", "dice_before", "dice_after", "fold_pct", "sdlogj", "inverse_mm",
       "confidence", "working_grid", "working_spacing_mm", "environment", "definitions", "landmarks", "guided_labels",
       "checks")


def corrected_result(session, state) -> Result:
    """The `Result` of a `State` of a `Session`, see `registration.correct`, with all that `register` writes.

    The mask of distrust counts as one of the fixed image.

    Its summary has the key "corrected": the folder of the result that was corrected, its stiffness and its mask.

    Raises InputError where a file cannot be read any more.
    """
    pair, start = _read(session, state)
    given = session.summary["affine"]
    given = {True: "affine", False: "none"}[given] if isinstance(given, bool) else given
    aligned = replace(align(pair), given_affine=given if isinstance(given, str) else np.array(given))
    # The working grid of the result, so that numbers before and after compare, and with those of the result.
    spacing, sides = session.summary["working_spacing_mm"] * session.scale, np.array(session.summary["working_grid"])
    shape, grid = working_grid(aligned.fixed, spacing, sides)
    prepared = prepare(Planned(**kept(aligned), shape=shape, grid=grid, spacing=spacing,
                               needed=1e9 * session.summary["memory_gb"], whole=None))
    transform = replace(session.transform, displacement=state.displacement, grid=session.fixed, other=session.moving,
                        backward=_backward(session, state), exact=None)
    transferred = _transferred(session, state, prepared, transform, start)
    checked = check(score(transferred))
    result = result_of(checked, {"correct": state.numbers["seconds"]})
    return replace(result, summary=_summary(session, state, result.summary))


def _read(session, state):
    """(the pair with its labels, mask of distrust, landmarks and start; this start in the lengths of the files)."""
    pair, files, settings, scale = session.pair, session.files, session.summary["settings"], session.scale
    pair = replace(pair, landmarks=state.correction.landmarks)
    if session.labels is not None:
        pair = replace(pair, moving_labels=scaled(session.labels, scale))
    if session.fixed_labels is not None:
        pair = replace(pair, fixed_labels=scaled(session.fixed_labels, scale))
    distrust = state.correction.distrust
    if distrust is not None:
        mask = distrust if pair.fixed_mask is None else distrust | (pair.fixed_mask.data > 0)
        pair = replace(pair, fixed_mask=replace(pair.fixed, data=mask.astype(np.uint8)))
    if "initial_transform" in files:
        found = read_chain(files["initial_transform"], settings["geometry"], settings["convention"], session.fixed,
                           session.moving)
        if not found.is_affine:
            return replace(pair, start=found.map), found.map
    return pair, None


def _backward(session, state):
    """The displacement of the inverse on the moving grid: that of the result, and the inverse of phi where it changed.

    phi maps a place to where it mapped it before, so these are the points that the former inverse maps there.
    """
    backward = session.inverse_displacement
    if state.parts is None:
        return backward
    fixed, linear, moving = session.fixed, session.transform.linear, session.moving
    part = widened(state.region, fixed.data.shape, NEAR)
    affine = affine_of_part(fixed.affine, part)
    to_part, to_moving = np.linalg.inv(affine), np.linalg.inv(moving.affine)
    there, back = state.displacement[part], np.linalg.inv(linear)
    near = without_affine(there, affine, linear)
    places = np.zeros(there.shape[:3], np.float32)
    for box in ndimage.find_objects(ndimage.label((there != state.found[0][part]).any(-1), np.ones((3, 3, 3)))[0]):
        places[widened(box, places.shape, 2)] = 1
    changed = by_planes(backward.shape[:3], moving.affine, lambda i, y: ndimage.map_coordinates(
        places, np.moveaxis(map_points(to_part, y + backward[i]), -1, 0), order=0, mode="constant") > 0, bool)
    points = map_points(moving.affine, np.argwhere(changed))
    backward = backward.copy()
    backward[changed] = Field(near, affine, linear).inverse(points) - points
    channels = np.moveaxis(backward, -1, 0)
    for _ in range(STEPS):  # for points between the voxels, see `fields.inverse.coarse_inverse`
        error = by_planes(there.shape, affine, lambda i, x: there[i] + sample(channels, map_points(
            to_moving, x + there[i])))
        backward[changed] -= 0.5 * sample(np.moveaxis(error, -1, 0), map_points(to_part, points + backward[changed]))
    shape = moving.data.shape
    where = widened(region.bounds(changed, tuple(map(slice, 3 * [0], shape))), shape, NEAR + REACH)
    backward[where] = unfolded_part(lambda far: backward[far], where, shape, moving.affine, back)
    return backward


def _transferred(session, state, prepared, transform, start):
    """The stages `deform` and `transfer` for a transform that is known."""
    fixed, moving, linear = session.fixed, session.moving, session.transform.linear
    shape, grid = prepared.shape, scaled_grid(prepared.grid, 1 / session.scale)
    to_voxel = np.linalg.inv(grid)[:3, :3].T.astype(np.float32)
    start = Affine(linear) if start is None else start
    there = Chain((faded(transform.displacement, fixed.affine, linear), start.inverse))
    back = Chain((start, faded(transform.backward, moving.affine, np.linalg.inv(linear))))
    u, u_inverse = (displacement_of(way, shape, grid) @ to_voxel for way in (there, back))
    vectors = np.asarray(nibabel.load(session.path("force.nii.gz")).dataobj, np.float32)[:, :, :, 0] * FLIP
    if state.correction.distrust is not None:
        vectors = np.where(state.correction.distrust[..., None], 0, vectors)
    in_voxels = vectors @ np.linalg.inv(fixed.affine)[:3, :3].T.astype(np.float32)
    force = force_on_grid(shape, grid, in_voxels, fixed.affine) @ to_voxel
    seen, counted = prepared.moving_on_grid, None
    if session.curve is not None:
        seen = recoloured(seen, session.curve)
    if prepared.masks is not None:
        of_fixed, of_moving = prepared.masks
        counted = ~(of_fixed | (warp(of_moving[..., None].astype(jnp.float32), u)[..., 0] > 0))
    told = tuple({name: value for name, value in one.items() if name != "after_mm"} for one in state.told)
    summary = session.summary
    deformed = unscaled(Deformed(
        **kept(prepared), contrast=summary["contrast"], correlation=None, seen=seen,
        channels=(prepared.fixed_on_grid[..., None], seen[..., None]), stiffness=summary["stiffness"],
        agreement=summary["agreement"], u=u, u_inverse=u_inverse, force=force, counted=counted, landmarks_told=told,
        labels_told=tuple(state.labels_told)))
    return Transferred(**kept(deformed), transform=transform, warped=state.warped, warped_labels=state.labels,
                       jacobian=state.jacobian, vectors=vectors)


def _summary(session, state, new):
    """The summary of a corrected result, from that of the result and the new numbers."""
    kept_ones = {name: value for name, value in session.summary.items() if name not in (*NEW, "made_from")}
    distrust = state.correction.distrust
    corrected = {"result": str(session.folder), "stiffness": state.correction.stiffness,
                 "distrust_voxels": 0 if distrust is None else int(distrust.sum())}
    return kept_ones | {name: new[name] for name in NEW if name in new} | {
        "corrected": corrected, "seconds": new["seconds"]}
