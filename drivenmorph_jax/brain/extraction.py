"""The brain in an image of a whole head, by deepbet's two networks.

The first network sees the whole image on 128^3 voxels and finds a box around the brain. The second sees the box on
256^3 voxels and finds the outline. Images are resized by their nearest voxels, whatever the size of these in mm, since
the networks were trained so.

Reference: Fisch et al., "deepbet: Fast brain extraction of T1-weighted MRI using convolutional neural networks",
  Computers in Biology and Medicine, 2024. What runs around the networks is that of deepbet 1.0.2.
"""

import warnings
from functools import cache

import numpy as np
from nibabel import orientations
from scipy import ndimage

from drivenmorph_jax.brain import linknet, parameters
from drivenmorph_jax.errors import InputError, InputWarning
from drivenmorph_jax.images.volume import block_means, canonical

COARSE, FINE = 128, 256  # voxels along each axis of what the networks see
MARGIN = 0.1  # of the box, added at each of its ends
PRESENT = 0.02  # of the voxels of a plane: planes with more brain belong to the box
# Dice of the two networks. Below SURE the contrast may be another than T1. It is .98 and more on T1 heads, also with
# noise, bias, thick slices or a cut neck, and .97 and less where a T2 or an inverted contrast is found badly.
SURE, DOUBTFUL = 0.97, 0.9
DARK, DEEP, AROUND = 0.7, 6.0, 12.0  # of the tissue around; mm; mm: of the rim that `tightened` takes away
RIM = 0.055  # share of a brain that has such a rim: .06 to .17 of most images, less of tightly stripped templates
MEAN, DEVIATION = 0.449, 0.226  # of the images that the networks were trained with


def extract(volume):
    """The voxels of a Volume that show brain: (X, Y, Z), bool, on the volume's own grid.

    Where the two networks agree, the mask is that of deepbet, which knows T1. Where they do not, they also see the
    image with its contrast `folded`, and the mask counts on which they agree better. Voxels that are not finite count
    as 0.

    Raises InputError where no brain is found, or where the package deepbet cannot be used. An InputWarning says where
    the networks disagree in the end.
    """
    image = np.nan_to_num(canonical(volume).data, posinf=0, neginf=0)
    mask, agreement = _found(image)
    if agreement < SURE:
        mask, agreement = max((mask, agreement), _found(folded(image)), key=lambda found: found[1])
    if not mask.any():
        raise InputError(f"no brain is found in {volume.path}; give an image of a whole head, or one that is "
                         "skull-stripped by another tool")
    if agreement < DOUBTFUL:
        warnings.warn(f"the brain in {volume.path} is uncertain, since two networks disagree about it (Dice "
                      f"{agreement:.2f}): look at its mask, or strip it by another tool", InputWarning, stacklevel=2)
    back = orientations.ornt_transform(np.array([[0, 1], [1, 1], [2, 1]]), orientations.io_orientation(volume.affine))
    return np.ascontiguousarray(orientations.apply_orientation(mask, back))


def tightened(mask, volume):
    """A mask (X, Y, Z) of the brain in a Volume without the dark rim between the brain and its hull: the fluid of T1
    images and the dura. Skull-stripped brains end there, and so do templates.

    Voxels x are taken away that a path of such voxels joins with the outside, and that lie no deeper than `DEEP`:

      I(x) < DARK r(x)    r: the mean of the tissue around x, by a Gaussian of `AROUND`

    Where fluid is bright, hardly anything is taken away.
    """
    box = tuple(slice(max(side.start - 1, 0), side.stop + 1) for side in ndimage.find_objects(mask.view(np.uint8))[0])
    x, inside, spacing = np.maximum(volume.data[box], 0), mask[box], volume.spacing
    depth = ndimage.distance_transform_edt(np.pad(inside, 1), sampling=spacing)[1:-1, 1:-1, 1:-1]
    deep = x[depth > 2 * DEEP]
    if not deep.size:
        return mask
    tissue = inside & (x > np.median(deep) / 2)
    factors = np.maximum(1, np.rint(AROUND / 4 / spacing)).astype(int)
    ends = [(0, -n % k) for n, k in zip(x.shape, factors, strict=True)]
    sums = [ndimage.gaussian_filter(block_means(np.pad(np.where(tissue, image, np.float32(0)), ends), factors),
                                    AROUND / spacing / factors) for image in (x, np.float32(1))]
    mean = sums[0] / np.maximum(sums[1], 1e-3)
    mean = mean[np.ix_(*(np.minimum(np.arange(n) // k, m - 1) for n, k, m in zip(x.shape, factors, mean.shape,
                                                                                strict=True)))]
    dark = inside & (x < DARK * mean) & (depth <= DEEP)
    rest = ndimage.binary_opening(inside & ~ndimage.binary_propagation(~inside, mask=~inside | dark))
    if not rest.any():
        return mask
    tight = np.zeros(mask.shape, bool)
    tight[box] = filled(largest(rest))
    return tight


def has_rim(image):
    """Whether a stripped brain, an image as `intensity.anchored` returns it, has the rim that `tightened` takes off."""
    inside = filled(largest(image.data > 0))
    return tightened(inside, image).sum() < (1 - RIM) * inside.sum()


def _found(image):
    """The mask of the brain in an image whose axes point to R, A and S, and the Dice of the two networks on it.

    Where no brain is found, the mask is empty and the Dice is 0.
    """
    mask = np.zeros(image.shape, bool)
    coarse = resized(image, (COARSE,) * 3)
    levels = np.quantile(coarse, (0.005, 0.995))
    if not levels[0] < levels[1]:
        return mask, 0.0
    outline, box = _networks()
    first = largest(np.asarray(linknet.logit(box, standardised(coarse, levels))) > 0)
    around = _box(first, image.shape)
    if around is None:
        return mask, 0.0
    fine = standardised(resized(image[around], (FINE,) * 3), levels)
    inside = resized(np.asarray(linknet.logit(outline, fine)) > 0, image[around].shape)
    mask[around] = filled(largest(inside))
    second = resized(mask, first.shape)
    return mask, float(2 * (first & second).sum() / (first.sum() + second.sum()))


def folded(image):
    """An image of other contrast, made more like T1: what is brighter than the tissue around the median gets darker.

      max(0, 1 - |t - m| / m)    t the intensity, scaled to [0, 1], m its median where t > .1

    Fluid then is dark whether it was dark or bright, and tissue is bright.
    """
    low, high = np.quantile(image, (0.005, 0.995)).astype(np.float32)
    t = np.clip((image - low) / max(high - low, np.float32(1e-30)), 0, 1)
    middle = np.median(t[t > 0.1]) if (t > 0.1).any() else np.float32(1)
    return np.maximum(0, 1 - np.abs(t - middle) / middle)


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
    """Intensities as the networks take them: clipped to `levels` (low, high), of mean .449 and deviation .226."""
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
