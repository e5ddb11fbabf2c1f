"""The brain in an image of a whole head, by deepbet's two networks.

The first network sees the whole image on 128^3 voxels and finds a box around the brain. The second sees the box on
256^3 voxels and finds the outline. Images are resized by their nearest voxels, whatever the size of these in mm, since
the networks were trained so.

Reference: Fisch et al., "deepbet: Fast brain extraction of T1-weighted MRI using convolutional neural networks",
  Computers in Biology and Medicine, 2024. What runs around the networks is that of deepbet 1.0.2.
"""

from functools import cache

import numpy as np
from nibabel import orientations
from scipy import ndimage

from drivenmorph_jax.brain import linknet, parameters
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.images.volume import canonical

COARSE, FINE = 128, 256  # voxels along each axis of what the networks see
MARGIN = 0.1  # of the box, added at each of its ends
PRESENT = 0.02  # of the voxels of a plane: planes with more brain belong to the box
MEAN, DEVIATION = 0.449, 0.226  # of the images that the networks were trained with


def extract(volume):
    """The voxels of a Volume that show brain: (X, Y, Z), bool, on the volume's own grid.

    Voxels that are not finite count as 0.

    Raises InputError where no brain is found, or where the package deepbet cannot be used.
    """
    outline, box = _networks()
    image = np.nan_to_num(canonical(volume).data, posinf=0, neginf=0)
    coarse = resized(image, (COARSE,) * 3)
    levels = np.quantile(coarse, (0.005, 0.995))
    if not levels[0] < levels[1]:
        raise _no_brain(volume)
    found = largest(np.asarray(linknet.logit(box, standardised(coarse, levels))) > 0)
    around = _box(found, image.shape)
    if around is None:
        raise _no_brain(volume)
    fine = standardised(resized(image[around], (FINE,) * 3), levels)
    inside = resized(np.asarray(linknet.logit(outline, fine)) > 0, image[around].shape)
    mask = np.zeros(image.shape, bool)
    mask[around] = filled(largest(inside))
    if not mask.any():
        raise _no_brain(volume)
    back = orientations.ornt_transform(np.array([[0, 1], [1, 1], [2, 1]]), orientations.io_orientation(volume.affine))
    return np.ascontiguousarray(orientations.apply_orientation(mask, back))


@cache
def _networks():
    """The parameters of both networks: (of the outline, of the box)."""
    return tuple(linknet.prepared(parameters.load(name)) for name in ("model.pt", "bbox_model.pt"))


def resized(x, shape):
    """x (D, H, W) on a grid of `shape` that covers the same box: each voxel is the nearest of x.

      out(p) = x(floor((p + 1/2) n / m))    along an axis of n voxels that becomes one of m
    """
    places = (np.minimum(((np.arange(m) + np.float32(0.5)) * np.float32(n / m)).astype(np.float32).astype(int), n - 1)
              for n, m in zip(x.shape, shape, strict=True))
    return x[np.ix_(*places)]


def standardised(x, levels):
    """Intensities as the networks take them: clipped to `levels` (low, high), then with mean .449 and deviation .226."""
    low, high = np.float32(levels)
    x = np.clip((x - low) / (high - low), 0, 1)
    return DEVIATION * (x - x.mean()) / max(x.std(ddof=1), np.float32(1e-6)) + MEAN


def largest(mask):
    """The largest of the parts of a mask that touch by faces, edges or corners."""
    parts, count = ndimage.label(mask, np.ones((3, 3, 3)))
    return parts == 1 + np.bincount(parts.ravel())[1:].argmax() if count > 1 else mask


def filled(mask):
    """The mask and its holes: what no path over faces of voxels joins with the faces of the volume."""
    parts, _ = ndimage.label(~mask)
    outside = np.unique(np.concatenate([np.take(parts, place, axis).ravel() for axis in range(3) for place in (0, -1)]))
    return ~np.isin(parts, outside[outside > 0])


def _box(mask, shape):
    """The slices of a grid of `shape` that hold the brain, whose `mask` (128, 128, 128) covers the same box of space.

    None where no plane of the mask has enough brain.
    """
    slices = []
    for axis, n in enumerate(shape):
        planes = np.flatnonzero(mask.mean(tuple({0, 1, 2} - {axis})) > PRESENT)
        if not len(planes):
            return None
        first, last = planes[0], planes[-1] + 1
        scale = n / mask.shape[axis]
        centre, size = np.rint(scale * (first + last) / 2), np.rint(scale * (1 + 2 * MARGIN) * (last - first))
        slices.append(slice(max(0, int(centre - size / 2)), min(n, int(centre + size / 2))))
    return tuple(slices)


def _no_brain(volume):
    return InputError(f"no brain is found in {volume.path}; give an image of a whole head, or one that is "
                      "skull-stripped by another tool")
