"""The geometry of a file: which of its two affines holds, and where other tools take the other one.

A NIfTI header can hold two maps from voxels to RAS mm, each with a code. A code of 0 means that the map is not given.
The rule here is that of nibabel, FSL and SPM: the sform where it is given, else the qform. ITK (SimpleITK, ANTs,
Slicer, greedy) takes the sform only where sform_code is 1, and else the qform where that is given. Without either map a
file does not say which side is left, and no side is guessed.
"""

import itertools
import re
import warnings

import nibabel
import numpy as np
from nibabel.spatialimages import HeaderDataError

from drivenmorph_jax.errors import InputError, InputWarning

AXES = re.compile("[LR][AP][SI]|[LR][SI][AP]|[AP][LR][SI]|[AP][SI][LR]|[SI][LR][AP]|[SI][AP][LR]")
RIGHT_ANGLE = 1e-4  # cosine of two axes, from which ITK calls an affine sheared
DIFFERENT = 0.1  # voxels between the places of a corner by qform and sform, from which they differ


def checked(geometry):
    """`geometry`, if it is "sform", "qform" or three letters such as "LAS". Raises InputError otherwise."""
    if geometry not in ("sform", "qform") and not AXES.fullmatch(geometry):
        raise InputError(f"geometry is {geometry!r}: set it to sform, to qform, or to the directions of the voxel "
                         "axes, such as LAS")
    return geometry


def placed(image, path, geometry="sform"):
    """The nibabel image with the affine that holds. A warning names a file about which tools disagree.

    Args:
      image: a NIfTI image.
      path: its name in messages.
      geometry: "sform" or "qform", the map that holds where a file has both; or three letters such as "LAS", the
        directions of the voxel axes of files that have neither. Their centre is then the origin of the world.

    Raises InputError where the file has neither map and `geometry` does not say its directions, or where the affine
    cannot be used.
    """
    forms = _forms(image.header)
    used = geometry if geometry in forms else next(iter(forms), None)
    if used:
        affine = forms[used]
    elif AXES.fullmatch(geometry):
        affine = _by_axes(geometry, image)
    else:
        raise InputError(f"{path} does not say which side is left (its qform_code and sform_code are 0): give the "
                         "directions of its voxel axes by --geometry, such as LAS, or repair its header")
    doubt = disagreement(image.header, image.shape, path, used)
    if doubt:
        warnings.warn(doubt, InputWarning, stacklevel=2)
    if used and np.array_equal(affine, image.affine, equal_nan=True):
        return image
    try:
        return type(image)(image.dataobj, affine, image.header)
    except (HeaderDataError, ValueError, np.linalg.LinAlgError) as error:
        raise InputError(f"{path} has a singular or non-finite affine; repair its sform or qform") from error


def disagreement(header, shape, path, used="sform"):
    """One sentence where other tools place the file elsewhere, else an empty text. `used` is the map that holds."""
    forms = _forms(header)
    skewed = forms.get(used) is not None and sheared(forms[used])
    if len(forms) == 2:
        sides = (*shape, 1, 1, 1)[:3]
        corners = np.array(list(itertools.product(*((0, n - 1) for n in sides), (1,))))
        apart = np.linalg.norm(corners @ (forms["sform"] - forms["qform"])[:3].T, axis=1).max()
        if apart > DIFFERENT * np.linalg.norm(forms["sform"][:3, :3], axis=0).min():
            itk = "sform" if int(header["sform_code"]) == 1 and not sheared(forms["sform"]) else "qform"
            written = ", and ITK does not read what is written on this sheared grid" if skewed else ""
            return (f"qform and sform of {path} differ by {apart:.3g} mm; the {used} is used here, and ITK uses the "
                    f"{itk}: --geometry chooses{written}")
    if skewed:
        return (f"the voxel axes of {path} are not at right angles; ITK does not read such a file, nor what is written "
                "on its grid: resample it onto another grid if you need that")
    return ""


def sheared(affine):
    """Whether the axes of an affine (4, 4) are not at right angles."""
    with np.errstate(all="ignore"):  # an affine that cannot be used is refused by the caller
        axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.abs(axes.T @ axes - np.eye(3)).max() > RIGHT_ANGLE)


def _forms(header):
    """The maps that a header gives: {"sform": (4, 4), "qform": (4, 4)}, without those whose code is 0."""
    forms = {}
    for name, get in (("sform", header.get_sform), ("qform", header.get_qform)):
        try:
            form, code = get(coded=True)
        except HeaderDataError:  # no rotation: readers fall back on the other map
            continue
        if code > 0:
            forms[name] = form
    return forms


def _by_axes(geometry, image):
    """The affine whose voxel axes point in the directions of three letters, with the centre of the volume at 0."""
    affine, sides = np.eye(4), np.array((*image.shape, 1, 1, 1)[:3])
    for k, (axis, sign) in enumerate(nibabel.orientations.axcodes2ornt(geometry)):
        affine[:3, k] = sign * abs(image.header["pixdim"][k + 1]) * np.eye(3)[int(axis)]
    affine[:3, 3] = -affine[:3, :3] @ ((sides - 1) / 2)
    return affine
