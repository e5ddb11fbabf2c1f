"""Files of transforms: displacement fields with their JSON sidecars, forces, and ITK composites.

A displacement is in RAS mm on a grid, as `transforms.world` defines it. LPS, the frame of ITK and ANTs, is (-x, -y, z)
of RAS.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.files import json_text, replacing
from drivenmorph_jax.images import writing
from drivenmorph_jax.images.reading import open_nifti, read_voxels
from drivenmorph_jax.transforms.itk import FLIP, to_itk
from drivenmorph_jax.transforms.world import by_planes, map_points

INTENTS = {"LPS": 1007, "RAS": 1006}  # NIfTI intents: vector; displacement vector


def write_displacement(path, displacement, like, direction, frame="LPS", about=()):
    """Write a displacement field as a NIfTI file, with a JSON sidecar.

    The file is (X, Y, Z, 1, 3) float32, in mm. In the frame "LPS" it has intent 1007, which ITK, SimpleITK and ANTs
    read as a displacement field. In the frame "RAS" it has intent 1006.

    Args:
      path: the NIfTI file. The sidecar gets the same name with the ending .json.
      displacement: (X, Y, Z, 3) in RAS mm.
      like: the Volume on whose grid the displacement lies.
      direction: from which image to which the points move, in words, e.g. "fixed to moving".
      frame: "LPS" or "RAS".
      about: further items of the sidecar.

    Raises InputError where a file cannot be written.
    """
    _write_vectors(path, displacement, like, frame, {
        "Content": "displacement d(x) of the total transform, affine and deformable: x moves to x + d(x)",
        "Direction": direction,
        "Use": "pull-back: an image of the space moved to is resampled at x + d(x) onto the grid below",
        **dict(about)})


def write_force(path, force, like, content):
    """Write driving forces (X, Y, Z, 3), given in RAS mm, in the layout of `write_displacement`, in LPS mm.

    The sidecar says `content`.
    """
    _write_vectors(path, force, like, "LPS", {"Content": content})


def _write_vectors(path, vectors, like, frame, sidecar):
    signs = np.diag(FLIP)[:3] if frame == "LPS" else np.ones(3)
    stored = (vectors * signs).astype(np.float32)[..., None, :]
    writing.save(path, stored, like, INTENTS[frame])
    sidecar = sidecar | {"Frame": frame, "Unit": "mm", "GridShape": list(vectors.shape[:3]),
                         "GridAffineRAS": like.affine.tolist(), "FieldCRC32": _checksum(stored)}
    with replacing(_sidecar(path)) as temporary:
        temporary.write_text(json_text(sidecar, indent=2) + "\n")


def _checksum(stored):
    """CRC-32 of the vectors as they are stored. It tells a sidecar whether the field beside it is its own."""
    return zlib.crc32(np.ascontiguousarray(stored, "<f4"))


def _read_sidecar(path, stored):
    """The items of the JSON sidecar of a displacement file, empty where it has none that can be read.

    `stored` (X, Y, Z, 1, 3) are the vectors in the file.

    Raises InputError where the sidecar was written for other vectors or for something else than a displacement.
    """
    sidecar = _sidecar(path)
    try:
        about = json.loads(Path(sidecar).read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(about, dict) or "Linear" not in about and "FieldCRC32" not in about:
        return {}
    if about.get("GridShape", list(stored.shape[:3])) != list(stored.shape[:3]) or (
            "FieldCRC32" in about and about["FieldCRC32"] != _checksum(stored)):
        raise InputError(f"{sidecar} was written for another field than the one in {path}: delete it, or bring that "
                         "field back")
    if "Direction" not in about:
        raise InputError(f"{path} is no displacement: {sidecar} calls it a {about.get('Content', 'field')}")
    return about


def read_displacement(path):
    """(displacement, affine, header) of `read_field`."""
    return read_field(path)[:3]


def read_field(path, geometry="sform"):
    """Read a displacement field from a NIfTI file. Intent 1007 means LPS and 1006 RAS.

    `geometry` is that of `images.geometry.placed`.

    Returns:
      The displacement (X, Y, Z, 3) in RAS mm, float32; the affine of its grid; the header of the file; the items of its
      sidecar.

    Raises InputError where the file cannot be read, is not a displacement field, holds NaN or infinite values, or has a
    sidecar that belongs to another field.
    """
    image, path = open_nifti(path, geometry)
    frames = {intent: frame for frame, intent in INTENTS.items()}
    frame = frames.get(int(image.header["intent_code"]))
    if frame is None or image.ndim != 5 or image.shape[3:] != (1, 3):
        raise InputError(f"{path} is not a displacement field; give a NIfTI of shape (X, Y, Z, 1, 3) "
                         "and intent 1007 (LPS) or 1006 (RAS)")
    stored = read_voxels(image, path).astype(np.float32)
    if not np.isfinite(stored).all():
        raise InputError(f"{path} has NaN or infinite displacements; compute it again")
    about, displacement = _read_sidecar(path, stored), stored[..., 0, :].copy()
    if frame == "LPS":
        displacement[..., :2] *= -1
    return displacement, image.affine, image.header, about


def write_composite(path, transform):
    """Write a `Transform` as an ITK composite (.h5): a displacement field, then the affine part.

      x -> linear^-1(x + d(x)) on the grid of the transform,    then x -> linear x
    """
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
