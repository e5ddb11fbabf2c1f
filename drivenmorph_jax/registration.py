"""Two NIfTI files in; aligned image, transforms, force and a picture out.

The fixed image is resampled to a working grid, the moving one to the same grid through the affine alignment. The
field found there becomes a transform in millimetres, sampled on the images' own grids: only the last step touches
the voxels that are written.
"""

import json
import time
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from drivenmorph_jax import demons, metrics, nifti, page, report, transforms
from drivenmorph_jax.affine import register_affine
from drivenmorph_jax.checkpoint import SHIPPED
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.evaluation import grid_multiple, load_checkpoint, make_predict
from drivenmorph_jax.files import make_folder, replacing
from drivenmorph_jax.grid import resize
from drivenmorph_jax.losses import lncc
from drivenmorph_jax.warp import warp

DEMONS_SPACING = 1.0  # mm, the finest working grid of Demons
REFINE_STEPS = {"drivenmorph": 20, "demons": 0}
NETWORK_FORCE = "driving force of the network: the sum over its updates, on the fixed grid"
DEMONS_FORCE = "force of Demons between the fixed and the affinely aligned moving image, on the fixed grid"


def register(fixed, moving, out, *, checkpoint=SHIPPED, method="drivenmorph", force="lncc", affine=True,
             refine_steps=None, fixed_labels=None, moving_labels=None):
    """Register the NIfTI file `moving` to `fixed` and write every result to the folder `out`.

    Args:
      checkpoint: a training's folder, for method "drivenmorph"; by default the weights that come with the project.
      method: "drivenmorph", or "demons", which needs no weights.
      force: of method "demons": "lncc" (local correlation), "intensity" (symmetric Demons force, for images of one
        scanner) or "mind" (the same on MIND descriptors, for images of two contrasts).
      affine: align by an affine first; else the files' own world coordinates are the alignment.
      refine_steps: iterations of Demons by local correlation after the method, on its working grid; by default those
        of `REFINE_STEPS`.
      fixed_labels, moving_labels: label maps on the grids of their images.

    Returns:
      What it wrote to `summary.json`.

    Raises:
      InputError: a file that cannot be used or written. Nothing is written before everything is computed.
    """
    seconds = {}
    if refine_steps is None:
        refine_steps = REFINE_STEPS[method]
    with _stage("read", seconds):
        fixed, moving = nifti.load_image(fixed), nifti.load_image(moving)
        fixed_labels = fixed_labels and nifti.load_labels(fixed_labels, fixed)
        moving_labels = moving_labels and nifti.load_labels(moving_labels, moving)
        if method == "drivenmorph":
            config, params, about = load_checkpoint(checkpoint)
            spacing, multiple = about["spacing"], grid_multiple(config)
        else:
            spacing, multiple = max(DEMONS_SPACING, float(fixed.spacing.min())), demons.MULTIPLE
        out = make_folder(out)

    with _stage("affine", seconds):
        transform = register_affine(fixed, moving) if affine else np.eye(4)

    with _stage("resample", seconds):
        shape, grid = nifti.working_grid(fixed, spacing, multiple)
        f, m = (jnp.asarray(nifti.normalise(nifti.resample(nifti.smoothed(volume, spacing), shape, grid, through)))
                for volume, through in ((fixed, None), (moving, transform)))
        if not (m > 0).any():
            raise InputError(f"{moving.path} does not overlap {fixed.path} in world coordinates: leave out --no-affine")

    with _stage(method, seconds):
        if method == "drivenmorph":
            u, u_inverse, force = (x[0] for x in make_predict(config)(params, f[None], m[None])[:3])
        else:
            features, settings = demons.FORCES[force]
            features = features(f[..., None]), features(m[..., None])
            u = demons.demons(*features, **settings).u
            force = resize(settings["force"](*features, settings["max_step"])[0], shape)
        if refine_steps:
            u = demons.refine(f[..., None], m[..., None], u, refine_steps)
        if refine_steps or method == "demons":
            u_inverse = demons.coarse_inverse(u)
        u, u_inverse, force = (np.asarray(x) for x in (u, u_inverse, force))

    with _stage("transform", seconds):
        displacement = transforms.total_displacement(fixed.data.shape, fixed.affine, u, grid, transform)
        backward = transforms.total_inverse_displacement(moving.data.shape, moving.affine, u_inverse, grid, transform)
        warped = transforms.apply(moving, displacement, fixed.affine)
        jacobian = transforms.jacobian_determinant_of_displacement(displacement, fixed.affine)
        vectors = transforms.force_on_grid(fixed.data.shape, fixed.affine, force, grid)
        warped_labels = moving_labels and transforms.apply(moving_labels, displacement, fixed.affine, order=0)

    with _stage("score", seconds):
        inside = metrics.brain(nifti.normalise(fixed.data) > 0.02)
        moved = np.asarray(warp(m[..., None], u)[..., 0])
        summary = {
            "fixed": fixed.path, "moving": moving.path, "method": method,
            "checkpoint": str(checkpoint) if method == "drivenmorph" else None,
            "refine_steps": refine_steps, "affine": affine,
            "device": jax.devices()[0].device_kind, "working_grid": list(shape), "working_spacing_mm": spacing,
            "similarity_before": _similarity(f, m), "similarity_after": _similarity(f, moved),
            "fold_pct": float(100 * np.mean(jacobian[inside] <= 0)),
            "sdlogj": float(np.log(np.maximum(jacobian[inside], 1e-9)).std()),
            "inverse_mm": metrics.inverse_consistency(u, u_inverse, (spacing,) * 3, metrics.brain(np.asarray(f))),
            "definitions": {
                "similarity": "Mean squared local correlation of the images in boxes of 9 voxels, on the working grid; "
                              "before: after the affine.",
                "dice": metrics.DEFINITIONS["dice"] + " Before: after the affine. Without label 0.",
                "fold_pct": "Percentage of voxels of the fixed brain where the Jacobian determinant of the total "
                            "transform is 0 or less.",
                "sdlogj": "Standard deviation of its logarithm there.",
                "inverse_mm": metrics.DEFINITIONS["inverse_mm"]},
        }
        if fixed_labels and moving_labels:
            start = nifti.resample(moving_labels, fixed.data.shape, fixed.affine, transform, order=0)
            summary["dice_before"] = metrics.mean_dice(fixed_labels.data, start)
            summary["dice_after"] = metrics.mean_dice(fixed_labels.data, warped_labels)

    with _stage("write", seconds):
        nifti.save(out / "warped.nii.gz", warped, fixed)
        transforms.write_displacement(out / "displacement.nii.gz", displacement, fixed, "fixed to moving")
        transforms.write_displacement(out / "inverse_displacement.nii.gz", backward, moving, "moving to fixed")
        nifti.save(out / "jacobian.nii.gz", jacobian, fixed)
        transforms.write_force(out / "force.nii.gz", vectors, fixed,
                               NETWORK_FORCE if method == "drivenmorph" else DEMONS_FORCE)
        if moving_labels:
            nifti.save(out / "warped_labels.nii.gz", warped_labels, moving_labels_on(fixed, moving_labels))
        outlines = fixed_labels and nifti.resample(fixed_labels, shape, grid, order=0)
        volumes = np.asarray(f), np.asarray(m), moved, u, force, metrics.jacobian(u), (spacing,) * 3
        report.overview(out / "overview.png", *volumes, _title(summary), outlines)
        title, numbers = _title(summary).split("\n")
        page.write(out / "report.html", title, [page.paragraph(numbers), page.viewer("Slices", *volumes),
                                                page.figure("Overview", out / "overview.png"),
                                                page.definitions(summary["definitions"])])
    summary["seconds"] = seconds | {"total": sum(seconds.values())}
    with replacing(out / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def moving_labels_on(fixed, labels):
    """The fixed image's geometry with the integer type of the moving labels, to save warped labels by."""
    header = fixed.header.copy()
    header.set_data_dtype(labels.header.get_data_dtype())
    return nifti.Volume(fixed.data, fixed.affine, header, fixed.path)


@contextmanager
def _stage(name, seconds):
    print(f"{name} ...", end=" ", flush=True)
    start = time.perf_counter()
    try:
        yield
    except BaseException:
        print()
        raise
    seconds[name] = time.perf_counter() - start
    print(f"{seconds[name]:.1f} s", flush=True)


@jax.jit
def _lncc(fixed, moving):
    return lncc(fixed[None, ..., None], moving[None, ..., None], 9)


def _similarity(fixed, moving):
    return float(_lncc(fixed, moving))


def _title(summary):
    lines = [f"{Path(summary['moving']).name} to {Path(summary['fixed']).name} ({summary['method']})",
             f"similarity {summary['similarity_before']:.3f} before, {summary['similarity_after']:.3f} after; "
             f"J ≤ 0 in {summary['fold_pct']:.4f} %"]
    if "dice_after" in summary:
        lines[1] = f"Dice {summary['dice_before']:.3f} before, {summary['dice_after']:.3f} after; " + lines[1]
    return "\n".join(lines)
