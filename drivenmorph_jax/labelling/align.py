"""Atlases on the working grid of a scan: one affine for all of them, then Demons for each."""

import jax
import jax.numpy as jnp
import numpy as np

from drivenmorph_jax import demons
from drivenmorph_jax.fields.grid import identity_grid
from drivenmorph_jax.fields.unfold import unfolded
from drivenmorph_jax.fields.warp import warp, warp_nearest
from drivenmorph_jax.registration.align import align
from drivenmorph_jax.registration.plan import Planned, demons_grid
from drivenmorph_jax.registration.prepare import Prepared, prepare
from drivenmorph_jax.registration.read import kept

# From one starting point, with half of the iterations at the finest level: what this costs an atlas alone, the fusion
# hardly notices.
DEMONS = demons.LNCC | {"iterations": (100, 50, 10)}
MARGIN = 4.0  # mm around the brain


def prepared_scan(stripped):
    """A scan and its atlases' mean, a `registration.strip.Stripped`, aligned by an affine, on the working grid."""
    aligned = align(stripped)
    shape, grid, spacing = demons_grid(aligned.fixed, margin=MARGIN)
    return prepare(Planned(**kept(aligned), shape=shape, grid=grid, spacing=spacing, needed=0.0, whole=None))


def registered_atlas(prepared: Prepared, image, labels):
    """An atlas on the working grid of a scan, registered by Demons: (image, labels), each interpolated once.

    Args:
      prepared: the scan, and the affine to the atlases' grid, as `prepared_scan` returns it.
      image, labels: (D, H, W) on the atlases' grid.
    """
    matrix = jnp.asarray(np.linalg.inv(prepared.moving.affine) @ prepared.affine @ prepared.grid, jnp.float32)
    image = jnp.asarray(image)[..., None]
    still = jnp.zeros((*prepared.shape, 3))
    moving = warp(image, _total(matrix, still))
    fixed = prepared.fixed_on_grid[..., None]
    images, force = demons.weighted((fixed, moving), prepared.weights, DEMONS["force"])
    total = _total(matrix, unfolded(demons.demons(*images, **DEMONS | {"force": force}).u))
    return (np.asarray(warp(image, total)[..., 0]),
            np.asarray(warp_nearest(jnp.asarray(labels)[..., None], total)[..., 0]))


@jax.jit
def _total(matrix, u):
    """The displacement M (x + u(x)) - x, from voxels of the working grid to voxels of the atlases' grid."""
    x = identity_grid(u.shape[:3])
    return (x + u) @ matrix[:3, :3].T + matrix[:3, 3] - x
