"""Files of transforms: displacement fields with their JSON sidecars, forces, and ITK composites.

A displacement is in RAS mm on a grid, as `transforms.world` defines it. LPS, the frame of ITK and ANTs, is (-x, -y, z)
of RAS.
"""

import json
import re
import zlib
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.files import replacing, write_json
from drivenmorph_jax.images import writing
from drivenmorph_jax.transforms.itk import FLIP, to_itk

VECTOR, DISPLACEMENT = 1007, 1006  # NIfTI intents
INTENTS = {"LPS": VECTOR, "RAS": DISPLACEMENT}


def write_displacement(path, displacement, like, direction, frame="LPS", intent=None, about=()):
    """Write a displacement field as a NIfTI file, with a JSON sidecar.

    The file is (X, Y, Z, 1, 3) float32, in mm. ITK, SimpleITK and ANTs read it as a displacement field where the frame
    is "LPS" and the intent 1007.

    Args:
      path: the NIfTI file. The sidecar gets the same name with the ending .json.
      displacement: (X, Y, Z, 3) in RAS mm.
      like: the Volume on whose grid the displacement lies.
      direction: from which image to which the points move, in words, e.g. "fixed to moving".
      frame: "LPS" or "RAS".
      intent: NIfTI intent code; by default 1007 for "LPS" and 1006 for "RAS".
      about: further items of the sidecar.

    Raises InputError where a file cannot be written.
    """
    _write_vectors(path, displacement, like, frame, intent, {
        "Content": "displacement d(x) of the total transform, affine and deformable: x moves to x + d(x)",
        "Direction": direction,
        "Use": "pull-back: an image of the space moved to is resampled at x + d(x) onto the grid below",
        **dict(about)})


def write_force(path, force, like, content):
    """Write driving forces (X, Y, Z, 3), given in RAS mm, in the layout of `write_displacement`, in LPS mm.

    The sidecar says `content`.
    """
    _write_vectors(path, force, like, "LPS", None, {"Content": content})


def _write_vectors(path, vectors, like, frame, intent, sidecar):
    signs = np.float32(np.diag(FLIP)[:3] if frame == "LPS" else np.ones(3))
    writing.save_vectors(path, vectors, signs, like, INTENTS[frame] if intent is None else intent)
    sidecar = sidecar | {"Frame": frame, "Unit": "mm", "GridShape": list(vectors.shape[:3]),
                         "GridAffineRAS": like.affine.tolist(), "FieldCRC32": _checksum(vectors, signs)}
    write_json(_sidecar(path), sidecar)


def _checksum(vectors, signs=1):
    """CRC-32 of the vectors as they are stored. It tells a sidecar whether the field beside it is its own."""
    found = 0
    for plane in vectors:  # so that no second field is in memory
        found = zlib.crc32(np.ascontiguousarray(plane * signs, "<f4"), found)
    return found


def read_sidecar(path, stored):
    """The items of the JSON sidecar of a displacement file, empty where it has none that can be read.

    `stored` are the vectors in the file.

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


def learn2reg_name(fixed, moving):
    """The name that Learn2Reg's evaluation gives the field of two images.

    Names that end in four digits, the subject, or in twice four, subject and modality, such as OASIS_0438_0000, give
    disp_FFFF_0000_MMMM_0000.nii.gz. Where the modalities are 0000 and 0001, they are left out. Other names give
    disp_<fixed>_<moving>.nii.gz.
    """
    found = [re.search(r"(?<!\d)(\d{4})(?:_(\d{4}))?$", name) for name in (fixed, moving)]
    if all(found):
        (fixed, one), (moving, other) = ((match[1], match[2] or "0000") for match in found)
        if (one, other) != ("0000", "0001"):
            fixed, moving = f"{fixed}_{one}", f"{moving}_{other}"
    return f"disp_{fixed}_{moving}.nii.gz"


def write_composite(path, field):
    """Write a `transforms.maps.Field` as an ITK composite (.h5): its displacement n, then its affine part L.

      x -> L (x + n(x))

    n is 0 at the rim of its grid. ITK takes it as 0 beyond, so the affine part continues there.
    """
    image = sitk.GetImageFromArray((field.near * np.diag(FLIP)[:3]).transpose(2, 1, 0, 3).astype(float), isVector=True)
    lps, spacing = FLIP @ field.affine, np.linalg.norm(field.affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    composite = sitk.CompositeTransform([to_itk(field.linear), sitk.DisplacementFieldTransform(image)])
    with replacing(path) as temporary:
        sitk.WriteTransform(composite, str(temporary))


def _sidecar(path):
    path = str(path)
    return path[: -len(".nii.gz" if path.endswith(".nii.gz") else ".nii")] + ".json"
