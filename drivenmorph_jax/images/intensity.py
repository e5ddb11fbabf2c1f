"""Intensities of an image: its foreground and their scaling to [0, 1]."""

import numpy as np


def foreground(data):
    """The voxels above a tenth of the 99th percentile of the positive voxels: bool. If none is positive, all voxels."""
    positive = data[data > 0]
    return data > 0.1 * np.percentile(positive, 99) if positive.size else np.ones(data.shape, bool)


def normalise(data):
    """Intensities scaled to [0, 1]: clip(x / p, 0, 1), p the 99.5th percentile of the foreground; float32 for float32.

    An image without positive values gives zeros.
    """
    top = np.percentile(data[foreground(data)], 99.5)
    return np.clip(data / np.float32(top), 0, 1) if top > 0 else np.zeros_like(data)
