"""Random changes of training images, so that weights from the few brains of one scanner stand others.

Every function takes one image (D, H, W) float32 in [0, 1], of which what is 0 is background and stays so, a NumPy
generator and a strength, and returns a new image in [0, 1]. Each draws the same count of numbers at any strength.
"""

import numpy as np
from scipy import ndimage


def change_contrast(image, rng, strength):
    """exp(s b) image^exp(s a), a and b standard normal: gamma and gain."""
    gamma, gain = np.exp(strength * rng.standard_normal(2)).astype(np.float32)
    return np.clip(gain * image**gamma, 0, 1) if strength else image


def add_bias(image, rng, strength):
    """image exp(s B), B a smooth field of unit variance: random cosines of at most one period along each axis."""
    coefficients = rng.standard_normal((3, 3, 3)).astype(np.float32)
    coefficients[0, 0, 0] = 0  # a gain
    if not strength:
        return image
    waves = [np.cos(np.pi * np.arange(3)[:, None] * (np.arange(n) + 0.5) / n).astype(np.float32) for n in image.shape]
    field = np.einsum("ijk,ix,jy,kz->xyz", coefficients, *waves, optimize=True)
    return np.clip(image * np.exp(strength * field / field.std()), 0, 1)


def add_noise(image, rng, strength):
    """|image + s (N_1 + i N_2)| in the brain, N standard normal: the Rician noise of a magnitude image."""
    noise = np.random.default_rng(rng.integers(2**63)).standard_normal
    if not strength:
        return image
    noisy = np.hypot(image + strength * noise(image.shape, np.float32), strength * noise(image.shape, np.float32))
    return np.where(image > 0, np.clip(noisy, 0, 1), 0)


def random_affine(rng, strength):
    """(3, 4): a random matrix I + s A, and a shift of s t half sides; A and t standard normal."""
    return np.eye(3, 4) + strength * rng.standard_normal((3, 4))


def apply_affine(volume, affine, order, corner=(0, 0, 0), shape=None):
    """Sample a volume (D, H, W) at A (x - c) + c + t c, c its centre: `order` 1 for images, 0 for labels.

    Only the voxels x of the box of `shape` at `corner` are computed; all of them by default.
    """
    centre = (np.array(volume.shape) - 1) / 2
    offset = affine[:, :3] @ (corner - centre) + centre + affine[:, 3] * centre
    return ndimage.affine_transform(volume, affine[:, :3], offset, shape, order=order)
