"""Where a registration can be relied on: `confidence`, and what it means in millimetres: `uncertainty`."""

import jax.numpy as jnp
import numpy as np

from drivenmorph_jax.fields.grid import padded_pool, resize
from drivenmorph_jax.images.contrast import local_agreement
from drivenmorph_jax.images.working_grid import coarse_factor
from drivenmorph_jax.runtime.stored import stored

# At a confidence of CONFIDENCE, 90 % of the label borders lie within WITHIN mm of their place. `benchmarks.confidence`
# measured it on pairs of T1 brains.
CONFIDENCE = (0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
WITHIN = (4.4, 4.1, 4.0, 3.6, 3.0, 2.4, 1.7)


def confidence(fixed, warped, spacing, weight=None):
    """How much two registered images have in common around each voxel: (D, H, W), in [0, 1].

    It is `images.contrast.local_agreement` of the means over voxels of about 2 mm, interpolated. It is 0 in the
    background of either image.

    Args:
      fixed, warped: (D, H, W) on one grid, of one contrast, with background 0.
      spacing: voxel size of this grid, in mm of a human brain.
      weight: (D, H, W), 0 where an image does not count; None if every voxel does.
    """
    return np.asarray(_confidence(fixed, warped, weight, coarse_factor(spacing)))


@stored(static_argnames="factor")
def _confidence(fixed, warped, weight, factor):
    coarse = (padded_pool(jnp.asarray(x, jnp.float32)[..., None], factor)[..., 0]
              for x in (fixed, warped, weight) if x is not None)
    local = local_agreement(*coarse)[..., None]
    whole = resize(local, [n * factor for n in local.shape[:3]])[..., 0]
    return whole[tuple(map(slice, fixed.shape))]


def uncertainty(confidence):
    """The distance in mm within which 90 % of the label borders lie, at voxels of this confidence."""
    return np.interp(confidence, CONFIDENCE, WITHIN).astype(np.float32)
