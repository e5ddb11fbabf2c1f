"""Volumes from NIfTI files, checked; grids to work on; volumes back to NIfTI files.

World coordinates are RAS millimetres throughout. A grid is (shape, affine), and
world = affine @ (i, j, k, 1).
"""

import gzip
import math
import os

import nibabel
import numpy as np

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.images.volume import Volume, same_grid

MOST_VOXELS = 2**30
FINEST, COARSEST = 1e-2, 1e2  # mm: what no scan of a brain has, and no grid or blur could be made for
PATHS = (str, os.PathLike)


def load_image(source):
    """A 3-D image as a Volume of float32, from a file, a nibabel image, or an array with voxels of 1 mm.

    Raises InputError where the file cannot be read, is not one 3-D volume of finite and varying intensity
    with something above zero, or has no usable geometry.
    """
    data, image, path = _read_volume(source)
    with np.errstate(over="ignore"):  # what overflows becomes infinite, and is refused below
        data = data.astype(np.float32)
    if not np.isfinite(data).all():
        raise InputError(f"{path} has NaN or infinite voxels; replace them, for instance by 0")
    if data.min() == data.max():
        raise InputError(f"{path} has the same value in every voxel; give an image that shows a brain")
    if data.max() <= 0:
        raise InputError(f"{path} has no voxel above 0; shift its intensities so that the background is 0")
    return Volume(data, image.affine, image.header, path)


def load_labels(source, image=None):
    """A label map as a Volume of int32, from what `load_image` takes; `image`, where given, is the Volume it labels.

    Raises InputError as `load_image` does, and where labels are negative, fractional or all background, or
    lie on another grid than `image` (affines may differ by 1e-3).
    """
    data, source, path = _read_volume(source)
    if not np.isfinite(data).all():
        raise InputError(f"{path} has NaN or infinite voxels; give a label map of whole numbers")
    whole = np.rint(data)
    if np.abs(data - whole).max() > 1e-3:  # a scaled file misses whole numbers by rounding
        raise InputError(f"{path} has fractional values; give a label map of whole numbers, not an image")
    if whole.min() < 0 or float(whole.max()) > np.iinfo(np.int32).max:
        raise InputError(f"{path} has labels below 0 or above {np.iinfo(np.int32).max}; renumber its labels")
    if whole.max() == 0:
        raise InputError(f"{path} holds background only; give a label map with at least one label above 0")
    labels = Volume(whole.astype(np.int32), source.affine, source.header, path)
    if image is not None and not same_grid(labels, image):
        raise InputError(f"{path} is not on the grid of {image.path}; resample the labels onto that image")
    return labels


def open_nifti(source):
    """(nibabel NIfTI image of any dimension, its header checked but its voxels not yet read; what to call it).

    Args:
      source: a NIfTI or MGH file, a nibabel image, or an array, whose voxels count as 1 mm.

    Raises InputError where the file is missing, damaged, too large or without usable geometry.
    """
    image, path = _opened(source)
    if not image.shape or min(image.shape) < 1:
        raise InputError(f"{path} holds no voxels (shape {image.shape}); export it again")
    if math.prod(image.shape) > MOST_VOXELS:
        raise InputError(f"{path} claims {image.shape} voxels, more than 2^30; crop or downsample it")
    if int(image.header["xyzt_units"]) % 8 in (1, 3):  # metre, micron
        raise InputError(f"{path} does not measure in millimetres; rewrite its header in mm")
    spacing = np.linalg.norm(image.affine[:3, :3], axis=0)
    if not (np.isfinite(image.affine).all() and spacing.all()
            and abs(np.linalg.det(image.affine[:3, :3] / spacing)) > 1e-3):
        raise InputError(f"{path} has a singular or non-finite affine; repair its sform or qform")
    if spacing.min() < FINEST or spacing.max() > COARSEST:
        raise InputError(f"{path} has voxels of {' x '.join(f'{size:.3g}' for size in spacing)} mm; repair its header")
    return image, path


def _opened(source):
    if not isinstance(source, PATHS):
        if hasattr(source, "dataobj"):
            return nibabel.Nifti1Image.from_image(source), source.get_filename() or "the image"
        data = np.asarray(source)
        kept = np.int32 if data.dtype.kind in "biu" else np.float32  # NIfTI has no bool, and few read 64 bits
        return nibabel.Nifti1Image(data.astype(kept), np.eye(4)), "the array"
    path = str(source)
    if not os.path.exists(path):
        raise InputError(f"{path} does not exist; check the path")
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder; give a NIfTI file (.nii or .nii.gz)")
    try:
        image = nibabel.load(path)
    except Exception as error:  # damaged bytes make nibabel raise nearly anything
        raise _unreadable(path) from error
    if isinstance(image, nibabel.MGHImage):
        image = nibabel.Nifti1Image.from_image(image)
    if not isinstance(image, nibabel.Nifti1Pair):
        raise InputError(f"{path} is not a NIfTI file; convert it to .nii or .nii.gz")
    return image, path


def read_voxels(image, path):
    """The voxels of a nibabel image, scaled by its slope and intercept.

    Raises InputError where they are cut short or damaged, or are not real numbers.
    """
    if image.get_data_dtype().kind not in "biuf":
        raise InputError(f"{path} holds colour or complex voxels; convert it to one real number a voxel")
    try:
        if path.endswith((".gz", ".mgz")) and nibabel.is_proxy(image.dataobj):
            with gzip.open(path) as whole:  # only at the end of the file does gzip look at its checksum
                while whole.read(2**24):
                    pass
        return np.ascontiguousarray(image.dataobj)
    except Exception as error:  # gzip, zlib, the memory map and the size check each raise their own
        raise _unreadable(path) from error


def _read_volume(source):
    image, path = open_nifti(source)
    shape, rest = image.shape[:3], image.shape[3:]
    if len(shape) < 3 or any(n > 1 for n in rest):
        raise InputError(f"{path} has shape {image.shape}; give a single 3-D volume")
    if min(shape) < 2:
        raise InputError(f"{path} has shape {shape}; give a volume of at least 2 voxels along every axis")
    return read_voxels(image, path).reshape(shape), image, path


def _unreadable(path):
    return InputError(f"{path} cannot be read as NIfTI (damaged, cut short or another format); get it anew")
