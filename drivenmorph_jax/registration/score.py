"""Stage 8: similarity, Dice, folding and further numbers, each with its definition."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from drivenmorph_jax.evaluation import metrics
from drivenmorph_jax.fields.warp import warp
from drivenmorph_jax.files import finite
from drivenmorph_jax.images.intensity import normalise
from drivenmorph_jax.images.reading import PATHS
from drivenmorph_jax.images.volume import resample
from drivenmorph_jax.network.losses import lncc
from drivenmorph_jax.registration.confidence import confidence, uncertainty
from drivenmorph_jax.registration.read import kept
from drivenmorph_jax.registration.transfer import Transferred
from drivenmorph_jax.runtime.provenance import environment
from drivenmorph_jax.runtime.stored import stored
from drivenmorph_jax.transforms.world import displacement_of, pull_back

WINDOW = 9  # side of the boxes of the reported local correlation, in voxels
SETTINGS = "force", "convention", "mask_sense", "geometry"  # what a later correction needs of the request
DEFINITIONS = {
    "scale": "All lengths were multiplied by it while registering; not 1 for the brains of small animals. Every number "
             "here is in the lengths of the files.",
    "stripped": "The images that showed a whole head, of which only the brain was registered.",
    "inputs": "The files that it was made from, with their CRC-32, by which a later correction sees whether one was "
              "changed.",
    "similarity": "Mean squared local correlation of the images in boxes of 9 voxels, on the working grid, without "
                  "what masks leave out; before: after the affine, or after the transform to start from.",
    "stiffness": "low: the field is that of the method; high: a stiffer one, since the images have little in common.",
    "agreement": "How much they have in common: median of their local correlation after a quick stiff registration, "
                 "at about 2 mm; null where it did not decide on the stiffness.",
    "memory_gb": "Estimated before the work: the compiled network's own account, and the arrays around it.",
    "confidence": "Mean over the fixed brain of the squared local correlation of the registered images, at 2 mm; see "
                  "confidence.nii.gz. The deformation is least certain where it is low.",
    "dice": metrics.DEFINITIONS["dice"] + " Before: after the affine. Without label 0; null where the images have no "
            "label in common.",
    "fold_pct": "Percentage of voxels of the fixed brain where the Jacobian determinant of the total transform is 0 or "
                "less.",
    "sdlogj": "Standard deviation of its logarithm there.",
    "inverse_mm": metrics.DEFINITIONS["inverse_mm"],
    "landmarks": "Distance in mm of each landmark from its place in the moving image, before landmarks drive the "
                 "registration and after; left_out: why it was not used, null where it was.",
    "guided_labels": "Dice of each pair of labels that drives the registration, on the working grid, before it does "
                     "and after; left_out: as of landmarks."}


@dataclass(frozen=True, eq=False, kw_only=True)
class Scored(Transferred):
    """A registration and its numbers."""

    moved: np.ndarray  # (D, H, W), the moving image warped on the working grid
    matched: np.ndarray  # the same with the values of the fixed image, if they are of different contrast
    confidence_on_grid: np.ndarray  # (D, H, W), see `registration.confidence`
    confidence: np.ndarray  # (X, Y, Z), the same on the grid of the fixed image
    uncertainty: np.ndarray  # (X, Y, Z), mm, in the fixed brain, and 0 outside
    summary: dict  # the content of summary.json


def score(pair: Transferred) -> Scored:
    """Score a registration. Numbers that are not finite become None, since JSON has no nan."""
    brain = metrics.brain(np.asarray(pair.fixed_on_grid))
    with ThreadPoolExecutor(2) as pool:  # each of the two takes one core
        inverse = pool.submit(metrics.inverse_consistency, pair.u, pair.u_inverse, (pair.spacing,) * 3, brain)
        dice = pool.submit(_dice, pair)
        return _scored(pair, brain, inverse, dice)


def _scored(pair, brain, inverse, dice):
    """The score of a registration, of which `inverse` and `dice` are still computed; `brain` is the fixed one."""
    request, names = pair.request, pair.request.initial_transform
    inside = metrics.brain(normalise(pair.fixed.data) > 0.02)
    jacobian = pair.jacobian[inside]
    moved = matched = np.asarray(warp(pair.moving_on_grid[..., None], pair.u)[..., 0])
    if pair.contrast == "other":
        matched = np.asarray(warp(pair.seen[..., None], pair.u)[..., 0])
    relied = confidence(pair.fixed_on_grid, matched, pair.spacing * pair.scale, pair.counted)
    there = resample(replace(pair.fixed, data=relied, affine=pair.grid), pair.fixed.data.shape, pair.fixed.affine)
    uncertain = uncertainty(there) * inside / np.float32(pair.scale)
    numbers = {
        "agreement": pair.agreement,
        "similarity_before": similarity(pair.fixed_on_grid, pair.moving_on_grid, pair.counted),
        "similarity_after": similarity(pair.fixed_on_grid, moved, pair.counted),
        "fold_pct": float(100 * np.mean(jacobian <= 0)),
        "sdlogj": float(np.log(np.maximum(jacobian, 1e-9)).std()),
        "inverse_mm": inverse.result(),
        "confidence": float(relied[brain].mean()),
        **dice.result(), **_landmarks(pair), **({"guided_labels": list(pair.labels_told)} if pair.labels_told else {})}
    summary = {
        "fixed": pair.fixed.path, "moving": pair.moving.path, "method": request.method,
        "checkpoint": str(request.checkpoint) if request.method == "drivenmorph" else None,
        "stripped": [role for role in ("fixed", "moving") if getattr(pair, f"{role}_brain") is not None],
        "contrast": pair.contrast, "stiffness": pair.stiffness, "refine_steps": pair.refine_steps, "scale": pair.scale,
        "affine": {"affine": True, "none": False}.get(pair.given_affine, pair.given_affine) if isinstance(
            pair.given_affine, str) else pair.affine.tolist(),
        "initial_transform": None if names is None else [
            str(name) for name in ([names] if isinstance(names, PATHS) else names)],
        **{f"extra_{role}": [both[k].path for both in pair.extra] for k, role in enumerate(("fixed", "moving"))},
        "inputs": pair.inputs, "settings": {name: getattr(request, name) for name in SETTINGS},
        "memory_gb": pair.needed / 1e9, "environment": environment(), "working_grid": list(pair.shape),
        "working_spacing_mm": pair.spacing, "definitions": DEFINITIONS,
        **finite(numbers)}
    return Scored(**kept(pair), moved=moved, matched=matched, confidence_on_grid=relied, confidence=there,
                  uncertainty=uncertain, summary=summary)


def _landmarks(pair):
    """The distance of each landmark from where it should be, by the total transform."""
    if not pair.landmarks_told:
        return {}
    after = np.linalg.norm(pair.transform.points(pair.landmarks.fixed) - pair.landmarks.moving, axis=-1)
    return {"landmarks": [told | {"after_mm": float(mm)} for told, mm in zip(pair.landmarks_told, after, strict=True)]}


def _dice(pair):
    """Dice after the affine and after the whole transform, where both images have labels."""
    if pair.fixed_labels is None or pair.moving_labels is None:
        return {}
    fixed, moving = pair.fixed_labels, pair.moving_labels
    if pair.start is None:
        start = resample(moving, pair.fixed.data.shape, pair.fixed.affine, pair.affine, order=0)
    else:
        start = pull_back(moving, displacement_of(pair.start, pair.fixed.data.shape, pair.fixed.affine),
                          pair.fixed.affine, "nearest")
    return {f"dice_{when}": metrics.mean_dice(fixed.data, labels, moving_labels=moving.data)
            for when, labels in (("before", start), ("after", pair.warped_labels))}


@stored
def _mean_lncc(fixed, moving, weight):
    return lncc(fixed[None, ..., None], moving[None, ..., None], WINDOW, weight)


def similarity(fixed, moving, counted):
    """The mean squared local correlation of two images (D, H, W) where `counted` (bool) is True; None: everywhere."""
    return float(_mean_lncc(fixed, moving, None if counted is None else counted[None].astype(jnp.float32)))
