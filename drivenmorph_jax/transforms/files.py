"""World-space transforms and their files: displacements in RAS mm on a grid, and 4x4 affines.

Everything pulls back. x is a point of the fixed world, y of the moving world, both RAS mm. W is the affine of
the working grid, which lies in the fixed world, u the field found on it in voxels, T the affine alignment:

    fixed to moving   y = T d(x),        d(x) = W (w + u(w)),           w = W^-1 x
    moving to fixed   x = d^-1(T^-1 y),  d^-1(z) = W (w + u_inv(w)),    w = W^-1 z

A file holds the displacement y - x (or x - y). LPS, the world of ITK and ANTs, is (-x, -y, z) of RAS.
"""

import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.files import json_text, replacing
from drivenmorph_jax.images import writing
from drivenmorph_jax.images.reading import open_nifti, read_voxels
from drivenmorph_jax.transforms.itk import FLIP, to_itk
from drivenmorph_jax.transforms.world import by_planes, map_points

INTENTS = {"LPS": 1007, "RAS": 1006}  # vector; displacement vector


def write_displacement(path, displacement, like, direction, frame="LPS", about=()):
    """Write a displacement (X, Y, Z, 3) in RAS mm on the grid of the Volume `like`, and a JSON sidecar.

    The file is NIfTI, (X, Y, Z, 1, 3) float32 in mm: frame "LPS" with intent 1007, which ITK, SimpleITK and
    ANTs read as a displacement field, or "RAS" with intent 1006. `direction` says in words from which image
    to which the points move, e.g. "fixed to moving"; the sidecar gets the items of `about` too. Raises InputError
    where it cannot be written.
    """
    _write_vectors(path, displacement, like, frame, {
        "Content": "displacement d(x) of the total transform, affine and deformable: x moves to x + d(x)",
        "Direction": direction,
        "Use": "pull-back: an image of the space moved to is resampled at x + d(x) onto the grid below",
        **dict(about)})


def write_force(path, force, like, content):
    """Write driving forces (X, Y, Z, 3) in RAS mm as `write_displacement` writes: LPS mm, sidecar with `content`."""
    _write_vectors(path, force, like, "LPS", {"Content": content})


def _write_vectors(path, vectors, like, frame, sidecar):
    signs = np.diag(FLIP)[:3] if frame == "LPS" else np.ones(3)
    writing.save(path, (vectors * signs).astype(np.float32)[..., None, :], like, INTENTS[frame])
    sidecar = sidecar | {"Frame": frame, "Unit": "mm", "GridShape": list(vectors.shape[:3]),
                         "GridAffineRAS": like.affine.tolist()}
    with replacing(_sidecar(path)) as temporary:
        temporary.write_text(json_text(sidecar, indent=2) + "\n")


def read_sidecar(path):
    """What the JSON beside a displacement file says; nothing where there is none that can be read."""
    try:
        return json.loads(Path(_sidecar(path)).read_text())
    except (OSError, ValueError):
        return {}


def read_displacement(path):
    """A displacement file as (displacement (X, Y, Z, 3) in RAS mm, float32; affine of its grid; its header).

    Intent 1007 is taken as LPS and 1006 as RAS. Raises InputError for any other file.
    """
    image, path = open_nifti(path)
    frames = {intent: frame for frame, intent in INTENTS.items()}
    frame = frames.get(int(image.header["intent_code"]))
    if frame is None or image.ndim != 5 or image.shape[3:] != (1, 3):
        raise InputError(f"{path} is not a displacement field; give a NIfTI of shape (X, Y, Z, 1, 3) "
                         "and intent 1007 (LPS) or 1006 (RAS)")
    displacement = read_voxels(image, path)[..., 0, :].astype(np.float32)
    if not np.isfinite(displacement).all():
        raise InputError(f"{path} has NaN or infinite displacements; compute it again")
    if frame == "LPS":
        displacement[..., :2] *= -1
    return displacement, image.affine, image.header


def write_composite(path, transform):
    """Write a `Transform` as ITK's composite, .h5: the field on its grid, x -> linear^-1(x + d(x)), then the affine."""
    back, grid = np.linalg.inv(transform.linear), transform.grid
    near = by_planes(transform.displacement.shape, grid.affine,
                      lambda i, x: map_points(back, x + transform.displacement[i]) - x)
    field = sitk.GetImageFromArray((near * np.diag(FLIP)[:3]).transpose(2, 1, 0, 3).astype(float), isVector=True)
    lps, spacing = FLIP @ grid.affine, grid.spacing
    field.SetSpacing(spacing.tolist())
    field.SetOrigin(lps[:3, 3].tolist())
    field.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    composite = sitk.CompositeTransform([to_itk(transform.linear), sitk.DisplacementFieldTransform(field)])
    with replacing(path) as temporary:
        sitk.WriteTransform(composite, str(temporary))


def _sidecar(path):
    path = str(path)
    return path[: -len(".nii.gz" if path.endswith(".nii.gz") else ".nii")] + ".json"
