"""The public names as a caller uses them. mypy reads this file, and nothing runs it: each must have its types."""
# mypy: disallow-untyped-calls, disallow-untyped-defs, warn-return-any

from pathlib import Path

import jax
import ml_collections
import nibabel
import numpy as np

import drivenmorph_jax as dm


def fields(u: jax.Array, image: np.ndarray) -> jax.Array:
    warped: jax.Array = dm.warp(image, u) + dm.warp_nearest(image, u)
    back: jax.Array = dm.compose(dm.inverse(u), dm.coarse_inverse(u))
    flow: jax.Array = dm.exponential(dm.gaussian_smooth(u, 1.5), steps=5)
    return dm.jacobian_determinant(back + flow) + warped[..., 0]


def registered(fixed: np.ndarray, moving: jax.Array) -> jax.Array:
    found: dm.demons.Registered = dm.demons.demons(fixed, moving, force=dm.forces.symmetric_force, iterations=(4, 2))
    by_name: jax.Array = dm.demons.registered(fixed, moving, "mind")
    p, energy = dm.forces.lncc_force(fixed, moving, 1.0)
    shorter: jax.Array = dm.forces.clip_length(p, 1.0)
    return dm.demons.refine(fixed, moving, by_name + found.u + shorter, 10) * energy


def files(path: Path, checkpoint: str) -> nibabel.Nifti1Image:
    result: dm.Result = dm.register("fixed.nii.gz", path, checkpoint=checkpoint, affine=np.eye(4), memory=4e9)
    result.save("out", ["itk"], ("sub-01", "T1w", "MNI"))
    transform: dm.Transform = dm.Transform.load(path).compose(result.transform)
    transform.inverse.save(path, "ras")
    points: np.ndarray = transform.points([[10.0, -20.0, 30.0]])
    transform.points(points)
    return transform.apply(dm.load_image(path).data, "nearest")


def trained(config: ml_collections.ConfigDict, workdir: Path) -> dict | None:
    config, params, about = dm.load_checkpoint(workdir, ["--config.steps=3"])
    try:
        dm.evaluate_checkpoint(workdir, "out", split="val")
    except dm.InputError:
        return about
    return dm.train_and_evaluate(config, workdir)
