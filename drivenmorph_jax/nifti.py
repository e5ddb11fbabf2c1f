"""Volumes from NIfTI files, checked; grids to work on; volumes back to NIfTI files.

World coordinates are RAS millimetres throughout. A grid is (shape, affine), and
world = affine @ (i, j, k, 1).
"""

import gzip
import itertools
import math
import os
from dataclasses import dataclass, replace

import nibabel
import numpy as np
from nibabel import orientations
from scipy import ndimage

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.files import replacing

MOST_VOXELS = 2**30
FINEST, COARSEST = 1e-2, 1e2  # mm: what no scan of a brain has, and no grid or blur could be made for
PATHS = (str, os.PathLike)
ENDINGS = (".nii", ".nii.gz")


@dataclass(frozen=True, eq=False)
class Volume:
    """A 3-D image (float32) or label map (int32) on its own voxel grid."""

    data: np.ndarray  # (X, Y, Z), in the file's voxel order
    affine: np.ndarray  # (4, 4), voxel to RAS mm
    header: nibabel.Nifti1Header
    path: str  # as the user gave it

    @property
    def spacing(self):
        """Voxel size along each axis: (3,) in mm."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


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


def same_grid(a, b, tolerance=1e-3):
    """Whether two Volumes have the same shape, and affines that differ by no more than `tolerance`."""
    return a.data.shape == b.data.shape and np.allclose(a.affine, b.affine, rtol=0, atol=tolerance)


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


def canonical(volume):
    """The same volume with its axes permuted and flipped to be nearest to R, A, S; no interpolation."""
    flips = orientations.io_orientation(volume.affine)
    affine = volume.affine @ orientations.inv_ornt_aff(flips, volume.data.shape)
    data = np.ascontiguousarray(orientations.apply_orientation(volume.data, flips))
    return replace(volume, data=data, affine=affine)


def resample(volume, shape, affine, transform=None, order=1):
    """Sample a Volume on the grid (shape, affine): out(o) = volume(A_volume^-1 T affine o).

    `transform` T (4, 4) maps the grid's world to the volume's, in RAS mm; without it T = I. Order 1 is
    linear, 0 nearest; outside the volume the value is 0. The result has the volume's own type.
    """
    transform = np.eye(4) if transform is None else transform
    matrix = np.linalg.inv(volume.affine) @ transform @ affine
    return ndimage.affine_transform(volume.data, matrix, output_shape=tuple(shape), order=order,
                                    mode="grid-constant", prefilter=False)


def smoothed(volume, spacing):
    """The Volume, blurred where its voxels are finer than `spacing` mm, so that resampling to that does not alias.

    The full width at half maximum of the Gaussian is one coarse voxel.
    """
    sigma = np.where(volume.spacing < 0.9 * spacing, spacing / 2.355 / volume.spacing, 0)
    return replace(volume, data=ndimage.gaussian_filter(volume.data, sigma)) if sigma.any() else volume


def working_grid(volume, spacing=1.0, multiple=16, margin=8.0):
    """An isotropic grid round the foreground, along the volume's own canonical axes: (shape, affine).

    `spacing` and `margin` are in mm; every side is a multiple of `multiple`, the surplus shared between both
    ends. An oblique volume gets an equally oblique grid, so nothing is interpolated for a rotation's sake; of
    a sheared one the nearest rigid axes are taken. Voxel centres lie at whole multiples of `spacing` from the
    volume's first voxel, so resampling a volume of exactly that spacing copies it.
    """
    volume = canonical(volume)
    left, _, right = np.linalg.svd(volume.affine[:3, :3] / volume.spacing)
    axes = left @ right
    corners = np.array(list(itertools.product(*_bounding_box(foreground(volume.data)))))
    along = corners @ volume.affine[:3, :3].T @ axes  # mm from the first voxel
    low, high = along.min(axis=0) - margin, along.max(axis=0) + margin
    fewest = (high - low) / spacing + 1
    shape = multiple * np.ceil(fewest / multiple - 1e-6).astype(int)
    start = np.round(((low + high) / spacing - (shape - 1)) / 2)
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing
    affine[:3, 3] = volume.affine[:3, 3] + axes @ (start * spacing)
    return tuple(shape.tolist()), affine


def foreground(data):
    """Voxels above a tenth of the 99th percentile of the positive ones: bool; all where none is positive."""
    positive = data[data > 0]
    return data > 0.1 * np.percentile(positive, 99) if positive.size else np.ones(data.shape, bool)


def normalise(data):
    """Intensities to [0, 1]: clip(x / p, 0, 1), p the 99.5th percentile of the foreground; float32."""
    top = np.percentile(data[foreground(data)], 99.5)
    return np.clip(data / np.float32(top), 0, 1) if top > 0 else np.zeros_like(data)


def save(path, data, like, intent=None):
    """Write voxels (X, Y, Z, ...) that lie on the grid of the Volume `like` as NIfTI, whole or not at all.

    Affine, qform and sform codes are those of `like`. Floats are stored as float32; whole numbers in the
    integer type of `like` where they fit, else as int16 or int32. `intent` is a NIfTI intent code.

    Raises InputError where the file cannot be written or its name ends otherwise than in .nii or .nii.gz.
    """
    write(path, to_nibabel(data, like, intent))


def write(path, image):
    """Write a nibabel image, whole or not at all; raises as `save` does."""
    if not str(path).endswith(ENDINGS):
        raise InputError(f"{path} must end in .nii or .nii.gz to be written")
    with replacing(path) as temporary:
        nibabel.save(image, temporary)


def with_type(volume, dtype):
    """The same Volume with a header of that type: what lies on its grid is then stored so, where it fits."""
    header = volume.header.copy()
    header.set_data_dtype(dtype)
    return replace(volume, header=header)


def to_nibabel(data, like, intent=None):
    """What `save` writes, as a nibabel image."""
    image = nibabel.Nifti1Image(data.astype(_storage_type(data, like)), like.affine)
    codes = int(like.header["qform_code"]), int(like.header["sform_code"])
    if codes == (0, 0):
        codes = 0, 1  # without any code each reader places the volume by a rule of its own
    image.set_qform(like.affine, codes[0])
    image.set_sform(like.affine, codes[1])
    image.header.set_xyzt_units("mm")
    if intent is not None:
        image.header.set_intent(intent)
    return image


def on_grid(shape, affine, header=None, path=""):
    """A Volume of nothing on a grid, to say where something else lies."""
    return Volume(np.broadcast_to(np.float32(0), shape), np.asarray(affine, float),
                  header or nibabel.Nifti1Header(), path)


def _read_volume(source):
    image, path = open_nifti(source)
    shape, rest = image.shape[:3], image.shape[3:]
    if len(shape) < 3 or any(n > 1 for n in rest):
        raise InputError(f"{path} has shape {image.shape}; give a single 3-D volume")
    if min(shape) < 2:
        raise InputError(f"{path} has shape {shape}; give a volume of at least 2 voxels along every axis")
    return read_voxels(image, path).reshape(shape), image, path


def _bounding_box(mask):
    """First and last voxel of a mask along each axis, without .05 % of it at each end: specks don't count."""
    total = np.count_nonzero(mask)
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        share = np.cumsum(np.count_nonzero(mask, axis=others)) / total
        yield np.searchsorted(share, 5e-4, side="right"), np.searchsorted(share, 1 - 5e-4)


def _storage_type(data, like):
    if np.issubdtype(data.dtype, np.floating):
        return np.dtype(np.float32)
    source = like.header.get_data_dtype().newbyteorder("=")
    small = source.kind in "iu" and source.itemsize <= 4  # many readers refuse 64-bit integers
    for dtype in ([source] if small else []) + [np.dtype(np.int16)]:
        if np.iinfo(dtype).min <= data.min() and data.max() <= np.iinfo(dtype).max:
            return dtype
    return np.dtype(np.int32)


def _unreadable(path):
    return InputError(f"{path} cannot be read as NIfTI (damaged, cut short or another format); get it anew")
