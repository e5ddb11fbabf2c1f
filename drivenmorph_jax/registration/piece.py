"""One place of a correction: its images and its deformation in a box of voxels, and what of the result it changes.

The formulas are in `registration.correct`.
"""

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from drivenmorph_jax import demons
from drivenmorph_jax.demons.guidance import FARTHEST, REGION, STRIDE, driven_by_images, kernel, softly
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.fields.grid import inside, widened
from drivenmorph_jax.fields.inverse import inverse_at
from drivenmorph_jax.fields.smooth import gaussian_smooth
from drivenmorph_jax.fields.unfold import REACH, unfolded
from drivenmorph_jax.fields.warp import compose
from drivenmorph_jax.images.contrast import recoloured
from drivenmorph_jax.images.field_of_view import beyond
from drivenmorph_jax.images.intensity import background
from drivenmorph_jax.images.masks import fill
from drivenmorph_jax.images.volume import affine_of_part, resample
from drivenmorph_jax.registration import region
from drivenmorph_jax.registration.align import RIM
from drivenmorph_jax.registration.guide import BORDER_RADIUS, ITERATIONS, labels_left_out
from drivenmorph_jax.registration.read import scaled
from drivenmorph_jax.registration.score import similarity
from drivenmorph_jax.transforms.world import (
    followed_by,
    jacobian_determinant_of_displacement,
    map_points,
    pull_back,
    unfolded_part,
    without_affine,
)

AROUND = 20.0  # mm around a mask, within which images drive the deformation again
PLACES = 8  # landmarks are filled up to a multiple of it, since each number of them is compiled for once
AWAY = -1000.0  # voxels; where those that fill up lie, out of reach of all others


@dataclass(frozen=True, eq=False)
class Piece:
    """What a correction changes at one place."""

    far: np.ndarray  # (N,) bool, the landmarks that are out of reach
    labels_left_out: dict  # {index of a pair of labels: why it is left out}
    region: tuple[slice, slice, slice] = region.NOWHERE  # on the fixed grid
    changed: tuple[np.ndarray, ...] = ()  # where in the region the arrays below replace those of the result, bool
    parts: tuple[np.ndarray | None, ...] = ()  # displacement, warped image, Jacobian and warped labels there
    counted: float = 0.0  # voxels over which the similarities are means
    similarities: tuple[float, float] = (0.0, 0.0)  # before and after
    folded: tuple[int, int] = (0, 0)  # voxels of the brain in the region: those that fold, and all


def piece_of(session, box, points, targets, radius, weight, mask, pairs, stiffness, tell) -> Piece:
    """Compute the `Piece` of a box. Points (N, 3), radii (N,) and the stiffness are in voxels of the working grid, the
    mask (X, Y, Z) is on the fixed grid, or None. `pairs` are those of labels whose structures lie in the box."""
    tell("images", 0.0)
    work = _Work(session, box, mask)
    to_box = np.linalg.inv(box.affine) @ session.grid
    far = work.placed(*(map_points(to_box, x) for x in (points, targets)), radius, weight)
    left_out = work.bordered(pairs) if pairs else {}
    if far.all() and mask is None and work.borders is None:
        return Piece(far, left_out)
    tell("deform", 0.15)
    n = work.deformed(0 if session.summary["stiffness"] == "high" else ITERATIONS, session.force, stiffness)
    tell("warp", 0.7)
    piece = _pasted(session, box, np.asarray(n - work.n), Piece(far, left_out))
    tell("measure", 0.9)
    return replace(piece, **work.numbers(n, piece))


def joined(pieces, found):
    """(region, parts) of a `State` from the pieces of its places; `found` are the arrays of the result."""
    pieces = [one for one in pieces if one.parts]
    if not pieces:
        return region.NOWHERE, None
    whole = tuple(slice(min(s.start for s in sides), max(s.stop for s in sides))
                  for sides in zip(*(one.region for one in pieces), strict=True))
    parts = [None if x is None else x[whole].copy() for x in found]
    for one in pieces:
        where = inside(one.region, whole)
        for part, changed, new in zip(parts, one.changed, one.parts, strict=True):
            if part is not None:
                part[where][changed] = new[changed]
    return whole, tuple(parts)


def joined_numbers(pieces):
    """The numbers of a `State` from those of the pieces of its places."""
    counted = sum(one.counted for one in pieces)
    folded, voxels = np.sum([(0, 0), *(one.folded for one in pieces)], 0)
    numbers = {"fold_pct": float(100 * folded / max(voxels, 1))}
    if counted:
        means = np.sum([one.counted * np.array(one.similarities) for one in pieces], 0) / counted
        numbers |= dict(zip(("similarity_before", "similarity_after"), map(float, means), strict=True))
    return numbers


def _pasted(session, box, move, piece):
    """The `Piece` whose transform is T (id + n + move), with `move` in voxels of the box."""
    shape, affine, linear = session.fixed.data.shape, session.fixed.affine, session.transform.linear
    part = region.part_within(box, shape, affine)
    shift = region.on_part(move, box, part, affine)
    core = region.bounds(shift.any(-1), part)
    if core is region.NOWHERE:
        return piece
    displacement, _, _, labels = session.first.found
    wide = widened(core, shape, 2 + REACH)  # the Jacobian sees a voxel further, and unfolding as far as it reaches
    added = shift[inside(core, part)] @ linear[:3, :3].T.astype(np.float32)

    def shifted(far):
        found = displacement[far].copy()
        found[inside(core, far)] += added
        return found

    there, placed = unfolded_part(shifted, wide, shape, affine, linear), affine_of_part(affine, wide)
    changed = (there != displacement[wide]).any(-1)
    near = ndimage.binary_dilation(changed, np.ones((3, 3, 3)))
    return replace(piece, region=wide, changed=(changed, changed, near, changed), parts=(
        there, pull_back(session.moving, there, placed, outside=background(session.moving.data)),
        jacobian_determinant_of_displacement(there, placed),
        None if labels is None else pull_back(session.labels, there, placed, "nearest")))


class _Work:
    """A correction in its box. Images are (D, H, W, 1), fields (D, H, W, 3) in voxels of the box."""

    def __init__(self, session, box, mask):
        self.session, self.box, self.borders = session, box, None
        self.n = self._found()
        self.mask = None
        if mask is not None:
            volume = replace(session.fixed, data=mask.astype(np.uint8))
            self.mask = jnp.asarray(resample(volume, box.shape, box.affine, order=0) > 0)[..., None]
        self.start = self.n if self.mask is None else unfolded(fill(self.n, self.mask))
        self.images, self.weights = self._prepared()

    def _found(self):
        """n of the transform that was found."""
        fixed, box, linear = self.session.fixed, self.box, self.session.transform.linear
        part = region.part_within(box, fixed.data.shape, fixed.affine)
        affine = affine_of_part(fixed.affine, part)
        n = without_affine(self.session.transform.displacement[part], affine, linear)
        return jnp.asarray(region.on_box(n @ np.linalg.inv(box.affine[:3, :3]).T.astype(np.float32), affine, box))

    def way(self, n):
        """The displacement T (x + n) - x at the voxels of the box, RAS mm."""
        vectors, linear = np.asarray(n) @ self.box.affine[:3, :3].T.astype(np.float32), self.session.transform.linear
        return followed_by(linear, vectors, self.box.affine)

    def _prepared(self):
        """((F, M o phi), their weights), where phi is that of `start`."""
        session, box, way = self.session, self.box, self.way(self.start)
        (fixed, moving), (fixed_mask, moving_mask) = session.images, session.masks
        images = [resample(fixed, box.shape, box.affine), pull_back(moving, way, box.affine)]
        images = [jnp.asarray(x)[..., None] for x in images]
        if session.curve is not None:
            images[1] = recoloured(images[1], session.curve)
        nowhere = jnp.zeros((*box.shape, 1), bool)
        outs = [nowhere if self.mask is None else self.mask, nowhere]
        if fixed_mask is not None:
            outs[0] |= resample(fixed_mask, box.shape, box.affine, order=0)[..., None] > 0
        if moving_mask is not None:
            outs[1] |= pull_back(moving_mask, way, box.affine, "nearest")[..., None] > 0
        images = [fill(x, out) if out.any() else x for x, out in zip(images, outs, strict=True)]
        for k, cut in enumerate(session.cut):
            if cut:
                volume = scaled((session.pair.fixed, session.pair.moving)[k], 1 / session.scale)
                outs[k] |= beyond(volume, box.shape, box.affine, (None, session.transform.linear)[k],
                                  RIM / session.scale)[1][..., None]
        return images, tuple(1.0 - out for out in outs)

    def placed(self, points, targets, radius, weight):
        """Place landmarks, in voxels of the box; returns which of them are out of reach (N,) bool. They are not used.

        Landmarks AWAY, which want nothing, fill them up.
        """
        more = max(-(-len(points) // PLACES), 1) * PLACES - len(points)
        away = np.full((more, 3), AWAY)
        points, targets = np.concatenate([points, away]), np.concatenate([targets, away + self.start[0, 0, 0]])
        radius = np.concatenate([radius, np.full(more, radius.mean() if len(radius) else PLACES)])
        weight = np.concatenate([weight, np.ones(more)])
        between, found = (np.array(x) for x in inverse_at(self.start, *(jnp.asarray(x, jnp.float32) for x in (
            targets, points)), 100))
        far = ~found | (np.linalg.norm(between - points, axis=-1) > FARTHEST * radius)
        points[far], between[far], targets[far] = AWAY, AWAY, AWAY + np.asarray(self.start[0, 0, 0])
        self.points, self.between, self.targets, self.radius, self.trust = (
            jnp.asarray(x, jnp.float32) for x in (points, between, targets, radius, weight))
        return far[:len(far) - more]

    def bordered(self, pairs):
        """Take the borders of pairs of labels; returns those that are left out, {index: why}.

        Raises InputError where a structure of the fixed image is too small for the voxels of the box.
        """
        session, box, way, found = self.session, self.box, self.way(self.start), ([], [])
        for fixed, moving in pairs:
            volume = replace(session.fixed_labels, data=(session.fixed_labels.data == fixed).astype(np.float32))
            inside = resample(volume, box.shape, box.affine) > 0.5
            if not inside.any():
                raise InputError(f"label {fixed} of {volume.path} fills no voxel of {session.spacing:.2g} mm: leave it "
                                 "out")
            volume = replace(session.labels, data=(session.labels.data == moving).astype(np.float32))
            found[0].append(demons.signed_distance(inside))
            partner = pull_back(volume, way, box.affine) > 0.5
            found[1].append(demons.signed_distance(partner) if partner.any() else np.full(box.shape, -AWAY, np.float32))
        found = [np.stack(some, -1) for some in found]
        left_out = labels_left_out(pairs, *found, session.spacing, session.scale)
        used = [k for k in range(len(pairs)) if k not in left_out]
        if used:
            self.borders = tuple(jnp.asarray(x[..., used]) for x in found)
        return left_out

    def deformed(self, iterations, force, stiffness):
        """n with the correction. `stiffness` is in voxels."""
        weight = self.around = self._around()
        psi = demons.guided(*self.images, jnp.zeros_like(self.n), self.points, self.between, self.radius,
                            iterations=iterations, force=force, weights=self.weights, around=self.around,
                            trust=self.trust, borders=self.borders, border_radius=self._lengths(BORDER_RADIUS))
        n = compose(self.start, psi)
        if self.mask is not None:
            n = fill(n, self.mask)
        if stiffness:
            n = n + weight * (gaussian_smooth(n, stiffness) - n)
        targets = softly(n, self.points, self.targets, self.trust)
        return demons.guided(*self.images, n, self.points, targets, self.radius, iterations=0, force=force,
                             weights=self.weights)

    def _lengths(self, mm):
        """A length of the registration in voxels of the box."""
        return mm / self.session.scale / self.session.spacing

    def _around(self):
        """w: how much images drive each voxel. It ends a voxel of `guided` sooner, which samples linearly."""
        weight, others = driven_by_images(self.box.shape, self.points, REGION * self.radius - STRIDE), []
        if self.borders is not None:
            others.append((jnp.abs(self.borders[0]).min(-1), REGION * BORDER_RADIUS))
        if self.mask is not None:
            far = ndimage.distance_transform_edt(~np.asarray(self.mask[..., 0]))
            others.append((jnp.asarray(far, jnp.float32), AROUND))
        for far, mm in others:
            near = kernel(far / max(self._lengths(mm) - STRIDE, 1))
            weight = jnp.maximum(weight, jnp.minimum(1, 2 * near)[..., None])
        return weight

    def numbers(self, n, piece):
        """The numbers of a `Piece` whose deformation is n, by their names there."""
        session = self.session
        counted = (self.around * self.weights[0] * self.weights[1])[..., 0] > 0
        after = jnp.asarray(pull_back(session.images[1], self.way(n), self.box.affine))
        if session.curve is not None:
            after = recoloured(after, session.curve)
        fixed, before = (x[..., 0] for x in self.images)
        brain = session.brain[piece.region]
        folded = piece.parts[2][brain] <= 0 if piece.parts else brain
        return {"counted": float(counted.sum()), "folded": (int(folded.sum()), int(brain.sum())),
                "similarities": tuple(similarity(fixed, image, counted) for image in (before, after))}
