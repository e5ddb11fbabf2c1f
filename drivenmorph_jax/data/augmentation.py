"""Random changes of training images, so that weights from few brains of one scanner also work on other images.

Each change takes an image (D, H, W) float32 in [0, 1], a key of `jax.random` and a strength. It returns a new image in
[0, 1]. Voxels that are 0 are background and stay 0. The changes run on the device that trains: an accelerator takes a
few milliseconds, a host would take seconds.
"""

import jax
import jax.numpy as jnp
import numpy as np

from drivenmorph_jax.fields.grid import identity_grid
from drivenmorph_jax.fields.warp import warp, warp_nearest


def change_contrast(image, key, strength):
    """Random gamma and gain: exp(s b) image^exp(s a), with a and b standard normal and s = `strength`."""
    gamma, gain = jnp.exp(strength * jax.random.normal(key, (2,)))
    return jnp.clip(gain * image**gamma, 0, 1)


def add_bias(image, key, strength):
    """A random bias field: image exp(s B), with s = `strength`.

    B is a smooth field of unit variance, a sum of random cosines of at most one period along each axis.
    """
    coefficients = jax.random.normal(key, (3, 3, 3)).at[0, 0, 0].set(0)  # this constant would be a gain
    field = coefficients
    for n in image.shape:
        wave = np.cos(np.pi * np.arange(3)[:, None] * (np.arange(n) + 0.5) / n).astype(np.float32)
        field = jnp.tensordot(field, wave, (0, 0), precision="highest")
    return jnp.clip(image * jnp.exp(strength * field / field.std()), 0, 1)


def add_noise(image, key, strength):
    """The Rician noise of a magnitude image: |image + s (N_1 + i N_2)| in the brain.

    N_1 and N_2 are standard normal, s = `strength`.
    """
    real, imaginary = strength * jax.random.normal(key, (2, *image.shape))
    return jnp.where(image > 0, jnp.clip(jnp.hypot(image + real, imaginary), 0, 1), 0)


def random_affine(key, strength):
    """A random affine (3, 4): the matrix I + s A, and the shift s t in half sides.

    A and t are standard normal, s = `strength`.
    """
    return jnp.eye(3, 4) + strength * jax.random.normal(key, (3, 4))


def apply_affine(volume, affine, corner=(0, 0, 0), shape=None):
    """Sample a volume (D, H, W) at transformed positions. Beyond its border the value is zero.

      out(x) = volume(A (x - c) + c + t c)    c the centre of the volume, (A, t) = affine

    Images are sampled linearly. Volumes of whole numbers are labels, and take the value of the nearest voxel. Only the
    voxels x of the box of `shape` at `corner` are computed; by default, all.
    """
    shape = volume.shape if shape is None else shape
    centre = (np.array(volume.shape, np.float32) - 1) / 2
    # One axis at a time: a matrix unit would round the product, and gains nothing with a matrix this small.
    x = identity_grid(shape)
    relative = [x[..., axis] + corner[axis] - centre[axis] for axis in range(3)]
    there = jnp.stack([sum(affine[i, j] * relative[j] for j in range(3)) + (1 + affine[i, 3]) * centre[i]
                       for i in range(3)], -1)
    sample = warp_nearest if jnp.issubdtype(volume.dtype, jnp.integer) else warp
    inside = ((there >= 0) & (there <= 2 * centre)).all(-1)
    return jnp.where(inside, sample(volume[..., None], there - x)[..., 0], 0)


def augmented(batch, *, crop=(0, 0, 0), flip=False, affine=0.0, intensity=0.0, bias=0.0, noise=0.0):
    """Change a batch of `training_batches` at random. The changes of a pair depend only on its `key`.

    Args:
      batch: 'fixed' and 'moving' (B, D, H, W, 1), 'key' (B, 2) uint32, and optionally 'fixed_labels' and
        'moving_labels' (B, D, H, W).
      crop: shape of a box that is cut out at a random place, the same for both images. 0 keeps the whole side.
      flip: mirror both images of a random half of the pairs along the first axis, left to right.
      affine, intensity, bias, noise: strengths of the changes. Each image of a pair has its own random values. 0 leaves
        a change out, without an effect on the random values of the others.

    Returns:
      The batch, without its keys.
    """
    whole = batch["fixed"].shape[1:4]
    box = tuple(n or side for n, side in zip(crop, whole, strict=True))

    def changed(pair):
        key, drawn = jax.random.wrap_key_data(pair["key"], impl="threefry2x32"), {}
        mirrored = jax.random.bernoulli(jax.random.fold_in(key, 0))
        room = np.array(whole) - box + 1
        corner = (jax.random.uniform(jax.random.fold_in(key, 1), (3,)) * room).astype(int)
        corner = jnp.minimum(corner, room - 1)  # rounding up can make the product equal to `room`
        for k, role in enumerate(("fixed", "moving"), 2):
            keys = jax.random.split(jax.random.fold_in(key, k), 4)
            matrix = random_affine(keys[0], affine)

            def cut(volume, matrix=matrix):
                volume = jnp.where(mirrored, volume[::-1], volume) if flip else volume
                if affine:
                    return apply_affine(volume, matrix, corner, box)
                return jax.lax.dynamic_slice(volume, corner, box)

            image = cut(pair[role][..., 0])
            changes = (change_contrast, intensity), (add_bias, bias), (add_noise, noise)
            for own, (change, strength) in zip(keys[1:], changes, strict=True):
                image = change(image, own, strength) if strength else image
            drawn[role] = image[..., None]
            if f"{role}_labels" in pair:
                drawn[f"{role}_labels"] = cut(pair[f"{role}_labels"])
        return drawn

    return jax.vmap(changed)(batch)
