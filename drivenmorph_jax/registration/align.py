"""Stage 3: the affine alignment."""

from dataclasses import dataclass

import numpy as np

from drivenmorph_jax.registration.read import kept
from drivenmorph_jax.registration.strip import Stripped
from drivenmorph_jax.transforms.affine import register_affine


@dataclass(frozen=True, eq=False, kw_only=True)
class Aligned(Stripped):
    """A pair and its affine T (4, 4) from the fixed to the moving world, RAS mm: moving(T x) ~ fixed(x)."""

    affine: np.ndarray


def align(pair: Stripped) -> Aligned:
    """Find the affine, or take the one that was given.

    Raises InputError where the images cannot be aligned.
    """
    affine = pair.given_affine
    if affine is True:
        affine = register_affine(pair.fixed, pair.moving, pair.fixed_mask, pair.moving_mask)
    elif affine is False:
        affine = np.eye(4)
    return Aligned(**kept(pair), affine=affine)
