"""Two images in; aligned image, transforms, force and a picture out: `register` runs the stages."""

from drivenmorph_jax.registration.align import align
from drivenmorph_jax.registration.deform import deform
from drivenmorph_jax.registration.plan import plan
from drivenmorph_jax.registration.prepare import prepare
from drivenmorph_jax.registration.progress import Progress
from drivenmorph_jax.registration.read import Request, read
from drivenmorph_jax.registration.result import result_of
from drivenmorph_jax.registration.score import score
from drivenmorph_jax.registration.transfer import transfer
from drivenmorph_jax.runtime.checkpoint import SHIPPED


def register(fixed, moving, *, checkpoint=SHIPPED, method="drivenmorph", force="lncc", contrast="auto", affine=True,
             refine_steps=None, fixed_labels=None, moving_labels=None, fixed_mask=None, moving_mask=None, memory=None,
             quiet=False):
    """Register the image `moving` to `fixed`: files, nibabel images, or arrays with voxels of 1 mm.

    The fixed image is resampled to a working grid, the moving one to the same grid through the affine. The field found
    there becomes a transform in millimetres, sampled on the images' own grids, so the voxels that are written are
    interpolated once.

    Args:
      checkpoint: a training's folder, for method "drivenmorph"; by default the weights that come with the package.
      method: "drivenmorph", or "demons", which needs no weights.
      force: of method "demons": "lncc" (local correlation), "intensity" (symmetric Demons force, for images of one
        scanner) or "mind" (the same on MIND descriptors, which do not change when an image is inverted).
      contrast: "same"; "other", as of T1 and T2: the moving image takes the fixed one's values, see `images.contrast`;
        or "auto": "other" where the images' values correlate by less than `SAME` once they are affinely aligned.
      affine: True to find one first; False where world coordinates agree already; else an ITK file of an affine, or a
        (4, 4) from the fixed to the moving world in RAS mm, which is used as it is.
      refine_steps: iterations of Demons on the working grid between the network's forward and backward registration
        and its passes on the residual, see `network.refinement`; 0: the network once, forward. After method "demons":
        iterations by local correlation, or by MIND after force "mind". By default 10, and 0 after Demons.
      fixed_labels, moving_labels: label maps on the grids of their images.
      fixed_mask, moving_mask: on the grids of their images, above 0 where tissue is missing or sick: no force is taken
        from there, and the field is interpolated inside.
      memory: bytes that may be used. Where the network would need more, it gets images of half or a quarter of the
        resolution; the refinement still runs at full resolution.
      quiet: print nothing.

    Returns:
      A `Result`.

    Raises:
      InputError: an image that cannot be used, an unknown method, force or contrast, or memory that does not suffice,
        before it is taken.
    """
    progress = Progress(quiet)
    state = Request(fixed=fixed, moving=moving, checkpoint=checkpoint, method=method, force=force, contrast=contrast,
                    affine=affine, refine_steps=refine_steps, fixed_labels=fixed_labels, moving_labels=moving_labels,
                    fixed_mask=fixed_mask, moving_mask=moving_mask, memory=memory)
    stages = {"read": read, "affine": align, "compile" if method == "drivenmorph" else "plan": plan,
              "resample": prepare, method: deform, "transform": transfer, "score": score}
    for name, stage in stages.items():
        with progress(name):
            state = stage(state)
            if stage is plan:
                progress.tell(f"memory {state.needed / 1e9:.1f} GB,", end=" ")
            if stage is deform and state.correlation is not None and state.contrast == "other":
                progress.tell(f"the values correlate by {state.correlation:.2f}: registered as of different contrast,",
                              end=" ")
    return result_of(state, progress.seconds)
