"""Stage 9: named checks, each with its value, its limit and one sentence. They find registrations that went wrong.

A similarity that rises proves nothing: it also rises for noise, for a mirrored brain and for half a brain. The checks
measure what a registration of two brains keeps to. The limits are those of `benchmarks/checks.py`, whose table is in
docs/checks.md.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from scipy import linalg, ndimage

from drivenmorph_jax import demons
from drivenmorph_jax.evaluation import metrics
from drivenmorph_jax.fields.grid import padded_pool
from drivenmorph_jax.fields.jacobian import determinant_by_slabs
from drivenmorph_jax.images.geometry import disagreement
from drivenmorph_jax.images.intensity import foreground
from drivenmorph_jax.images.working_grid import coarse_factor
from drivenmorph_jax.network.losses import lncc
from drivenmorph_jax.registration.read import kept, millilitres
from drivenmorph_jax.registration.score import Scored
from drivenmorph_jax.registration.sides import alike
from drivenmorph_jax.runtime.stored import stored
from drivenmorph_jax.transforms.affine import metric_between

WINDOW = 7  # side of the boxes of local correlation, in the voxels of 2 mm on which the checks register once more


@dataclass(frozen=True)
class Check:
    """One check. It warns where `value` lies outside `limits`, or where it is no number."""

    name: str
    value: float
    limits: tuple[float, float]
    sentence: str  # what the value is, and what it means outside the limits

    @property
    def ok(self):
        """Whether the value is a number within the limits."""
        return self.limits[0] <= self.value <= self.limits[1]

    def as_dict(self):
        """The check as it stands in summary.json."""
        low, high = (None if np.isinf(limit) else limit for limit in self.limits)
        return {"name": self.name, "value": self.value, "limits": [low, high], "status": "ok" if self.ok else "warn",
                "sentence": self.sentence}


LIMITS = {  # name: (least value, largest value, sentence)
    "geometry": (0, 0, "Files whose place in the world other tools see differently."),
    "affine scale": (0, 0.3, "Largest stretch or shrinking by the affine along a direction, as a logarithm."),
    "affine shape": (0, 0.2, "Difference of these logarithms along two directions; heads differ by less."),
    "affine rotation": (0, 35, "Degrees by which the affine turns; heads lie nearly alike in a scanner."),
    "affine gain": (-0.05, np.inf, "Mutual information after the affine less that in the files' own world."),
    "size of fixed": (700, 2200, "Foreground of the fixed image in ml; a brain has 800 to 1900, a head more."),
    "size of moving": (700, 2200, "Foreground of the moving image in ml; a brain has 800 to 1900, a head more."),
    "field of view": (0, 0.05, "Share of one brain outside the field of view of the other image, after the affine."),
    "overlap": (0.9, 1, "Dice of the foregrounds after the affine."),
    "similarity": (0.3, 1, "Local correlation after the registration, at 2 mm."),
    "gain": (0, 1, "Its rise by the deformation."),
    "sides": (-0.05, np.inf, "Whether both brains have the same asymmetry; below, left and right may be exchanged."),
    "agreement": (0, 4, "Mean distance in mm between the deformation and that of a short run of Demons."),
    "brightness": (0, 0.2, "Deviation of the logarithm of smoothed brightness after the registration; bias raises it."),
    "stretch": (0, 7, "Range of log J of the deformation, from .1 to 99.9 %; brains differ by less."),
    "inverse": (0, 0.5, "Inverse consistency in mm."),
    "landmarks": (0, 0.5, "Largest distance in mm of a landmark of weight 1 from its place in the moving image."),
    "landmarks left out": (0, 0, "Landmarks that contradict others or are too far for their radius."),
    "guided labels": (0.7, 1, "Least Dice of a pair of labels of --guide_labels; 0 where one was left out."),
    "slices": (0, 0.05, "Share of slices that equal the one before."),
    "flatness": (0, 0.5, "Share of neighbouring voxels with one value; above it, a label map was given as an image."),
}


OF_DEFORMATION = "similarity", "gain", "agreement", "brightness", "stretch", "inverse"
OF_GUIDANCE = "landmarks", "landmarks left out", "guided labels"


@dataclass(frozen=True, eq=False, kw_only=True)
class Checked(Scored):
    """A scored registration and its checks."""

    checks: tuple[Check, ...]


def check(scored: Scored) -> Checked:
    """Run all checks. Those that make no sense for a registration, such as the affine's without one, are left out."""
    brains = tuple(foreground(image.data) for image in (scored.fixed, scored.moving))
    with ThreadPoolExecutor() as pool:  # most of each takes one core
        parts = [pool.submit(_files, scored, brains), pool.submit(_affine, scored),
                 pool.submit(_images, scored, brains), pool.submit(_deformation, scored)]
    values = {**_landmarks(scored.summary.get("landmarks", ())), **_labels(scored.summary.get("guided_labels", ()))}
    values |= {name: value for part in parts for name, value in part.result().items()}
    checks = tuple(Check(name, float(values[name]), LIMITS[name][:2], LIMITS[name][2])
                   for name in LIMITS if name in values)
    summary = scored.summary | {"checks": [one.as_dict() for one in checks]}
    return Checked(**kept(replace(scored, summary=summary)), checks=checks)


def _files(scored, brains):
    """Checks of the two files; `brains` are the foregrounds of fixed and moving."""
    used = scored.request.geometry if scored.request.geometry == "qform" else "sform"
    images = scored.fixed, scored.moving
    values = {"geometry": sum(bool(disagreement(x.header, x.data.shape, x.path, used)) for x in images)}
    if scored.scale == 1:
        values |= {f"size of {role}": millilitres(inside, image.affine)
                   for role, image, inside in zip(("fixed", "moving"), images, brains, strict=True)}
    slices, flat = np.max([_equal(image.data, inside) for image, inside in zip(images, brains, strict=True)], axis=0)
    return values | {"slices": slices, "flatness": flat}


def _equal(data, inside):
    """(largest share, over the axes, of slices with foreground that equal the slice before; share of neighbours along
    the first axis, both in the foreground, that have one value)."""
    slices = []
    for axis in range(3):
        x, brain = (np.moveaxis(array, axis, 0) for array in (data, inside))
        same, full = x[1:] == x[:-1], brain[1:].any((1, 2))
        slices.append((same.all((1, 2)) & full).sum() / max(full.sum(), 1))
        if axis == 0:
            both = brain[1:] & brain[:-1]
            neighbours = (both & same).sum() / max(both.sum(), 1)
    return max(slices), neighbours


def _affine(scored):
    """Checks of the affine."""
    linear = scored.affine[:3, :3]
    turn, stretch = linalg.polar(linear)
    logs = np.log(np.maximum(linalg.eigvalsh(stretch), 1e-6))
    values = {"affine scale": np.abs(logs).max(), "affine shape": np.ptp(logs),
              "affine rotation": np.rad2deg(np.arccos(np.clip((np.trace(turn) - 1) / 2, -1, 1)))}
    if isinstance(scored.given_affine, str) and scored.given_affine != "none" and scored.scale == 1:
        found, start = metric_between(scored.fixed, scored.moving, (scored.affine, np.eye(4)))
        values["affine gain"] = found - start
    return values


def _images(scored, brains):
    """Checks of how the two images fit after the affine; `brains` are their foregrounds."""
    there = _share_outside(brains[0], scored.fixed, scored.moving, scored.affine)
    back = _share_outside(brains[1], scored.moving, scored.fixed, np.linalg.inv(scored.affine))
    counted = True if scored.counted is None else np.asarray(scored.counted)
    fixed, moving = (metrics.brain(foreground(np.asarray(x))) & counted
                     for x in (scored.fixed_on_grid, scored.moving_on_grid))
    return {"field of view": max(there, back), "overlap": 2 * (fixed & moving).sum() / (fixed.sum() + moving.sum()),
            "sides": alike(scored.fixed_on_grid, scored.seen)}


def _share_outside(brain, image, other, transform):
    """The share of `brain`, the foreground of `image`, that `transform` maps out of the grid of `other`."""
    points = np.argwhere(brain[::2, ::2, ::2]) * 2
    to_other = np.linalg.inv(other.affine) @ transform @ image.affine
    places = points @ to_other[:3, :3].T + to_other[:3, 3]
    return np.mean(((places < -0.5) | (places > np.array(other.data.shape) - 0.5)).any(1))


def _deformation(scored):
    """Checks of the deformation."""
    determinant = determinant_by_slabs(np.asarray(scored.u))[metrics.brain(np.asarray(scored.fixed_on_grid))]
    low, high = np.percentile(np.log(np.maximum(determinant, 1e-9)), (0.1, 99.9))
    factor = coarse_factor(scored.spacing * scored.scale)
    f, m, w = (_coarse(x, factor) for x in (scored.fixed_on_grid, scored.seen, scored.matched))
    before, after = float(_lncc(f, m)), float(_lncc(f, w))
    values = {"stretch": high - low, "inverse": scored.summary["inverse_mm"] * scored.scale, "similarity": after,
              "gain": after - before}
    again = _registered(f, m)
    apart = np.linalg.norm(np.asarray(_coarse(scored.u, factor) / factor - again), axis=-1)  # in coarse voxels
    brain = np.asarray(f[..., 0]) > 0
    if scored.counted is not None:
        brain &= np.asarray(_coarse(scored.counted.astype(np.float32), factor)[..., 0]) > 0.99
    distance = apart[brain].mean() * factor * scored.spacing * scored.scale
    return values | {"agreement": distance, "brightness": _brightness(np.asarray(f[..., 0]), np.asarray(w[..., 0]))}


def after_correction(checks, landmarks, labels):
    """Checks as summary.json has them, once a result was corrected: those of the landmarks and the pairs of labels are
    measured again, the first one with "place", the landmark that is furthest from its place. What the deformation
    changes beside them gets "found": True, and is measured when the correction is written. `landmarks` and `labels` are
    told as summary.json tells them."""
    values = {**_landmarks(landmarks), **_labels(labels)}
    kept_ones = [one | {"found": True} if one["name"] in OF_DEFORMATION else one for one in checks
                 if one["name"] not in OF_GUIDANCE]
    new = [Check(name, float(values[name]), LIMITS[name][:2], LIMITS[name][2]).as_dict()
           for name in OF_GUIDANCE if name in values]
    for one in new:
        if one["name"] == "landmarks":
            one["place"] = next(mark["fixed"] for mark in landmarks if mark["after_mm"] == one["value"])
    return kept_ones + new


def _landmarks(told):
    """Checks of the landmarks, as summary.json tells them."""
    if not told:
        return {}
    used = [one for one in told if one["left_out"] is None]
    held = [one["after_mm"] for one in used if one["weight"] == 1]
    return {"landmarks left out": len(told) - len(used)} | ({"landmarks": max(held)} if held else {})


def _labels(told):
    """The check of the pairs of labels, as summary.json tells them."""
    return {"guided labels": min(one["dice_after"] if one["left_out"] is None else 0 for one in told)} if told else {}


def _brightness(fixed, warped):
    """The standard deviation of log(warped / fixed) within the brain, after a Gaussian of 5 voxels."""
    inside = (fixed > 0.05) & (warped > 0.05)
    ratio = np.where(inside, np.log(np.where(inside, warped, 1) / np.where(inside, fixed, 1)), 0)
    smooth = ndimage.gaussian_filter(ratio, 5) / np.maximum(ndimage.gaussian_filter(inside.astype(np.float32), 5), 1e-3)
    return smooth[inside].std()


def _coarse(x, factor):
    """An image (D, H, W) or field (D, H, W, 3) on voxels `factor` times as large, with sides that Demons takes."""
    return _pooled(x[..., None] if x.ndim == 3 else x, factor)


@stored(static_argnames="factor")
def _pooled(x, factor):
    return padded_pool(x, factor, demons.MULTIPLE)


@stored
def _lncc(fixed, moving):
    return lncc(fixed[None], moving[None], WINDOW)


@stored
def _registered(fixed, moving):
    """The displacement by a short run of Demons."""
    return demons.demons(fixed, moving, **demons.LNCC | {"iterations": (40, 10, 0)}).u
