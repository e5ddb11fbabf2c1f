"""Left and right: whether two brains differ between their halves in the same way.

Brains are not symmetric, and most have the same asymmetries: the right half reaches further to the front, the left
half further to the back. The asymmetry of an image is the image less its mirror image, coarse and within the box around
its brain. Its cosine with the mean asymmetry of 20 adults is above 0 for 26 of 27 brains, and changes its sign when the
image is mirrored. It changes its sign also when the contrast is inverted, so two images of a pair are compared.

The mean is in weights/brain-t1/asymmetry.npy, made by `benchmarks/asymmetry.py`.
"""

from functools import cache

import numpy as np
from scipy import ndimage

from drivenmorph_jax.images.intensity import foreground
from drivenmorph_jax.runtime.checkpoint import SHIPPED

SHAPE = 32, 38, 32
MEAN = SHIPPED / "asymmetry.npy"


def asymmetry(image):
    """The asymmetry of a brain: a unit vector. `image` (D, H, W) has axes R, A, S, and 0 outside the brain."""
    image = np.asarray(image, np.float32)
    box = image[ndimage.find_objects(foreground(image).astype(np.uint8))[0]]
    steps = [old / new for old, new in zip(box.shape, SHAPE, strict=True)]
    coarse = ndimage.zoom(ndimage.gaussian_filter(box, [step / 4 for step in steps]), [1 / step for step in steps],
                          order=1, grid_mode=True, mode="nearest")
    difference = coarse - coarse[::-1]
    return difference.ravel() / max(np.linalg.norm(difference), 1e-12)


def alike(fixed, moving):
    """Above 0 where both brains have the asymmetry of most, or both its reverse; below 0 where one is mirrored.

    It is the cosine of that brain which has the weaker one, so brains that are nearly symmetric give about 0.
    """
    one, other = (float(asymmetry(image) @ _mean()) for image in (fixed, moving))
    return np.sign(one * other) * min(abs(one), abs(other))


@cache
def _mean():
    mean = np.load(MEAN).astype(np.float32).ravel()
    return mean / np.linalg.norm(mean)
