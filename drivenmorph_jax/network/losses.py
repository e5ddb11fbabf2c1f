"""The training loss: similarity in both directions, smooth velocities, forces along the remaining displacement."""

from functools import partial

import jax
import jax.numpy as jnp

from drivenmorph_jax.fields.grid import average_pool, box_sum, difference, resize_field
from drivenmorph_jax.fields.warp import compose, warp

SIMILARITIES = ("lncc", "mse")


@partial(jax.jit, static_argnames="window")  # traced once for all updates of a level
def lncc(a, b, window, weight=None):
    """Mean squared local correlation coefficient of images (B, D, H, W, 1) over boxes of `window`^3 voxels, in [0, 1].

      cc(x) = cov(a, b)^2 / (var(a) var(b)) over the box around x

    A box is cut at the border. A box in which an image is constant counts as 0. The computation runs in float32. With
    `weight` (B, D, H, W) the mean is a weighted one.

    Raises ValueError where `window` is not odd.

    Reference: Avants et al., "Symmetric diffeomorphic image registration with cross-correlation", 2008.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window is {window}: a box around a voxel has an odd number of voxels on each side")
    axes, radius = (1, 2, 3), window // 2

    def prepared(x):
        """x less the middle of its range, with a range of at most 1. Its rounding errors stay below the floor of the
        variances, and a constant image gives exact zeros."""
        x = x[..., 0].astype(jnp.float32)
        low, high = (jax.lax.stop_gradient(end(x, axes, keepdims=True)) for end in (jnp.min, jnp.max))
        return (x - (low + high) / 2) / jnp.maximum(1, high - low)

    def mean(x):
        for axis in axes:
            place, last = jnp.arange(x.shape[axis]), x.shape[axis] - 1
            inside = 1 + jnp.minimum(place, radius) + jnp.minimum(last - place, radius)
            x = box_sum(x, radius, [axis]) / inside.reshape([-1 if k == axis else 1 for k in range(x.ndim)])
        return x

    a, b = prepared(a), prepared(b)
    mean_a, mean_b, aa, bb, ab = (mean(x) for x in (a, b, a * a, b * b, a * b))
    covariance = ab - mean_a * mean_b
    variances = jnp.maximum(aa - mean_a**2, 0) * jnp.maximum(bb - mean_b**2, 0)
    return jnp.average(covariance**2 / (variances + 1e-7), weights=weight)


def dissimilarity(a, b, kind, window):
    """1 - LNCC ("lncc"), or the mean squared error ("mse"), of images (B, D, H, W, 1)."""
    return 1 - lncc(a, b, window) if kind == "lncc" else ((a - b) ** 2).mean()


def smoothness(v):
    """Diffusion energy of v (..., D, H, W, 3): mean over voxels of the sum of its squared derivatives per voxel."""
    return sum((difference(v, axis) ** 2).sum(-1).mean() for axis in range(3))


def soft_dice(a, b):
    """Soft Dice loss of one-hot label maps (B, D, H, W, C).

      1 - mean over channels of 2 sum ab / (sum a + sum b)
    """
    axes = (1, 2, 3)
    return 1 - (2 * (a * b).sum(axes) / jnp.maximum(a.sum(axes) + b.sum(axes), 1e-5)).mean()


def remaining_displacement(u_inverse_before, u_total):
    """The displacement that remained before an update, in voxels of the update's grid.

      r = phi_before^-1 o phi_total

    phi_total is phi_before o (all updates from this one on), so r is the displacement of these updates.
    """
    return compose(u_inverse_before, u_total)


def force_alignment(force, remaining):
    """1 - cos(p, r), averaged with weight |r|: 0 where p points along r, 1 where p is zero or at a right angle to r."""
    r = jax.lax.stop_gradient(remaining)
    weight = jnp.sqrt((r * r).sum(-1) + 1e-8)
    # A force well below a twentieth of a voxel counts as zero: the derivative of its direction would be unbounded.
    length = jnp.sqrt((force * force).sum(-1) + 0.05**2)
    cosine = (force * r).sum(-1) / (length * weight)
    return (weight * (1 - cosine)).sum() / (weight.sum() + 1e-3)


def total_loss(config, registration, batch):
    """The training loss of one batch, and its parts for the log.

      L = 1/2 [sim(M o phi, F) + sim(F o phi^-1, M)]
          + smoothness * mean over updates of the diffusion energy of delta
          + level * mean over updates but the last of sim(M_l o phi_l, F_l)
          + force * mean over updates of 1 - cos(p, r)
          + dice * soft Dice, where the batch has label maps

    sim is `dissimilarity`. F_l, M_l and phi_l are the images and the transform at the level of an update, after that
    update. r is the `remaining_displacement` of an update, and the cosine is weighted as in `force_alignment`.

    Args:
      config: weights `smoothness`, `level`, `force`, `dice`; `similarity` "lncc" or "mse"; `window`, in voxels.
      registration: what the network returned for the batch.
      batch: fixed, moving (B, D, H, W, 1); optional one-hot fixed_labels, moving_labels (B, D, H, W, C).
    """
    fixed, moving = batch["fixed"], batch["moving"]
    u, updates = registration.u, registration.updates
    parts = {"similarity": 0.5 * dissimilarity(warp(moving, u), fixed, config.similarity, config.window)
             + 0.5 * dissimilarity(warp(fixed, registration.u_inverse), moving, config.similarity, config.window),
             "smoothness": sum(smoothness(update.velocity) for update in updates) / len(updates),
             "level": 0.0, "force": 0.0}
    for update in updates:
        space = update.u.shape[1:4]
        stride = fixed.shape[1] // space[0]
        # The transform after the last update is the result itself, which the first term covers.
        if update is not updates[-1]:
            score = dissimilarity(warp(average_pool(moving, stride), update.u), average_pool(fixed, stride),
                                  config.similarity, config.window)
            parts["level"] += score / (len(updates) - 1)
        remaining = remaining_displacement(update.u_inverse_before, resize_field(u, space))
        parts["force"] += force_alignment(update.force, remaining) / len(updates)
    if "fixed_labels" in batch:
        parts["dice"] = soft_dice(warp(batch["moving_labels"], u), batch["fixed_labels"])
    loss = parts["similarity"] + sum(config[name] * parts[name] for name in parts if name != "similarity")
    return loss, parts
