"""Two images in; aligned image, transforms, force and a picture out.

The fixed image is resampled to a working grid, the moving one to the same grid through the affine alignment. The
field found there becomes a transform in millimetres, sampled on the images' own grids: only the last step touches
the voxels that are written.
"""

import os
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from drivenmorph_jax import demons
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.evaluation import metrics
from drivenmorph_jax.fields.grid import resize
from drivenmorph_jax.fields.inverse import coarse_inverse
from drivenmorph_jax.fields.unfold import unfolded
from drivenmorph_jax.fields.warp import warp
from drivenmorph_jax.images.contrast import SAME, correlation, matched
from drivenmorph_jax.images.intensity import normalise
from drivenmorph_jax.images.masks import fill
from drivenmorph_jax.images.reading import PATHS, load_image, load_labels
from drivenmorph_jax.images.volume import resample, smoothed, with_type
from drivenmorph_jax.images.working_grid import working_grid
from drivenmorph_jax.images.writing import to_nibabel
from drivenmorph_jax.network.inference import grid_multiple, load_checkpoint, make_predict
from drivenmorph_jax.network.losses import lncc
from drivenmorph_jax.registration.progress import _Stages
from drivenmorph_jax.registration.result import Result
from drivenmorph_jax.runtime import sharding
from drivenmorph_jax.runtime.checkpoint import SHIPPED
from drivenmorph_jax.runtime.provenance import environment
from drivenmorph_jax.transforms import world
from drivenmorph_jax.transforms.affine import register_affine
from drivenmorph_jax.transforms.itk import read_affine
from drivenmorph_jax.transforms.transform import Transform
from drivenmorph_jax.transforms.world import (
    force_on_grid,
    jacobian_determinant_of_displacement,
    total_displacement,
    total_inverse_displacement,
)

DEMONS_SPACING = 1.0  # mm, the finest working grid of Demons
REFINE_STEPS = {"drivenmorph": 10, "demons": 0}
BASE_BYTES = 600e6  # Python, JAX and SimpleITK
# A voxel's share of what lies on the images' own grids: images, two displacements and the force, three float32 each,
# Jacobian, and a copy of the largest while it is written; and of what Demons has on its working grid.
FIXED_BYTES, MOVING_BYTES, DEMONS_BYTES = 64, 24, 160


def register(fixed, moving, *, checkpoint=SHIPPED, method="drivenmorph", force="lncc", contrast="auto", affine=True,
             refine_steps=None, fixed_labels=None, moving_labels=None, fixed_mask=None, moving_mask=None, memory=None,
             quiet=False):
    """Register the image `moving` to `fixed`: files, nibabel images, or arrays with voxels of 1 mm.

    Args:
      checkpoint: a training's folder, for method "drivenmorph"; by default the weights that come with the project.
      method: "drivenmorph", or "demons", which needs no weights.
      force: of method "demons": "lncc" (local correlation), "intensity" (symmetric Demons force, for images of one
        scanner) or "mind" (the same on MIND descriptors, which an inverted image has as well).
      contrast: "same"; "other", as of T1 and T2: the moving image takes the fixed one's values, see `contrast.py`; or
        "auto", other where their values correlate by less than `SAME` once they are affinely aligned.
      affine: True to find one first; False where world coordinates agree already; else an ITK file of an affine, or a
        (4, 4) from the fixed to the moving world in RAS mm, to be taken as it is.
      refine_steps: iterations of Demons, on the working grid, after which the network looks at what is left,
        see `refinement.py`; 0: the network alone. After Demons they follow by local correlation, or MIND after MIND. By
        default those of `REFINE_STEPS`.
      fixed_labels, moving_labels: label maps on the grids of their images.
      fixed_mask, moving_mask: on the grids of their images, above 0 where tissue is missing or sick: no force is taken
        from there, and the field goes on smoothly inside.
      memory: bytes that may be used; the network then sees images of half or a quarter of the resolution where it
        would need more, and refinement does the rest.
      quiet: tell nothing of the stages.

    Returns:
      A `Result`.

    Raises:
      InputError: an image that cannot be used, an unknown contrast, or memory that does not suffice; before it is
        asked for.
    """
    if contrast not in ("auto", "same", "other"):
        raise InputError(f"contrast is {contrast!r}: set it to 'auto', 'same' or 'other'")
    stages = _Stages(quiet)
    if refine_steps is None:
        refine_steps = REFINE_STEPS[method]
    with stages("read"):
        fixed, moving = load_image(fixed), load_image(moving)
        fixed_labels, moving_labels, fixed_mask, moving_mask = (
            None if labels is None else load_labels(labels, image) for labels, image in (
                (fixed_labels, fixed), (moving_labels, moving), (fixed_mask, fixed), (moving_mask, moving)))
        if isinstance(affine, PATHS):
            affine = read_affine(affine)
        if method == "drivenmorph":
            config, params, about = load_checkpoint(checkpoint)
            spacing = about["spacing"]
        else:
            spacing = max(DEMONS_SPACING, float(fixed.spacing.min()))
        limit = memory or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        host = BASE_BYTES + FIXED_BYTES * fixed.data.size + MOVING_BYTES * moving.data.size
        masked = fixed_mask is not None or moving_mask is not None

    with stages("affine"):
        if affine is True:
            transform = register_affine(fixed, moving, fixed_mask, moving_mask)
        else:
            transform = np.eye(4) if affine is False else np.asarray(affine, float)

    with stages("compile" if method == "drivenmorph" else "plan"):
        if method == "drivenmorph":
            predict, shape, grid, needed = _compiled(config, params, fixed, spacing, masked, limit - host, refine_steps)
        else:
            shape, grid = working_grid(fixed, spacing, demons.MULTIPLE)
            needed = DEMONS_BYTES * int(np.prod(shape))
        needed += host
        if needed > limit:
            raise InputError(f"{fixed.path} and {moving.path} need about {needed / 1e9:.1f} GB of memory, more than "
                             f"{limit / 1e9:.1f} GB: " + ("give more, crop or downsample them" if memory else
                                                          "give --memory with less, crop or downsample them"))
        stages.tell(f"memory {needed / 1e9:.1f} GB,", end=" ")

    with stages("resample"):
        f, m = (jnp.asarray(resample(smoothed(volume, spacing), shape, grid, through))
                for volume, through in ((fixed, None), (moving, transform)))
        masks = weights = None
        if masked:
            masks = [jnp.zeros(shape, bool) if mask is None else
                     jnp.asarray(resample(mask, shape, grid, through, order=0) > 0)
                     for mask, through in ((fixed_mask, None), (moving_mask, transform))]
            f, m = (fill(x[..., None], mask[..., None])[..., 0]
                    for x, mask in zip((f, m), masks, strict=True))
            weights = tuple(1.0 - mask[..., None] for mask in masks)
        f, m = (jnp.asarray(normalise(np.asarray(x))) for x in (f, m))
        if not (m > 0).any():
            raise InputError(f"{moving.path} does not overlap {fixed.path} in world coordinates: leave out --no-affine")

    by_mind = method == "demons" and force == "mind"
    if contrast == "auto":
        weight = None if weights is None else jnp.minimum(*weights)[..., 0]
        r = float(correlation(f, m, weight))
        contrast = "same" if by_mind or r >= SAME else "other"  # MIND descriptors are for any contrast as they are
        if contrast == "other":
            stages.tell(f"values correlate by {r:.2f}: the images are taken as of different contrast")

    with stages(method):
        def by_network(predict, f, m):
            both = () if weights is None else (jnp.concatenate(weights, -1)[None],)
            return [x[0] for x in predict(params, f[None], m[None], *both)[:3]]

        def by_demons(f, m):
            features, settings = demons.FORCES[force]
            features, driven = demons.weighted((features(f[..., None]), features(m[..., None])), weights,
                                               settings["force"])
            u = demons.registered(f[..., None], m[..., None], force, weights)
            return u, None, resize(driven(*features, settings["max_step"])[0], shape)

        if method == "drivenmorph":
            alone, run = (partial(by_network, one) for one in (make_predict(config), predict))
        else:
            alone = run = by_demons
        seen = matched(lambda f, m: alone(f, m)[0], f, m, weights) if contrast == "other" else m
        u, u_inverse, force = run(f, seen)
        if refine_steps and method == "demons":
            u = demons.refine(f[..., None], seen[..., None], u, refine_steps, weights, "mind" if by_mind else "lncc")
        counted = None
        if masks is not None:
            out = masks[0] | (warp(masks[1][..., None].astype(jnp.float32), u)[..., 0] > 0)
            u, force, counted = unfolded(fill(u, out[..., None])), force * ~out[..., None], ~out
        if method == "demons" or masks is not None:
            u_inverse = coarse_inverse(u)
        u, u_inverse, force = (np.asarray(x) for x in (u, u_inverse, force))

    with stages("transform"):
        displacement = total_displacement(fixed.data.shape, fixed.affine, u, grid, transform)
        backward = total_inverse_displacement(moving.data.shape, moving.affine, u_inverse, grid, transform)
        found = Transform(displacement, fixed, transform, moving, backward)
        warped = world.apply(moving, displacement, fixed.affine)
        jacobian = jacobian_determinant_of_displacement(displacement, fixed.affine)
        vectors = force_on_grid(fixed.data.shape, fixed.affine, force, grid)
        if fixed_mask is not None:
            vectors[fixed_mask.data > 0] = 0  # between two voxels of the working grid there is no sharp edge
        warped_labels = None if moving_labels is None else world.apply(moving_labels, displacement, fixed.affine,
                                                                            order=0)

    with stages("score"):
        inside = metrics.brain(normalise(fixed.data) > 0.02)
        moved = np.asarray(warp(m[..., None], u)[..., 0])
        summary = {
            "fixed": fixed.path, "moving": moving.path, "method": method,
            "checkpoint": str(checkpoint) if method == "drivenmorph" else None,
            "contrast": contrast, "refine_steps": refine_steps,
            "affine": affine if isinstance(affine, bool) else transform.tolist(),
            "memory_gb": needed / 1e9, "environment": environment(), "working_grid": list(shape),
            "working_spacing_mm": spacing,
            "similarity_before": _similarity(f, m, counted), "similarity_after": _similarity(f, moved, counted),
            "fold_pct": float(100 * np.mean(jacobian[inside] <= 0)),
            "sdlogj": float(np.log(np.maximum(jacobian[inside], 1e-9)).std()),
            "inverse_mm": metrics.inverse_consistency(u, u_inverse, (spacing,) * 3, metrics.brain(np.asarray(f))),
            "definitions": {
                "similarity": "Mean squared local correlation of the images in boxes of 9 voxels, on the working grid, "
                              "without what masks leave out; before: after the affine.",
                "memory_gb": "Estimated before the work: the compiled network's own account, and the arrays around it.",
                "dice": metrics.DEFINITIONS["dice"] + " Before: after the affine. Without label 0.",
                "fold_pct": "Percentage of voxels of the fixed brain where the Jacobian determinant of the total "
                            "transform is 0 or less.",
                "sdlogj": "Standard deviation of its logarithm there.",
                "inverse_mm": metrics.DEFINITIONS["inverse_mm"]},
        }
        if fixed_labels is not None and moving_labels is not None:
            start = resample(moving_labels, fixed.data.shape, fixed.affine, transform, order=0)
            summary |= {f"dice_{when}": metrics.mean_dice(fixed_labels.data, labels, moving_labels=moving_labels.data)
                        for when, labels in (("before", start), ("after", warped_labels))}

    alike = None
    if contrast == "other":
        alike = [np.asarray(x) for x in (seen, warp(seen[..., None], u)[..., 0])]
    summary["seconds"] = stages.seconds | {"total": sum(stages.seconds.values())}
    outlines = None if fixed_labels is None else resample(fixed_labels, shape, grid, order=0)
    return Result(
        to_nibabel(warped, fixed),
        None if moving_labels is None else to_nibabel(
            warped_labels, with_type(fixed, moving_labels.header.get_data_dtype())),
        found, vectors, jacobian, summary,
        {"fixed": np.asarray(f), "moving": np.asarray(m), "warped": moved, "u": u, "force": force,
         "jac": metrics.jacobian(u), "spacing": (spacing,) * 3, "labels": outlines, "matched": alike})


def _compiled(config, params, fixed, spacing, masked, limit, refine_steps):
    """(the network compiled for the working grid of `fixed`; that grid's shape and affine; bytes that it needs).

    Of full, half and quarter resolution the finest whose bytes stay below the limit, else the last.
    """
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: params))
    for coarser in (1, 2, 2):
        config.data.downsample *= coarser
        shape, grid = working_grid(fixed, spacing, grid_multiple(config))
        predict, needed = _program(make_predict(config, refine_steps), tree, tuple(leaves), shape, masked, limit)
        if needed <= limit:
            break
    return predict, shape, grid, needed


@lru_cache(maxsize=4)
def _program(predict, tree, leaves, shape, masked, limit):
    """What `sharding.compiled_and_memory` returns; once, where many images of one size are registered."""
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    weights = (jax.ShapeDtypeStruct((1, *shape, 2), jnp.float32),) if masked else ()
    return sharding.compiled_and_memory(predict.lower(jax.tree.unflatten(tree, leaves), image, image, *weights), limit)


@jax.jit
def _similarity_of(fixed, moving, weight):
    return lncc(fixed[None, ..., None], moving[None, ..., None], 9, weight)


def _similarity(fixed, moving, counted):
    return float(_similarity_of(fixed, moving, None if counted is None else counted[None].astype(jnp.float32)))
