"""World-space transforms and their files: displacements in RAS mm on a grid, and 4x4 affines.

Everything pulls back. x is a point of the fixed world, y of the moving world, both RAS mm. W is the affine of
the working grid, which lies in the fixed world, u the field found on it in voxels, T the affine alignment:

    fixed to moving   y = T d(x),        d(x) = W (w + u(w)),           w = W^-1 x
    moving to fixed   x = d^-1(T^-1 y),  d^-1(z) = W (w + u_inv(w)),    w = W^-1 z

A file holds the displacement y - x (or x - y). LPS, the world of ITK and ANTs, is (-x, -y, z) of RAS.
"""

import os

import numpy as np
import SimpleITK as sitk

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.files import replacing

FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS to LPS and back
AFFINE_ENDINGS = (".tfm", ".txt", ".mat")


def write_affine(path, transform):
    """Write T (4, 4), RAS world to RAS world, as an ITK affine (LPS): text in .tfm and .txt, MATLAB in .mat.

    Raises InputError where it cannot be written.
    """
    if not str(path).endswith(AFFINE_ENDINGS):
        raise InputError(f"{path} must end in {', '.join(AFFINE_ENDINGS)} to be written as an affine")
    with replacing(path) as temporary:
        sitk.WriteTransform(to_itk(transform), str(temporary))


def read_affine(path):
    """The linear transform in an ITK file, whatever its ITK type, as T (4, 4) from RAS world to RAS world.

    Raises InputError where the file cannot be read, or its transform is not linear, 3-D and invertible.
    """
    if not os.path.exists(path):
        raise InputError(f"{path} does not exist; check the path")
    try:
        itk = sitk.ReadTransform(str(path))
    except RuntimeError as error:
        raise InputError(f"{path} is not an ITK transform; give a .tfm, .txt or .mat file") from error
    if itk.GetDimension() != 3 or not itk.IsLinear():
        raise InputError(f"{path} is not a linear 3-D transform; give an affine or rigid one")
    transform = from_itk(itk)
    if not np.isfinite(transform).all() or abs(np.linalg.det(transform[:3, :3])) < 1e-6:
        raise InputError(f"{path} holds a singular or non-finite affine; compute it again")
    return transform


def to_itk(transform):
    """T (4, 4) in RAS as a SimpleITK affine, which lives in LPS."""
    lps = FLIP @ transform @ FLIP
    itk = sitk.AffineTransform(3)
    itk.SetMatrix(lps[:3, :3].ravel().tolist())
    itk.SetTranslation(lps[:3, 3].tolist())
    return itk


def from_itk(itk):
    """Any linear SimpleITK transform, in LPS, as T (4, 4) in RAS."""
    origin = np.array(itk.TransformPoint((0.0, 0.0, 0.0)))
    lps = np.eye(4)
    lps[:3, 3] = origin
    lps[:3, :3] = np.stack([itk.TransformPoint(e) - origin for e in np.eye(3).tolist()], axis=1)
    return FLIP @ lps @ FLIP
