"""Affine transforms in the form of ITK: files and SimpleITK objects.

Affines of this package are 4x4 matrices between RAS worlds, in mm. LPS, the frame of ITK and ANTs, is (-x, -y, z) of
RAS.
"""

import os

import numpy as np
import SimpleITK as sitk
from SimpleITK import _SimpleITK

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.files import replacing

FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS to LPS and back
AFFINE_ENDINGS = (".tfm", ".txt", ".mat")


def write_affine(path, transform):
    """Write T (4, 4), from RAS world to RAS world in mm, as an ITK affine in LPS.

    The file is text for .tfm and .txt, and MATLAB's format for .mat.

    Raises InputError where the file has another ending or cannot be written.
    """
    if not str(path).endswith(AFFINE_ENDINGS):
        raise InputError(f"{path} must end in {', '.join(AFFINE_ENDINGS)} to be written as an affine")
    with replacing(path) as temporary:
        sitk.WriteTransform(to_itk(transform), str(temporary))


def read_affine(path):
    """Read a linear transform of any ITK type from an ITK file, as T (4, 4) from RAS world to RAS world in mm.

    Raises InputError where the file cannot be read, or its transform is not linear, 3-D and invertible.
    """
    if not os.path.exists(path):
        raise InputError(f"{path} does not exist; check the path")
    check_whole(path)
    try:
        itk = read_itk(path)
    except RuntimeError as error:
        raise InputError(f"{path} is not an ITK transform; give a .tfm, .txt or .mat file") from error
    if itk.GetDimension() != 3 or not itk.IsLinear():
        raise InputError(f"{path} is not a linear 3-D transform; give an affine or rigid one")
    return usable(from_itk(itk), path)


def usable(matrix, path):
    """`matrix` (4, 4). Raises InputError, which names the file, where it is singular or not finite."""
    if not np.isfinite(matrix).all() or abs(np.linalg.det(matrix[:3, :3])) < 1e-6:
        raise InputError(f"{path} holds a singular or non-finite affine; compute it again")
    return matrix


def read_itk(path):
    """Read an ITK transform as a SimpleITK object. Raises RuntimeError where the file cannot be read."""
    return _of_its_type(_SimpleITK.ReadTransform(str(path)))


def flat(itk):
    """The transforms of a composite, and of the composites in it, in the order of its list; [itk] of another one."""
    if not isinstance(itk, sitk.CompositeTransform):
        return [itk]
    return [one for k in range(itk.GetNumberOfTransforms())
            for one in flat(_of_its_type(_SimpleITK.CompositeTransform_GetNthTransform(itk, k)))]


def _of_its_type(itk):
    # SimpleITK's own ReadTransform and GetNthTransform do this, too, and fail with some types: affines of the type
    # CenteredAffineTransform, which ITK itself writes, are no AffineTransform for it.
    try:
        return itk.Downcast()
    except RuntimeError:
        return itk


def check_whole(path):
    """Raises InputError where a text file or HDF5 file of ITK is cut short.

    ITK does not read the last line of a text without a newline, and takes parameters that are missing for those of the
    identity. From an HDF5 file that is cut short it prints pages.
    """
    with open(path, "rb") as file:
        content = file.read(48)
        if content[:8] == b"\x89HDF\r\n\x1a\n":
            place = 40 if content[8] < 2 else 28  # of the address where the file ends, by the version of its superblock
            whole = int.from_bytes(content[place:place + 8], "little") <= os.path.getsize(path)
        elif content[:16] == b"#Insight Transfo":
            lines = (content + file.read()).decode("latin-1").split("\n")
            given = [line.split(":")[0] for line in lines if ":" in line and "CompositeTransform" not in line]
            counts = {given.count(name) for name in ("Transform", "Parameters", "FixedParameters")}
            whole = not lines[-1] and len(counts) == 1
        else:
            return
    if not whole:
        raise InputError(f"{path} is cut short, or lacks the newline at its end; copy or write it again")


def to_itk(transform):
    """T (4, 4), in RAS mm, as a SimpleITK affine, in LPS mm."""
    lps = FLIP @ transform @ FLIP
    itk = sitk.AffineTransform(3)
    itk.SetMatrix(lps[:3, :3].ravel().tolist())
    itk.SetTranslation(lps[:3, 3].tolist())
    return itk


def from_itk(itk):
    """A linear SimpleITK transform of any type, in LPS mm, as T (4, 4) in RAS mm."""
    origin = np.array(itk.TransformPoint((0.0, 0.0, 0.0)))
    lps = np.eye(4)
    lps[:3, 3] = origin
    lps[:3, :3] = np.stack([itk.TransformPoint(e) - origin for e in np.eye(3).tolist()], axis=1)
    return FLIP @ lps @ FLIP
