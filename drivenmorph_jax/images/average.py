"""Averages of images that lie on one grid: a robust mean, its sharpening, and the vote of label maps."""

import numpy as np
from scipy import ndimage

from drivenmorph_jax.images.intensity import foreground

TRIMMED = 0.2  # share of the values of a voxel that count neither at the low nor at the high end
SHARPENING, WIDTH = 0.5, 1.0  # weight of the unsharp mask, and its Gaussian in voxels
SLAB = 8  # planes that are averaged at a time


def robust_mean(images):
    """The trimmed mean of N images at every voxel, after their brightness is equal: (D, H, W) float32.

      mean of g_i x_i without the k smallest and the k largest,    k = floor(TRIMMED N)

    g_i makes the mean of image i over the foreground of the plain mean that of all images. The order of the images
    does not matter, up to the rounding of that mean.

    Args:
      images: N arrays (D, H, W) with values of 0 and above, such as memory maps. They are read in slabs.
    """
    tissue = foreground(sum(np.asarray(x, np.float32) for x in images))
    levels = np.array([np.mean(x[tissue], dtype=np.float64) for x in images])
    gains = (levels.mean() / np.maximum(levels, 1e-6)).astype(np.float32)
    cut, out = int(TRIMMED * len(images)), np.empty(tissue.shape, np.float32)
    for start in range(0, len(out), SLAB):
        slab = np.stack([gain * x[start:start + SLAB] for gain, x in zip(gains, images, strict=True)])
        slab.sort(axis=0)
        out[start:start + SLAB] = slab[cut:len(slab) - cut].mean(0)
    return out


def sharpened(image):
    """The image (D, H, W) with its fine detail raised, at least 0: an unsharp mask.

      max(x + SHARPENING (x - G x), 0)    G a Gaussian of WIDTH voxels

    A mean of images loses this detail where they do not match by a part of a voxel.
    """
    return np.maximum(image + SHARPENING * (image - ndimage.gaussian_filter(image, WIDTH)), 0)


def vote(maps):
    """The label that most of N label maps have at each voxel, and the share of the maps that have it.

    Of labels with equally many votes the smallest is taken.

    Args:
      maps: N integer arrays (D, H, W), such as memory maps. They are read plane by plane.

    Returns:
      (labels, of the type of the first map; share, float32), (D, H, W) each.
    """
    labels, share = np.zeros(maps[0].shape, maps[0].dtype), np.zeros(maps[0].shape, np.float32)
    for i in range(len(labels)):
        plane = np.stack([x[i] for x in maps])
        most = np.zeros(plane.shape[1:], int)
        for label in np.unique(plane):
            votes = np.count_nonzero(plane == label, axis=0)
            labels[i][votes > most] = label
            np.maximum(most, votes, out=most)
        share[i] = most / len(maps)
    return labels, share
