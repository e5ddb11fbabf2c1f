"""Stage 3: the affine alignment, and whether the images are cut where they should overlap."""

from dataclasses import dataclass

import numpy as np

from drivenmorph_jax.images.field_of_view import beyond
from drivenmorph_jax.images.intensity import foreground
from drivenmorph_jax.registration.read import kept
from drivenmorph_jax.registration.strip import Stripped
from drivenmorph_jax.transforms.affine import register_affine

RIM = 2.0  # mm along a cut face whose tissue gives no force


@dataclass(frozen=True, eq=False, kw_only=True)
class Aligned(Stripped):
    """A pair and its affine T (4, 4) from the fixed to the moving world, RAS mm: moving(T x) ~ fixed(x)."""

    affine: np.ndarray
    cut: bool  # whether tissue of the fixed image lies where one of the images is not known, see `images.field_of_view`

    @property
    def masked(self):
        """Whether voxels of one of the images do not count."""
        return super().masked or self.cut


def align(pair: Stripped) -> Aligned:
    """Find the affine, or take the one that was given.

    Raises InputError where the images cannot be aligned.
    """
    affine = pair.given_affine
    if isinstance(affine, str):
        affine = np.eye(4) if affine == "none" else register_affine(
            pair.fixed, pair.moving, pair.fixed_mask, pair.moving_mask, affine)
    grid = pair.fixed.data.shape, pair.fixed.affine
    found = beyond(pair.fixed, *grid, rim=RIM), beyond(pair.moving, *grid, affine, RIM)
    cut = any(out is not None and out[1][foreground(pair.fixed.data)].any() for out in found)
    return Aligned(**kept(pair), affine=affine, cut=cut)
