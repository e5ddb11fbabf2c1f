"""Random training pairs by Grain: seeded, sharded over hosts, prefetched, and resumable."""

import grain
import jax
import jax.numpy as jnp
import numpy as np

from drivenmorph_jax.data.augmentation import add_bias, add_noise, apply_affine, change_contrast, random_affine
from drivenmorph_jax.data.subject import ordered_pairs
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.grid import average_pool

READERS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)  # whole batches


def training_batches(subjects, batch_size, seed, *, atlas=None, downsample=1, crop=(0, 0, 0), flip=False, affine=0.0,
                     intensity=0.0, bias=0.0, noise=0.0, with_labels=False):
    """Batches of random `ordered_pairs`, without end, every pair once before any again.

    The order and the augmentation follow from the seed and a pair's place in the sequence alone. Process p of
    n takes every n-th pair of it, so that hosts together see what one would. The iterator's `get_state` and
    `set_state` continue a run bit for bit.

    Args:
      subjects: at least two, on one grid (D, H, W).
      batch_size: pairs in a batch of this process.
      seed: integer.
      atlas: the moving image of all pairs, or None for pairs of different subjects.
      downsample: factor by which images are average-pooled, and labels strided, once at the start.
      crop: shape of a box, at a random place, of the pooled images, the same of both; 0 is a whole side.
      flip: mirror both images of a random half of the pairs along the first axis, left to right.
      affine, intensity, bias, noise: strengths of the changes of `data.augmentation`, drawn for each image
        separately.
      with_labels: add the label maps.

    Returns:
      An iterator over {'fixed', 'moving': (B, D, H, W, 1) float32} and, with labels, {'fixed_labels',
      'moving_labels': (B, D, H, W) int32}, and 'pair' (B,), its place among the `ordered_pairs`, as NumPy arrays.

    Raises:
      InputError: fewer than two subjects, labels asked for but missing, a side that `downsample` does not divide,
        or a crop that is larger.
    """
    if len(subjects) < 2:
        raise InputError(f"training needs at least 2 subjects, not {len(subjects)}: add to the train split")
    pairs, everyone = ordered_pairs(subjects, atlas), subjects if atlas is None else (*subjects, atlas)
    images = {subject: _pooled(subject, downsample) for subject in everyone}
    labels = {subject: _strided(subject, downsample) for subject in images} if with_labels else {}
    whole = np.array(next(iter(images.values())).shape)
    box = np.where(crop, crop, whole)
    if (box > whole).any():
        raise InputError(f"data.crop is {tuple(crop)}, larger than the images of {tuple(map(int, whole))}: "
                         "set it lower")

    def example(place, rng):
        # Numbers are drawn whether used or not: switching one augmentation leaves the others as they are.
        mirrored = rng.random() < 0.5
        side = slice(None, None, -1) if flip and mirrored else slice(None)
        corner = (rng.random(3) * (whole - box + 1)).astype(int)
        inside = tuple(slice(start, start + n) for start, n in zip(corner, box, strict=True))

        def cut(volume, matrix, order):
            return apply_affine(volume, matrix, order, corner, tuple(box)) if affine else volume[inside]

        batch = {"pair": place}
        for role, subject in zip(("fixed", "moving"), pairs[place], strict=True):
            matrix = random_affine(rng, affine)
            image = cut(images[subject][side], matrix, 1)
            for change, strength in ((change_contrast, intensity), (add_bias, bias), (add_noise, noise)):
                image = change(image, rng, strength)
            batch[role] = image[..., None]
            if with_labels:
                batch[f"{role}_labels"] = cut(labels[subject][side], matrix, 0)
        return batch

    return iter(
        grain.MapDataset.range(len(pairs))
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(example)[jax.process_index()::jax.process_count()]
        .batch(batch_size, drop_remainder=True)
        .to_iter_dataset(READERS))


def _pooled(subject, factor):
    if any(side % factor for side in subject.image.shape):
        raise InputError(f"data.downsample is {factor}, which does not divide the image shape "
                         f"{subject.image.shape}: choose a factor of every side")
    return np.asarray(average_pool(jnp.asarray(subject.image)[..., None], factor)[..., 0])


def _strided(subject, factor):
    if subject.labels is None:
        raise InputError(f"{subject.id} has no label map: add {subject.id}_seg.nii.gz or train without")
    # No voxel is central in an even block; every image takes the same one, so pairs stay aligned.
    return np.ascontiguousarray(subject.labels[(slice(factor // 2, None, factor),) * 3])
