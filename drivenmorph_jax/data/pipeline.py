"""Batches of random training pairs by Grain: seeded, divided over hosts, prefetched, and resumable."""

import jax
import jax.numpy as jnp
import numpy as np

from drivenmorph_jax.data.subject import ordered_pairs
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.fields.grid import average_pool


def training_batches(subjects, batch_size, seed, *, atlas=None, downsample=1, with_labels=False):
    """An endless sequence of batches of random `ordered_pairs`. Every pair comes once before any pair comes again.

    The order and the keys depend only on the seed and on the place of a pair in the sequence. Process p of n takes
    every n-th pair of the sequence, so n hosts together see the pairs that a single host would see. `get_state` and
    `set_state` of the iterator continue a run bit for bit.

    Args:
      subjects: at least two, on one grid (D, H, W).
      batch_size: pairs in a batch of this process.
      seed: integer.
      atlas: the moving image of all pairs, or None for pairs of different subjects.
      downsample: factor by which images are average-pooled, and labels strided, once at the start.
      with_labels: whether to add the label maps.

    Returns:
      An iterator over dictionaries of NumPy arrays: 'fixed' and 'moving' (B, D, H, W, 1) float32; with labels,
      'fixed_labels' and 'moving_labels' (B, D, H, W) int32; 'pair' (B,), the places of the pairs among the
      `ordered_pairs`; 'key' (B, 2) uint32, the keys of the random changes by `augmentation.augmented`.

    Raises:
      InputError: fewer than two subjects, a missing label map with `with_labels`, or a side that `downsample` does not
        divide.
    """
    import grain  # late, since no program but training needs it, and its import takes a second

    if len(subjects) < 2:
        raise InputError(f"training needs at least 2 subjects, not {len(subjects)}: add to the train split")
    pairs, everyone = ordered_pairs(subjects, atlas), subjects if atlas is None else (*subjects, atlas)
    images = {subject: _pooled(subject, downsample) for subject in everyone}
    labels = {subject: _strided(subject, downsample) for subject in images} if with_labels else {}

    def example(place, rng):
        batch = {"pair": place, "key": rng.integers(2**32, size=2, dtype=np.uint32)}
        for role, subject in zip(("fixed", "moving"), pairs[place], strict=True):
            batch[role] = images[subject][..., None]
            if with_labels:
                batch[f"{role}_labels"] = labels[subject]
        return batch

    return iter(
        grain.MapDataset.range(len(pairs))
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(example)[jax.process_index()::jax.process_count()]
        .batch(batch_size, drop_remainder=True)
        .to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))  # whole batches


def _pooled(subject, factor):
    if any(side % factor for side in subject.image.shape):
        raise InputError(f"data.downsample is {factor}, which does not divide the image shape "
                         f"{subject.image.shape}: choose a factor of every side")
    return np.asarray(average_pool(jnp.asarray(subject.image)[..., None], factor)[..., 0])


def _strided(subject, factor):
    if subject.labels is None:
        raise InputError(f"{subject.id} has no label map: add {subject.id}_seg.nii.gz or train without")
    # A block with an even side has no central voxel. Every image takes the same voxel, so pairs stay aligned.
    return np.ascontiguousarray(subject.labels[(slice(factor // 2, None, factor),) * 3])
