"""Writing of images, label maps and fields as NIfTI files."""

from contextlib import contextmanager

import nibabel
import numpy as np
from isal import igzip

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.files import replacing
from drivenmorph_jax.images.geometry import sheared

ENDINGS = (".nii", ".nii.gz")
PLANES = 8  # of a field that are written at once
LEVEL = 1  # of the compression: fields and images get as small as by zlib's level 1, in a seventh of the time


def save(path, data, like, intent=None, name=""):
    """Write voxels (X, Y, Z, ...) on the grid of the Volume `like` as a NIfTI file, complete or not at all.

    The affine and the qform and sform codes are those of `like`. Floats are stored as float32. Whole numbers are stored
    in the integer type of `like` where they fit, else as int16 or int32, else in their own type. `intent` is a NIfTI
    intent code, and `name` its name.

    Raises InputError where the file cannot be written or its name does not end in .nii or .nii.gz.
    """
    image = to_nibabel(data, like, intent)
    image.header["intent_name"] = name.encode()
    write(path, image)


def write(path, image):
    """Write a nibabel image, complete or not at all. It raises the errors of `save`."""
    _check_ending(path)
    with replacing(path) as temporary:
        if temporary.suffix == ".gz":
            with compressed(temporary) as file:
                image.to_stream(file)
        else:
            nibabel.save(image, temporary)


def _check_ending(path):
    if not str(path).endswith(ENDINGS):
        raise InputError(f"{path} must end in .nii or .nii.gz to be written")


def save_vectors(path, vectors, factors, like, intent):
    """Write vectors (X, Y, Z, 3), times the three `factors`, as (X, Y, Z, 1, 3) float32, as `save` does.

    They are written a few planes at a time, so that memory holds no second field.

    Raises the errors of `save`.
    """
    _check_ending(path)
    shape = (*vectors.shape[:3], 1, 3)
    header = to_nibabel(np.broadcast_to(np.float32(0), shape), like, intent).header
    header.set_data_offset(header.single_vox_offset)
    with replacing(path) as temporary, _opened(temporary) as file:
        header.write_to(file)
        for axis, factor in enumerate(factors):
            for first in range(0, shape[2], PLANES):
                part = vectors[:, :, first:first + PLANES, axis] * factor
                file.write(np.ascontiguousarray(part.T, np.float32).data)


def _opened(path):
    return compressed(path) if path.suffix == ".gz" else open(path, "wb")


@contextmanager
def compressed(path):
    """A context with a file object that compresses what is written to `path`, by gzip without a name or a time."""
    with open(path, "wb") as raw, igzip.IGzipFile("", "wb", LEVEL, raw, mtime=0) as file:
        yield file


def to_nibabel(data, like, intent=None, dtype=None):
    """The image that `save` writes, as a nibabel image.

    With `dtype`, no value changes: they are stored in this type if it holds all of them, else in the type of `data`.
    """
    if dtype is None:
        dtype = _storage_type(data, like)
    elif dtype != data.dtype and not np.array_equal(data.astype(dtype), data):
        dtype = data.dtype
    dtype = dtype.newbyteorder("=")
    image = nibabel.Nifti1Image(data.astype(dtype, copy=False), like.affine, dtype=dtype)
    codes = int(like.header["qform_code"]), int(like.header["sform_code"])
    if codes == (0, 0):
        codes = 0, 1  # without a code, every reader places the volume by a different rule
    if sheared(like.affine):
        codes = 0, codes[1] or 1  # the qform holds no shear, and ITK would read it without a word
    image.set_qform(like.affine, codes[0])
    image.set_sform(like.affine, codes[1])
    image.header.set_xyzt_units("mm")
    if intent is not None:
        image.header["intent_code"] = intent
    return image


def _storage_type(data, like):
    if np.issubdtype(data.dtype, np.floating):
        return np.dtype(np.float32)
    source = like.header.get_data_dtype().newbyteorder("=")
    small = source.kind in "iu" and source.itemsize <= 4  # many readers refuse 64-bit integers
    least, largest = int(data.min()), int(data.max())
    for dtype in ([source] if small else []) + [np.dtype(np.int16), np.dtype(np.int32)]:
        if np.iinfo(dtype).min <= least and largest <= np.iinfo(dtype).max:
            return dtype
    return data.dtype
