"""Two images in; aligned image, transforms, force and a picture out.

The fixed image is resampled to a working grid, the moving one to the same grid through the affine alignment. The
field found there becomes a transform in millimetres, sampled on the images' own grids: only the last step touches
the voxels that are written.
"""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import nibabel
import numpy as np

from drivenmorph_jax import demons, metrics, nifti, page, report, sharding, transforms
from drivenmorph_jax.affine import register_affine
from drivenmorph_jax.checkpoint import SHIPPED, environment
from drivenmorph_jax.contrast import SAME, correlation, matched
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.evaluation import grid_multiple, load_checkpoint, make_predict
from drivenmorph_jax.files import make_folder, replacing
from drivenmorph_jax.grid import resize
from drivenmorph_jax.losses import lncc
from drivenmorph_jax.warp import warp

DEMONS_SPACING = 1.0  # mm, the finest working grid of Demons
REFINE_STEPS = {"drivenmorph": 10, "demons": 0}
BASE_BYTES = 600e6  # Python, JAX and SimpleITK
# A voxel's share of what lies on the images' own grids: images, two displacements and the force, three float32 each,
# Jacobian, and a copy of the largest while it is written; and of what Demons has on its working grid.
FIXED_BYTES, MOVING_BYTES, DEMONS_BYTES = 64, 24, 160
NETWORK_FORCE = "driving force of the network's first look: the sum over its updates, on the fixed grid"
DEMONS_FORCE = "force of Demons between the fixed and the affinely aligned moving image, on the fixed grid"


@dataclass(frozen=True, eq=False)
class Result:
    """A registration. Vectors and determinants lie on the fixed image's grid."""

    warped: nibabel.Nifti1Image  # the moving image
    warped_labels: nibabel.Nifti1Image | None
    transform: transforms.Transform  # from the fixed to the moving image, affine and deformable, with its inverse
    force: np.ndarray  # (X, Y, Z, 3), RAS mm
    jacobian: np.ndarray  # (X, Y, Z), determinant of the transform
    summary: dict  # similarity, Dice, folding, seconds, each with its definition
    pictured: dict  # what `report.overview` draws, on the working grid

    def overview(self, path):
        """Draw the picture of the registration to a PNG file."""
        report.overview(path, title=_title(self.summary), **self.pictured)

    def report(self, path="report.html"):
        """Write the page of the registration: slices to move through, picture, numbers. Returns its path."""
        picture = Path(path).with_suffix(".png")
        self.overview(picture)
        return self._page(path, picture)

    def _page(self, path, picture):
        title, numbers = _title(self.summary).split("\n")
        volumes = {name: x for name, x in self.pictured.items() if name not in ("labels", "matched")}
        volumes["jacobian"] = volumes.pop("jac")
        page.write(path, title, [page.paragraph(numbers), page.viewer("Slices", **volumes),
                                 page.figure("Overview", picture), page.definitions(self.summary["definitions"])])
        return path

    def save(self, out, formats=("itk",), bids=None):
        """Write everything to the folder `out`, as register.py does.

        Args:
          formats: of the transform and its inverse: "itk" displacement fields, LPS mm, and the affine; "ras" the
            fields in RAS mm, intent 1006; "h5" ITK composites; "l2r" the field of Learn2Reg, in voxels.
          bids: (prefix, moving space, fixed space), such as ("sub-01", "T1w", "MNI152NLin2009cAsym"): the transforms
            are named as BIDS derivatives, sub-01_from-T1w_to-MNI152NLin2009cAsym_mode-image_xfm.

        Raises InputError where something cannot be written.
        """
        out, (fixed, moving) = make_folder(out), (self.transform.grid, self.transform.other)
        names = ["displacement", "inverse_displacement"]
        if bids:
            prefix, *spaces = bids
            names = [f"{prefix}_from-{a}_to-{b}_mode-image_xfm" for a, b in (spaces, spaces[::-1])]

        def volumes():
            for name, image in (("warped", self.warped), ("warped_labels", self.warped_labels)):
                if image is not None:
                    nifti.write(out / f"{name}.nii.gz", image)
            for name, transform in zip(names, (self.transform, self.transform.inverse), strict=True):
                if "itk" in formats:
                    transform.save(out / f"{name}.nii.gz")
                if "ras" in formats:
                    transform.save(out / f"{name}_ras.nii.gz", "RAS")
                if "h5" in formats:
                    transform.save(out / f"{name}.h5")
            if "itk" in formats:
                self.transform.save(out / "affine.tfm")
            if "l2r" in formats:
                self.transform.save_learn2reg(out / f"disp_{_stem(fixed.path)}_{_stem(moving.path)}.nii.gz")
            nifti.save(out / "jacobian.nii.gz", self.jacobian, fixed)
            transforms.write_force(out / "force.nii.gz", self.force, fixed,
                                   NETWORK_FORCE if self.summary["method"] == "drivenmorph" else DEMONS_FORCE)

        # Compressing takes as long as drawing, and only one of them needs Python.
        with ThreadPoolExecutor(1) as pool:
            written = pool.submit(volumes)
            self.overview(out / "overview.png")
            self._page(out / "report.html", out / "overview.png")
            written.result()
        with replacing(out / "summary.json") as temporary:
            temporary.write_text(json.dumps(self.summary, indent=2) + "\n")


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
        fixed, moving = nifti.load_image(fixed), nifti.load_image(moving)
        fixed_labels, moving_labels, fixed_mask, moving_mask = (
            None if labels is None else nifti.load_labels(labels, image) for labels, image in (
                (fixed_labels, fixed), (moving_labels, moving), (fixed_mask, fixed), (moving_mask, moving)))
        if isinstance(affine, nifti.PATHS):
            affine = transforms.read_affine(affine)
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
            shape, grid = nifti.working_grid(fixed, spacing, demons.MULTIPLE)
            needed = DEMONS_BYTES * int(np.prod(shape))
        needed += host
        if needed > limit:
            raise InputError(f"{fixed.path} and {moving.path} need about {needed / 1e9:.1f} GB of memory, more than "
                             f"{limit / 1e9:.1f} GB: " + ("give more, crop or downsample them" if memory else
                                                          "give --memory with less, crop or downsample them"))
        stages.tell(f"memory {needed / 1e9:.1f} GB,", end=" ")

    with stages("resample"):
        f, m = (jnp.asarray(nifti.resample(nifti.smoothed(volume, spacing), shape, grid, through))
                for volume, through in ((fixed, None), (moving, transform)))
        masks = weights = None
        if masked:
            masks = [jnp.zeros(shape, bool) if mask is None else
                     jnp.asarray(nifti.resample(mask, shape, grid, through, order=0) > 0)
                     for mask, through in ((fixed_mask, None), (moving_mask, transform))]
            f, m = (demons.fill(x[..., None], mask[..., None])[..., 0]
                    for x, mask in zip((f, m), masks, strict=True))
            weights = tuple(1.0 - mask[..., None] for mask in masks)
        f, m = (jnp.asarray(nifti.normalise(np.asarray(x))) for x in (f, m))
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
            u, force, counted = demons.unfolded(demons.fill(u, out[..., None])), force * ~out[..., None], ~out
        if method == "demons" or masks is not None:
            u_inverse = demons.coarse_inverse(u)
        u, u_inverse, force = (np.asarray(x) for x in (u, u_inverse, force))

    with stages("transform"):
        displacement = transforms.total_displacement(fixed.data.shape, fixed.affine, u, grid, transform)
        backward = transforms.total_inverse_displacement(moving.data.shape, moving.affine, u_inverse, grid, transform)
        found = transforms.Transform(displacement, fixed, transform, moving, backward)
        warped = transforms.apply(moving, displacement, fixed.affine)
        jacobian = transforms.jacobian_determinant_of_displacement(displacement, fixed.affine)
        vectors = transforms.force_on_grid(fixed.data.shape, fixed.affine, force, grid)
        if fixed_mask is not None:
            vectors[fixed_mask.data > 0] = 0  # between two voxels of the working grid there is no sharp edge
        warped_labels = None if moving_labels is None else transforms.apply(moving_labels, displacement, fixed.affine,
                                                                            order=0)

    with stages("score"):
        inside = metrics.brain(nifti.normalise(fixed.data) > 0.02)
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
            start = nifti.resample(moving_labels, fixed.data.shape, fixed.affine, transform, order=0)
            summary |= {f"dice_{when}": metrics.mean_dice(fixed_labels.data, labels, moving_labels=moving_labels.data)
                        for when, labels in (("before", start), ("after", warped_labels))}

    alike = None
    if contrast == "other":
        alike = [np.asarray(x) for x in (seen, warp(seen[..., None], u)[..., 0])]
    summary["seconds"] = stages.seconds | {"total": sum(stages.seconds.values())}
    outlines = None if fixed_labels is None else nifti.resample(fixed_labels, shape, grid, order=0)
    return Result(
        nifti.to_nibabel(warped, fixed),
        None if moving_labels is None else nifti.to_nibabel(
            warped_labels, nifti.with_type(fixed, moving_labels.header.get_data_dtype())),
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
        shape, grid = nifti.working_grid(fixed, spacing, grid_multiple(config))
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


def apply_files(transform, out, images=None, points=None, interpolation="linear", inverse=False, reference=None):
    """Move files by a displacement field, as apply.py does; yields each path that it wrote.

    Args:
      transform: file of the field; `inverse` takes the way back, on the grid of `reference` where the sidecar does not
        tell the other image's.
      out: file for one image or for the points, folder for several images, which keep their names.
      images: files to resample; or points: a CSV with columns x, y, z, RAS mm.
      reference: image on whose grid the results lie.

    Raises InputError where a file cannot be used or written.
    """
    found, reference = transforms.Transform.load(transform), reference and nifti.load_image(reference)
    if inverse:
        found = (found if found.other or not reference else replace(found, other=reference)).inverse
    if points is not None:
        with replacing(out) as temporary:
            transforms.move_table(points, temporary, found)
        yield out
        return
    if len(images) > 1:
        names = [Path(path).name for path in images]
        if len(set(names)) < len(names):
            raise InputError(f"{', '.join(names)}: two images have one name, and would overwrite each other in {out}")
        places = [make_folder(out) / name for name in names]
    else:
        places = [Path(out)]
    for image, place in zip(images, places, strict=True):
        nifti.write(place, found.apply(image, interpolation, reference))
        yield place


class _Stages:
    """`with stages(name):` tells the stage and its seconds, and keeps them in `seconds`."""

    def __init__(self, quiet):
        self.quiet, self.seconds = quiet, {}

    @contextmanager
    def __call__(self, name):
        self.tell(f"{name} ...", end=" ")
        start = time.perf_counter()
        try:
            yield
        except BaseException:
            self.tell()
            raise
        self.seconds[name] = time.perf_counter() - start
        self.tell(f"{self.seconds[name]:.1f} s")

    def tell(self, *words, end="\n"):
        if not self.quiet:
            print(*words, end=end, flush=True)


@jax.jit
def _similarity_of(fixed, moving, weight):
    return lncc(fixed[None, ..., None], moving[None, ..., None], 9, weight)


def _similarity(fixed, moving, counted):
    return float(_similarity_of(fixed, moving, None if counted is None else counted[None].astype(jnp.float32)))


def _stem(path):
    return Path(path).name.split(".")[0]


def _title(summary):
    lines = [f"{Path(summary['moving']).name} to {Path(summary['fixed']).name} ({summary['method']})",
             f"similarity {summary['similarity_before']:.3f} before, {summary['similarity_after']:.3f} after; "
             f"J ≤ 0 in {summary['fold_pct']:.4f} %"]
    if summary["contrast"] == "other":
        lines[1] += "; differences and checkerboards with the values of the fixed image"
    if "dice_after" in summary:
        lines[1] = f"Dice {summary['dice_before']:.3f} before, {summary['dice_after']:.3f} after; " + lines[1]
    return "\n".join(lines)
