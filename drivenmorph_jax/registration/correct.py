"""Corrections of a finished result: a person says what is wrong at a place, and the deformation is continued there.

A correction has landmarks, pairs of labels, a mask where the images are not to be trusted, and a stiffness. Landmarks,
structures and parts of the mask that do not reach each other are places by themselves. Each is computed in a box around
it, on voxels of the working grid of Demons, see `registration.piece`. Let phi = T (id + n) be the transform of the
result, T its affine, F the fixed and M the moving image. With a mask, n is first interpolated in it from its
surroundings. Then

  n <- n o psi              psi from `demons.guided`, of landmarks, borders of structures, and the images F and M o phi
                            around them
  n <- n, interpolated in the mask again
  n <- n + w (K_s * n - n)  K_s a Gaussian of the stiffness s, w from 1 at the landmarks, borders and mask to 0
  n <- n o psi'             psi' of the landmarks of weight 1 alone, so that they hold
  n <- unfolded(n)

w = min(1, 2 K(d / g)) at the distance d, K the function of Wendland in `demons.guidance`. g is three radii of a
landmark or a border, and 20 mm of the mask. Beyond g nothing changes.

Each correction starts from the result as it was found, not from the correction before it. So a history is a list of
corrections, each of which can be computed by itself.
"""

import hashlib
import itertools
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import nibabel
import numpy as np
from scipy import ndimage

from drivenmorph_jax.demons.guidance import REGION
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.files import SUMMARY, checksum
from drivenmorph_jax.images.contrast import conditional_mean
from drivenmorph_jax.images.field_of_view import cut_faces
from drivenmorph_jax.images.intensity import foreground, normalise
from drivenmorph_jax.images.reading import Source, load_labels, load_mask
from drivenmorph_jax.images.volume import resample, same_grid, smoothed
from drivenmorph_jax.images.working_grid import coarse_factor
from drivenmorph_jax.registration import region
from drivenmorph_jax.registration.export import corrected_result
from drivenmorph_jax.registration.guide import (
    BORDER_RADIUS,
    RADIUS,
    SLACK,
    contradicting,
    overlap,
    too_far,
    warn,
    warn_of_labels,
    with_curves,
)
from drivenmorph_jax.registration.piece import AROUND, Piece, joined, joined_numbers, piece_of
from drivenmorph_jax.registration.plan import demons_grid
from drivenmorph_jax.registration.read import (
    MOST_MASKED,
    Request,
    check_labels,
    label_pairs,
    read,
    scaled,
    scaled_grid,
    within,
)
from drivenmorph_jax.registration.result import check_out, read_summary, transform_names
from drivenmorph_jax.registration.strip import stripped_by
from drivenmorph_jax.transforms.maps import Affine
from drivenmorph_jax.transforms.points import Landmarks, read_landmarks
from drivenmorph_jax.transforms.reading import BACK
from drivenmorph_jax.transforms.transform import Transform
from drivenmorph_jax.transforms.world import displacement_of, map_points, pull_back, sample

MOST_PIECES = 64  # places of corrections that are kept
NONE = Landmarks((), np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0))
FIELDS = {"itk": ".nii.gz", "ras": "_ras.nii.gz"}  # formats that keep the displacement, and the ends of their files


@dataclass(frozen=True, eq=False)
class Correction:
    """What a person asks for. All of it is in force at once: a later correction has all landmarks that are to hold."""

    landmarks: Landmarks | None = None  # RAS mm; radius in mm, nan for the default
    distrust: np.ndarray | None = None  # (X, Y, Z) bool on the grid of the fixed image: there images give no force
    stiffness: float = 0.0  # mm, standard deviation of the Gaussian that smooths the deformation; 0: as the method does
    label_pairs: tuple[tuple[int, int], ...] = ()  # (label of the fixed image, label of the moving image)


@dataclass(frozen=True, eq=False)
class State:
    """A result with a correction, or as it was found. Arrays lie on the grid of the fixed image."""

    found: tuple[np.ndarray | None, ...]  # displacement, warped image, Jacobian, warped labels as they were found
    region: tuple[slice, slice, slice]  # outside, nothing differs from `found`
    parts: tuple[np.ndarray | None, ...] | None  # the same in the region
    correction: Correction | None  # None: as it was found
    told: list  # of each landmark, as summary.json has it under "landmarks"
    labels_told: list  # of each pair of labels, as summary.json has it under "guided_labels"
    numbers: dict  # similarity_before and similarity_after in the region, fold_pct there, seconds

    @property
    def displacement(self) -> np.ndarray:
        """(X, Y, Z, 3) from the fixed to the moving world, affine and deformable, RAS mm."""
        return self._whole(0)

    @property
    def warped(self) -> np.ndarray:
        """(X, Y, Z), the whole moving image on the grid of the fixed one."""
        return self._whole(1)

    @property
    def jacobian(self) -> np.ndarray:
        """(X, Y, Z), the determinant of the total transform."""
        return self._whole(2)

    @property
    def labels(self) -> np.ndarray | None:
        """(X, Y, Z), the moving label map on the grid of the fixed image, int32; None where the result has none."""
        return self._whole(3)

    def _whole(self, k):
        if self.parts is None or self.parts[k] is None:
            return self.found[k]
        whole = self.found[k].copy()
        whole[self.region] = self.parts[k]
        return whole


class Session:
    """A finished result, opened for corrections. Lengths are those of the files.

    Raises InputError where the folder holds no result of this version, where a file of it or an image is missing, or
    where an image was changed since.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.summary = _summary(self.folder)
        self.check()
        settings, self.files = self.summary["settings"], {
            role: [one["path"] for one in files] for role, files in self.summary["inputs"].items()}
        self.transform = Transform.load(self.path(_field_names(self.summary)[0]))
        masks = {role: self.files[role][0] for role in ("fixed_mask", "moving_mask") if role in self.files}
        pair = read(Request(fixed=self.files["fixed"][0], moving=self.files["moving"][0], **masks, method="demons",
                            affine=self.transform.linear, force=settings["force"], mask_sense=settings["mask_sense"],
                            geometry=settings["geometry"]))
        self.scale = pair.scale
        self.fixed, self.moving = (scaled(image, 1 / self.scale) for image in (pair.fixed, pair.source))
        if not same_grid(self.transform.grid, self.fixed):
            raise InputError(f"{self.transform.grid.path} does not lie on the grid of {self.fixed.path}: run register "
                             "again")
        self.pair = stripped_by(pair, {role: self._brain_mask(role, pair) for role in self.summary["stripped"]})
        shape, grid, spacing = demons_grid(self.pair.fixed)
        self._pieces: dict[bytes, Piece] = {}
        self.shape, self.grid, self.spacing = shape, scaled_grid(grid, 1 / self.scale), spacing / self.scale

    def check(self):
        """Raises InputError where the result or an image is not what it was when the result was made and opened."""
        if self.summary != _summary(self.folder):
            raise InputError(f"{self.folder} holds another result than it did when it was opened: open it again")
        for role, files in self.summary["inputs"].items():
            for path, crc32 in ((one["path"], one["crc32"]) for one in files):
                if path is None:
                    raise InputError(f"{self.folder} was made from an image in memory, which a correction has to read "
                                     f"again: save the {role.replace('_', ' ')} to a file and run register with it")
                found = checksum(path.removesuffix(BACK))
                if found is None:
                    raise InputError(f"{path}, which {self.folder / SUMMARY} names, cannot be read: put it back, or "
                                     "start from the folder where register was run")
                if found != crc32:
                    raise InputError(f"{path} was changed since {self.folder} was made from it: put the former file "
                                     "back, or run register again")

    def path(self, name):
        """The path of a file of the result. Raises InputError where it is missing."""
        if not (self.folder / name).is_file():
            raise InputError(f"{self.folder} has no {name}, which belongs to its result: run register again")
        return self.folder / name

    def _brain_mask(self, role, pair):
        """The mask of a brain that register found."""
        image = getattr(pair, role)
        return scaled(load_mask(self.path(f"{role}_brain.nii.gz"), scaled(image, 1 / self.scale)), self.scale)

    @cached_property
    def first(self) -> State:
        """The result as it was found."""
        names = {"warped.nii.gz": np.float32, "jacobian.nii.gz": np.float32}
        if self.labels is not None:
            names["warped_labels.nii.gz"] = np.int32
        found = [self.transform.displacement]
        for name, kind in names.items():
            found.append(np.asarray(nibabel.load(self.path(name)).dataobj, kind))
            if found[-1].shape != self.fixed.data.shape:
                raise InputError(f"{self.folder / name} does not lie on the grid of {self.fixed.path}: run register "
                                 "again")
        found += [None] * (4 - len(found))
        told = (self.summary.get(name, []) for name in ("landmarks", "guided_labels"))
        return State(tuple(found), region.NOWHERE, None, None, *told, {})

    @cached_property
    def labels(self):
        """The label map of the moving image as a Volume, or None."""
        return self._labels("moving")

    @cached_property
    def fixed_labels(self):
        """The label map of the fixed image as a Volume, or None."""
        return self._labels("fixed")

    def _labels(self, role):
        path = self.files.get(f"{role}_labels")
        return path and load_labels(path[0], getattr(self, role), self.summary["settings"]["geometry"])

    @cached_property
    def identity(self) -> int:
        """The CRC-32 of the displacement, by which a history knows its result."""
        return zlib.crc32(np.ascontiguousarray(self.transform.displacement))

    @property
    def inverse_displacement(self):
        """The displacement of the inverse as it was found, on the grid of the moving image, RAS mm."""
        found = Transform.load(self.path(_field_names(self.summary)[1]))
        if not same_grid(found.grid, self.moving):
            raise InputError(f"{found.grid.path} does not lie on the grid of {self.moving.path}: run register again")
        return found.displacement

    # What corrections have in common, computed when the first one needs it.

    @cached_property
    def images(self):
        """The brains of the fixed and the moving image as Volumes, smoothed for the working grid, values in [0, 1]."""
        spacing = self.spacing * self.scale
        return tuple(scaled(replace(one, data=normalise(smoothed(one, spacing).data)), 1 / self.scale)
                     for one in (self.pair.fixed, self.pair.moving))

    @cached_property
    def masks(self):
        """The Volumes that are above 0 where the fixed and the moving image do not count, or None."""
        return tuple(one and scaled(one, 1 / self.scale) for one in (self.pair.fixed_mask, self.pair.moving_mask))

    @cached_property
    def cut(self):
        """Of the two images, whether tissue is cut at a face of the grid."""
        return [np.isfinite(cut_faces(one)).any() for one in (self.pair.fixed, self.pair.moving)]

    @cached_property
    def brain(self):
        """The voxels of the fixed brain, bool."""
        return foreground(self.pair.fixed.data)

    @cached_property
    def curve(self):
        """For images of different contrast: the values of the fixed image for those of the moving one; else None."""
        if self.summary["contrast"] == "same":
            return None
        coarser = coarse_factor(self.spacing * self.scale)
        shape, grid = [n // coarser for n in self.shape], self.grid @ np.diag([coarser] * 3 + [1])
        way = displacement_of(self.transform.map, shape, grid)
        mask = self.masks[0]
        return conditional_mean(resample(self.images[0], shape, grid), pull_back(self.images[1], way, grid),
                                None if mask is None else 1.0 - (resample(mask, shape, grid, order=0) > 0))

    # A correction.

    def correction(self, landmarks: str | Path | None = None, distrust: Source | None = None, stiffness: float = 0.0,
                   guide_labels: Sequence[str | int] = ()) -> Correction:
        """The `Correction` of a table of landmarks and of a mask on the grid of the fixed image, as files, and of pairs
        of labels such as 17 or "10=49".

        Curves of the table become landmarks along them.

        Raises InputError where a file or a label cannot be used.
        """
        mask = None if distrust is None else load_mask(distrust, self.fixed, self.summary["settings"]["geometry"])
        return Correction(None if landmarks is None else self._with_curves(read_landmarks(landmarks)),
                          None if mask is None else mask.data > 0, stiffness, label_pairs(guide_labels))

    def _with_curves(self, marks):
        way = Affine(self.transform.linear)
        within(marks, {"fixed": self.fixed, "moving": self.moving})
        return with_curves(marks, lambda x: way.inverse(moved(self.first.displacement, self.fixed, x)), way,
                           RADIUS / self.scale)

    def corrected(self, correction: Correction, progress: Callable[[str, float], None] | None = None) -> State:
        """The result with a correction. It starts from the result as it was found.

        Args:
          correction: the `Correction`.
          progress: function of what is done next, in words, and of the share of the work that is done.

        Raises InputError where nothing is asked for, where a landmark lies outside its image, where a label map is
        missing or lacks a label, or where the mask lies on another grid or leaves out most of the brain. A landmark or
        a pair of labels that contradicts another or is out of reach is left out, with a warning.
        """
        began, tell = time.perf_counter(), progress or _silent
        self.check()
        self._checked(correction)
        tell("read", 0.0)
        first, marks = self.first, correction.landmarks or NONE
        ways = np.linalg.inv(self.grid), np.linalg.inv(self.grid) @ np.linalg.inv(self.transform.linear)
        points, targets = (map_points(way, x) for way, x in zip(ways, (marks.fixed, marks.moving), strict=True))
        lacked = np.linalg.norm(moved(first.displacement, self.fixed, marks.fixed) - marks.moving, axis=-1)
        radius = np.where(np.isnan(marks.radius), RADIUS / self.scale, marks.radius)
        weight = np.ones(len(points)) if marks.weight is None else marks.weight
        left_out = contradicting(marks.names, points, targets, lacked / weight, SLACK / self.scale / self.spacing)
        used, pieces = np.array([k for k in range(len(points)) if k not in left_out], int), []
        pairs, labels_left_out = correction.label_pairs, {}
        places = list(self._places(points[used], radius[used] / self.spacing, correction.distrust, pairs))
        for number, (box, some, mask, lines) in enumerate(places):
            def told(words, share, number=number):
                tell(words, (number + share) / len(places))

            some = used[some]
            pieces.append(self._piece(box, points[some], targets[some], radius[some] / self.spacing, weight[some], mask,
                                      [pairs[k] for k in lines], correction.stiffness / self.spacing, told))
            left_out |= too_far(some[pieces[-1].far], lacked, radius)
            labels_left_out |= {lines[k]: why for k, why in pieces[-1].labels_left_out.items()}
        state = State(first.found, *joined(pieces, first.found), correction, [], [], joined_numbers(pieces))
        warn(marks.names, left_out)
        warn_of_labels(pairs, labels_left_out)
        after = np.linalg.norm(moved(state.displacement, self.fixed, marks.fixed) - marks.moving, axis=-1)
        told = [{"name": name, "fixed": marks.fixed[k].tolist(), "weight": float(weight[k]),
                 "before_mm": float(lacked[k]), "after_mm": float(after[k]), "left_out": left_out.get(k)}
                for k, name in enumerate(marks.names)]
        labels_told = [{"fixed": a, "moving": b, **{
            f"dice_{when}": overlap(self.fixed_labels.data == a, one.labels == b)
            for when, one in (("before", first), ("after", state))}, "left_out": labels_left_out.get(k)}
            for k, (a, b) in enumerate(pairs)]
        return replace(state, told=told, labels_told=labels_told,
                       numbers=state.numbers | {"seconds": time.perf_counter() - began})

    def _places(self, points, radius, distrust, pairs):
        """The places of a correction that do not reach each other, as (box, indices of landmarks, mask or None, indices
        of pairs of labels).

        Points and radii are in voxels of the working grid.
        """
        low, high, reach = [points], [points], [REGION * radius]
        way = np.linalg.inv(self.grid) @ self.fixed.affine

        def add(part, mm):
            corners = map_points(way, np.array(list(itertools.product(*((s.start, s.stop - 1) for s in part)))))
            low.append(corners.min(0)[None])
            high.append(corners.max(0)[None])
            reach.append([mm / self.scale / self.spacing])

        for number, _ in pairs:
            part, = ndimage.find_objects((self.fixed_labels.data == number).astype(np.uint8))
            add(part, REGION * BORDER_RADIUS)
        if distrust is not None:
            labels, _ = ndimage.label(distrust, np.ones((3, 3, 3)))
            for part in ndimage.find_objects(labels):
                add(part, AROUND)
        low, high, reach = map(np.concatenate, (low, high, reach))
        apart = region.APART * max(1.0, self.fixed.spacing.max() / self.spacing)
        for some in region.reaching(low, high, reach, apart):
            wide = reach[some, None]
            marks, lines, parts = np.split(some, np.searchsorted(some, (len(points), len(points) + len(pairs))))
            yield (region.box_around((low[some] - wide).min(0), (high[some] + wide).max(0), self.grid), marks,
                   np.isin(labels, parts - len(points) - len(pairs) + 1) if len(parts) else None,
                   (lines - len(points)).tolist())

    def _piece(self, box, points, targets, radius, weight, mask, pairs, stiffness, tell):
        """The `Piece` of a place. It is kept: of many places, a correction after it mostly changes one."""
        asked = [np.array([*box.shape, len(points), stiffness]), box.affine, points, targets, radius, weight,
                 np.array(pairs)]
        key = hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in [
            *asked, np.zeros(0) if mask is None else np.packbits(mask)])).digest()
        if key not in self._pieces:
            while len(self._pieces) >= MOST_PIECES:
                self._pieces.pop(next(iter(self._pieces)))
            self._pieces[key] = piece_of(self, box, points, targets, radius, weight, mask, pairs, stiffness, tell)
        return self._pieces[key]

    def warm(self) -> None:
        """Compile what a correction of usual size needs, by one that changes nothing. It can run in a thread."""
        middle = np.argwhere(self.brain).mean(0).round().astype(int)
        point = map_points(self.fixed.affine, middle[None])
        mask = np.zeros(self.fixed.data.shape, bool)
        mask[tuple(middle)] = True
        there = moved(self.first.displacement, self.fixed, point)
        with suppress(InputError):  # where the middle has no partner
            self.corrected(Correction(Landmarks(("middle",), point, there, np.array([np.nan])), mask, 1.0))

    def save(self, history, out: str | Path, progress: Callable[[str, float], None] | None = None) -> None:
        """Write all files of the correction that is in force in a `History`, as register writes them, and the history.

        They replace those of an earlier result in the folder `out` as a whole, as in `Result.save`. The formats and the
        names of the transforms are those of the result. `progress` is that of `corrected`.

        Raises InputError where no correction is in force, where a file cannot be read any more or written, or where
        `out` is the folder of the result.
        """
        self.check()
        self.check_out(out)
        if history.current is None:
            raise InputError("no correction is in force, so that there is nothing to write: make one, or redo it")
        tell = progress or _silent
        state = history.current.state or self.corrected(history.current.correction, tell)
        tell("inverse, score and check", 0.0)
        result = corrected_result(self, state)
        tell("write", 0.7)
        result.save(out, self.summary["formats"], self.summary["bids"], replace(history, draft=None).write)

    def check_out(self, out):
        """Raises InputError where a corrected result cannot be written to the folder `out`."""
        if Path(out).resolve() == self.folder.resolve():
            raise InputError(f"{out} is the folder of the result, from which its corrections start: give another --out")
        check_out(out, ())

    @property
    def force(self):
        """The name of the force of the images."""
        return self.summary["settings"]["force"] if self.summary["method"] == "demons" else "lncc"

    def _checked(self, correction):
        """Raises InputError where a correction cannot be made."""
        marks, mask = correction.landmarks, correction.distrust
        if (marks is None or not marks.names) and (mask is None or not mask.any()) and not correction.label_pairs:
            raise InputError("the correction asks for nothing: give landmarks, pairs of labels, or a mask of where not "
                             "to trust the images; the stiffness alone has no place")
        if marks is not None:
            within(marks, {"fixed": self.fixed, "moving": self.moving})
        if correction.label_pairs:
            check_labels(correction.label_pairs, {"fixed_labels": self.fixed_labels, "moving_labels": self.labels})
        if mask is not None:
            if mask.shape != self.fixed.data.shape:
                raise InputError(f"the mask of where not to trust the images has {mask.shape} voxels, not those of "
                                 f"{self.fixed.path}, {self.fixed.data.shape}: give one on the grid of that image")
            share = np.mean(mask[self.brain])
            if share > MOST_MASKED:
                raise InputError(f"the mask of where not to trust the images holds {share:.0%} of the brain, which "
                                 "leaves too little to go by: make it smaller")


def _silent(words, share):
    """The progress that nobody wants to see."""


def moved(displacement, grid, points):
    """Points (N, 3) of the fixed world in the moving one, by a displacement (X, Y, Z, 3) on the grid of a Volume."""
    return points + sample(np.moveaxis(displacement, -1, 0), map_points(np.linalg.inv(grid.affine), points))


def _summary(folder):
    """The content of summary.json of a result. Raises InputError where there is none that can be corrected."""
    found = read_summary(folder)
    if "inputs" not in found:
        raise InputError(f"{folder} was made by an earlier version, which did not keep what a correction needs: run "
                         "register again")
    return found


def _field_names(summary):
    """The names of the files of the transform and its inverse. Raises InputError where no format of theirs keeps it."""
    for form, end in FIELDS.items():
        if form in summary["formats"]:
            return [name + end for name in transform_names(summary["bids"])]
    raise InputError(f"{SUMMARY} says that the transform was written as {', '.join(summary['formats'])} only: run "
                     "register again, with itk among its --formats")
