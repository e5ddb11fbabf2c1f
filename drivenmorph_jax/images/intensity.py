"""Intensities of an image: its background, its foreground and their scaling to [0, 1]."""

import numpy as np

RINGING = 0.1  # of the brightest tissue: values below 0 down to here are those of an interpolation


def background(data):
    """The value of the background: the one that most voxels on the faces of the volume have, or None if none has."""
    faces = np.concatenate([np.take(data, place, axis).ravel() for axis in range(3) for place in (0, -1)])
    values, counts = np.unique(faces, return_counts=True)
    return values[counts.argmax()] if 2 * counts.max() > faces.size else None


def anchored(data):
    """An image (X, Y, Z) with its background at 0 and its tissue above 0: unchanged, or shifted, or shifted and halved.

    An image without negative values is unchanged, unless its background is not 0. So is one whose tissue lies above 0
    and whose background below. Otherwise the image is shifted:

      max(x - zero, 0) / 2    in the tissue, 0 in the background

    zero is the background where the tissue begins just above it, as in an image with an offset. Elsewhere, as in a
    z-scored image, it lies a tenth of the range of the tissue below the tissue. Without a constant background, as in a
    whole head, zero is the 5th percentile of all voxels. The half keeps the largest difference of two float32 finite.
    """
    empty = background(data)
    if data.min() >= 0 and not empty:
        return data
    tissue = np.ones(data.shape, bool) if empty is None else data != empty
    low, high = np.percentile(data[tissue].astype(np.float64), (1, 99))
    if low >= 0 and (empty is None or empty < 0) or low >= -RINGING * high and not empty:
        return data
    if empty is None:
        zero = float(np.percentile(data, 5))
    else:
        zero = float(empty) if 0 <= low - empty <= high - low else low - 0.1 * (high - low)
    return np.where(tissue, np.maximum(data / 2 - np.float32(zero / 2), 0), 0)


def foreground(data):
    """The voxels above a tenth of the 99th percentile of the positive voxels: bool. If none is positive, all voxels.

    `data` is an image as `anchored` returns it.
    """
    positive = data[data > 0]
    return data > 0.1 * np.percentile(positive, 99) if positive.size else np.ones(data.shape, bool)


def normalise(data):
    """Intensities scaled to [0, 1]: clip(x / p, 0, 1), p the 99.5th percentile of the foreground; float32 for float32.

    `data` is an image as `anchored` returns it. An image without positive values gives zeros.
    """
    top = np.percentile(data[foreground(data)], 99.5)
    return np.clip(data / np.float32(top), 0, 1) if top > 0 else np.zeros_like(data)
