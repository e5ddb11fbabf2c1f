"""Reading of images and label maps, with checks, from NIfTI and MGH files, nibabel images and arrays."""

import gzip
import math
import os

import nibabel
import numpy as np

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.images.geometry import placed
from drivenmorph_jax.images.volume import Volume, on_grid, same_grid

MOST_VOXELS = 2**30
# Limits of the voxel size in mm. No brain scan lies beyond them, and no working grid or blur could be computed there.
FINEST, COARSEST = 1e-2, 1e2
PATHS = (str, os.PathLike)
Source = str | os.PathLike | nibabel.spatialimages.SpatialImage | np.ndarray  # an image: a file, or in memory


def load_image(source: Source, geometry: str = "sform") -> Volume:
    """Read a 3-D image as a Volume of float32, from a file, a nibabel image, or an array with voxels of 1 mm.

    `geometry` is that of `images.geometry.placed`.

    Raises InputError where the file cannot be read or is not one 3-D volume, where its intensities are not finite or do
    not vary, or where its geometry cannot be used.
    """
    data, image, path = _read_volume(source, geometry)
    with np.errstate(over="ignore"):  # values that overflow become infinite, and are refused below
        data = data.astype(np.float32)
    if not np.isfinite(data).all():
        raise InputError(f"{path} has NaN or infinite voxels; replace them, for instance by 0")
    if data.min() == data.max():
        raise InputError(f"{path} has the same value in every voxel; give an image that shows a brain")
    return Volume(data, image.affine, image.header, path)


def load_grid(source: Source, geometry: str = "sform") -> Volume:
    """Read the grid of an image or a series as a Volume of zeros, from any source that `load_image` takes.

    The voxels are not read: they may be constant, or not finite. `geometry` is that of `images.geometry.placed`.

    Raises InputError where the file is missing, damaged or has no usable geometry.
    """
    image, path = open_nifti(source, geometry)
    return on_grid(_shape_3d(image, path), image.affine, image.header, path)


def load_labels(source: Source, image: Volume | None = None, geometry: str = "sform") -> Volume:
    """Read a label map as a Volume of int32, from any source that `load_image` takes.

    Args:
      source: a file, a nibabel image, or an array with voxels of 1 mm.
      image: the Volume that is labelled, or None. With it, the grids are compared (affines may differ by 1e-3).
      geometry: as in `images.geometry.placed`.

    Raises InputError where the file cannot be read or is not one 3-D volume with a usable geometry, where labels are
    negative, fractional or all background, or where they lie on another grid than `image`.
    """
    labels = _whole_numbers(source, image, geometry)
    if not labels.data.any():
        raise InputError(f"{labels.path} holds background only; give a label map with at least one label above 0")
    return labels


def load_mask(source: Source, image: Volume, geometry: str = "sform") -> Volume | None:
    """Read a mask of `image` as a Volume of int32 that is above 0 inside; None where it is empty.

    Arguments and errors are those of `load_labels`.
    """
    mask = _whole_numbers(source, image, geometry)
    return mask if mask.data.any() else None


def _whole_numbers(source, image, geometry):
    data, source, path = _read_volume(source, geometry)
    if not np.isfinite(data).all():
        raise InputError(f"{path} has NaN or infinite voxels; give a label map of whole numbers")
    whole = np.rint(data)
    if np.abs(data - whole).max() > 1e-3:  # a file with a scale factor has whole numbers up to rounding
        raise InputError(f"{path} has fractional values; give a label map of whole numbers, not an image")
    if whole.min() < 0 or float(whole.max()) > np.iinfo(np.int32).max:
        raise InputError(f"{path} has labels below 0 or above {np.iinfo(np.int32).max}; renumber its labels")
    labels = Volume(whole.astype(np.int32), source.affine, source.header, path)
    if image is not None and not same_grid(labels, image):
        raise InputError(f"{path} is not on the grid of {image.path}; resample the labels onto that image")
    return labels


def open_nifti(source, geometry="sform"):
    """Open an image of any number of dimensions. The header is checked; the voxels are not read yet.

    Args:
      source: a NIfTI or MGH file, a nibabel image, or an array with voxels of 1 mm.
      geometry: as in `images.geometry.placed`.

    Returns:
      The nibabel NIfTI image, and the name that messages give it.

    Raises InputError where the file is missing, damaged, too large or without a usable geometry.
    """
    image, path = _opened(source)
    if not image.shape or min(image.shape) < 1:
        raise InputError(f"{path} holds no voxels (shape {image.shape}); export it again")
    if math.prod(image.shape) > MOST_VOXELS:
        raise InputError(f"{path} claims {image.shape} voxels, more than 2^30; crop or downsample it")
    if int(image.header["xyzt_units"]) % 8 in (1, 3):  # metre, micron
        raise InputError(f"{path} does not measure in millimetres; rewrite its header in mm")
    image = placed(image, path, geometry)
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
            return _as_nifti(source), source.get_filename() or "the image"
        data = np.asarray(source)
        kind = {"?": np.uint8, "e": np.float32}.get(data.dtype.char, data.dtype)  # NIfTI has neither bool nor half
        try:
            return nibabel.Nifti1Image(data.astype(kind), np.eye(4), dtype=kind), "the array"
        except nibabel.spatialimages.HeaderDataError as error:
            raise InputError(f"the array has type {kind}, which NIfTI lacks; convert it to float64") from error
    path = str(source)
    if not os.path.exists(path):
        raise InputError(f"{path} does not exist; check the path")
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder; give a NIfTI file (.nii or .nii.gz)")
    try:
        image = nibabel.load(path)
    except Exception as error:  # damaged bytes make nibabel raise exceptions of nearly any kind
        raise _unreadable(path) from error
    if isinstance(image, nibabel.MGHImage):
        image = _as_nifti(image)
    if not isinstance(image, nibabel.Nifti1Pair):
        raise InputError(f"{path} is not a NIfTI file; convert it to .nii or .nii.gz")
    return image, path


def _as_nifti(image):
    converted = nibabel.Nifti1Image.from_image(image)
    if isinstance(image, nibabel.MGHImage):
        converted.header.set_xyzt_units("mm", "msec")  # the units of the format, which nibabel leaves unknown
    return converted


def read_voxels(image, path):
    """The voxels of a nibabel image, scaled by its slope and intercept.

    Raises InputError where the data are cut short or damaged, or are not real numbers.
    """
    if image.get_data_dtype().kind not in "biuf":
        raise InputError(f"{path} holds colour or complex voxels; convert it to one real number a voxel")
    try:
        if path.endswith((".gz", ".mgz")) and nibabel.is_proxy(image.dataobj):
            with gzip.open(path) as whole:  # gzip compares the checksum only at the end of the file
                while whole.read(2**24):
                    pass
        return np.ascontiguousarray(image.dataobj)
    except Exception as error:  # gzip, zlib, the memory map and the size check raise different exceptions
        raise _unreadable(path) from error


def _read_volume(source, geometry):
    image, path = open_nifti(source, geometry)
    if any(n > 1 for n in image.shape[3:]):
        raise InputError(f"{path} has shape {image.shape}; give a single 3-D volume")
    return read_voxels(image, path).reshape(_shape_3d(image, path)), image, path


def _shape_3d(image, path):
    shape = image.shape[:3]
    if len(shape) < 3:
        raise InputError(f"{path} has shape {shape}; give a 3-D volume")
    if min(shape) < 2:
        raise InputError(f"{path} has shape {shape}; give a volume of at least 2 voxels along every axis")
    return shape


def _unreadable(path):
    return InputError(f"{path} cannot be read as NIfTI (damaged, cut short or another format); "
                      "copy or download it again")
