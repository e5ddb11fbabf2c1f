"""Registration of two images: `register` runs all stages and returns aligned image, transforms, force and scores."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from drivenmorph_jax.images.reading import Source
from drivenmorph_jax.registration.align import align
from drivenmorph_jax.registration.checks import check
from drivenmorph_jax.registration.deform import deform
from drivenmorph_jax.registration.guide import guide
from drivenmorph_jax.registration.plan import plan
from drivenmorph_jax.registration.prepare import prepare
from drivenmorph_jax.registration.progress import Progress
from drivenmorph_jax.registration.read import Request, read
from drivenmorph_jax.registration.result import Result, result_of
from drivenmorph_jax.registration.score import score
from drivenmorph_jax.registration.strip import Stripped
from drivenmorph_jax.registration.strip import strip as find_brains
from drivenmorph_jax.registration.transfer import transfer
from drivenmorph_jax.runtime.checkpoint import SHIPPED
from drivenmorph_jax.runtime.memory import trim_memory


def register(fixed: Source, moving: Source, *, strip: str = "auto", checkpoint: str | Path = SHIPPED,
             method: str = "drivenmorph", force: str = "lncc", contrast: str = "auto", stiffness: str = "auto",
             affine: bool | str | Path | np.ndarray = True,
             initial_transform: str | Path | Sequence[str | Path] | None = None, convention: str | None = None,
             refine_steps: int | None = None, fixed_labels: Source | None = None, moving_labels: Source | None = None,
             fixed_mask: Source | None = None, moving_mask: Source | None = None, mask_sense: str = "ignore",
             landmarks: str | Path | np.ndarray | None = None, extra_fixed: Source | Sequence[Source] = (),
             extra_moving: Source | Sequence[Source] = (),
             guide_labels: Sequence[int | str] | None = None, geometry: str = "sform", memory: float | None = None,
             quiet: bool = False) -> Result:
    """Register the image `moving` to `fixed`: files, nibabel images, or arrays with voxels of 1 mm.

    Both images are resampled to a working grid, the moving one through the affine. The field is computed there. It
    becomes a transform in millimetres, sampled on the images' own grids. So the images that are written are
    interpolated once.

    Args:
      strip: "auto": in an image that shows a whole head, the brain is found, see `brain_mask`, and it alone is
        registered; "yes": both images show heads; "no": neither does. The whole moving image is warped.
      checkpoint: folder of a training, for method "drivenmorph"; by default the weights that come with the package.
      method: "drivenmorph", or "demons", which needs no weights.
      force: for method "demons": "lncc" (local correlation), "intensity" (symmetric Demons force, for images of one
        scanner) or "mind" (the same on MIND descriptors, which do not change when an image is inverted).
      contrast: "same"; "other", such as T1 and T2: the moving image takes the values of the fixed one, see
        `images.contrast`; or "auto": "other" where the values of the affinely aligned images correlate by less than
        `SAME`.
      stiffness: of the field. "low": as the method finds it; "high": `demons.registered_stiffly` in its place, for
        images that have little in common, such as a patient and an atlas; or "auto": "high" where their `agreement` is
        below `LITTLE`, see `images.contrast`.
      affine: what is found first: True or "affine", "similarity" (rotation, translation and one scale) or "rigid";
        False or "none" where world coordinates agree already; else the file of an ITK affine, or a (4, 4) from the
        fixed to the moving world in RAS mm, which is used as it is.
      initial_transform: file of a transform from the fixed to the moving image, or several, as `Transform.load` takes
        them. It replaces the affine. A deformable one is where the registration starts, and the result and its inverse
        include it.
      convention: of this transform, as in `Transform.load`.
      refine_steps: for method "drivenmorph", iterations of Demons on the working grid between the averaged registration
        and the pass on the residual, see `network.refinement`; by default 5; 0: one forward pass of the network. For
        method "demons", iterations by local correlation after it, or by MIND with force "mind"; by default 0.
      fixed_labels, moving_labels: label maps on the grids of their images.
      fixed_mask, moving_mask: on the grids of their images, above 0 where tissue is missing or pathological. Masked
        voxels give no force, and the field inside is interpolated. An empty mask is no mask.
      mask_sense: "ignore", or "use" for masks that are above 0 where the image is to be used, such as those of ANTs.
      landmarks: points of the fixed image and where each lies in the moving image: a CSV file, or an array (N, 6) in
        RAS mm, as `transforms.points.read_landmarks` takes them. After the registration, they drive it on, see
        `demons.guidance`. Those that contradict others or are out of reach are left out, with a warning.
      guide_labels: labels of structures whose borders are brought to borders after the registration, such as 17; or
        "10=49", label 10 of the fixed image to 49 of the moving one. Both label maps are needed.
      extra_fixed, extra_moving: further images of the two brains, such as T2 beside T1, on any grids, aligned to their
        image: the same number of both, in the same order. They drive Demons, or the refinement of the network, together
        with the two images; the network itself sees these two alone. Checks and scores speak of these two.
      geometry: "sform" or "qform", the affine that holds where a file has both and they differ; or three letters such
        as "LAS", the directions of the voxel axes of files that have neither. Such files are refused otherwise.
      memory: bytes that may be used. Where the network needs more, it runs on images of half or a quarter of the
        resolution; the refinement still runs at full resolution.
      quiet: print nothing.

    Returns:
      A `Result`.

    Raises:
      InputError: an image that cannot be used, an unknown method, force or contrast, or memory that does not suffice.
        The memory is checked before it is allocated.
    """
    progress = Progress(quiet)
    request = Request(fixed=fixed, moving=moving, strip=strip, checkpoint=checkpoint, method=method, force=force,
                      contrast=contrast, stiffness=stiffness, affine=affine, initial_transform=initial_transform,
                      convention=convention, refine_steps=refine_steps, fixed_labels=fixed_labels,
                      moving_labels=moving_labels, fixed_mask=fixed_mask, moving_mask=moving_mask,
                      mask_sense=mask_sense, landmarks=landmarks, extra_fixed=extra_fixed,
                      extra_moving=extra_moving, guide_labels=guide_labels, geometry=geometry, memory=memory)
    return finished(begun(request, progress), progress)


def begun(request: Request, progress: Progress) -> Stripped:
    """The first two stages of `register`, read and strip. They can run while another pair is in the later stages."""
    with progress("read"):
        pair = read(request)
        if pair.scale != 1:
            progress.tell(f"lengths times {pair.scale:g},", end=" ")
    with progress("strip"):
        stripped = find_brains(pair)
        progress.tell("".join(f"{head}, " for head in stripped.heads), end="")
    return stripped


def finished(state: Stripped, progress: Progress) -> Result:
    """The stages of `register` from the affine on."""
    request = state.request
    method, guided = request.method, {"guide": guide} if state.landmarks or request.label_pairs else {}
    stages = {"affine": align, "compile" if method == "drivenmorph" else "plan": plan, "resample": prepare,
              method: deform, **guided, "transform": transfer, "score": score, "check": check}
    for name, stage in stages.items():
        with progress(name):
            state = stage(state)
            trim_memory()
            if stage is plan:
                progress.tell(f"memory {state.needed / 1e9:.1f} GB,", end=" ")
            if stage is deform and state.correlation is not None and state.contrast == "other":
                progress.tell(f"intensities correlate by {state.correlation:.2f}: the images are taken as of different "
                              "contrast,", end=" ")
            if stage is deform and state.agreement is not None and state.stiffness == "high":
                progress.tell(f"they agree by {state.agreement:.2f} only: a stiff field is used,", end=" ")
    return result_of(state, progress.seconds)
