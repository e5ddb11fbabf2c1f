"""Stage 6: the deformation on the working grid."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from drivenmorph_jax.fields.inverse import coarse_inverse
from drivenmorph_jax.fields.unfold import unfolded
from drivenmorph_jax.fields.warp import warp
from drivenmorph_jax.images.contrast import SAME, correlation, matched
from drivenmorph_jax.images.masks import fill
from drivenmorph_jax.registration.prepare import Prepared
from drivenmorph_jax.registration.read import kept

FADE = 10.0  # mm, standard deviation of the Gaussian by which the deformation fades beyond a cut face


@dataclass(frozen=True, eq=False, kw_only=True)
class Deformed(Prepared):
    """Prepared images and the deformation between them, on the working grid: fields (D, H, W, 3) in voxels."""

    contrast: str  # "same" or "other"
    correlation: float | None  # of the images' values, if it decided on the contrast
    seen: jax.Array  # the moving image that was registered; with contrast "other" it has the values of the fixed one
    u: np.ndarray
    u_inverse: np.ndarray
    force: np.ndarray
    counted: jax.Array | None  # (D, H, W) bool, True at voxels outside both masks; None without masks


def deform(prepared: Prepared) -> Deformed:
    """Run the method on the prepared images."""
    contrast, r = _contrast(prepared)
    seen = prepared.moving_on_grid
    if contrast == "other":
        def once(fixed, moving):
            return prepared.once(fixed, moving, prepared.weights)
        seen = matched(once, prepared.fixed_on_grid, prepared.moving_on_grid, prepared.weights)
    u, u_inverse, force = prepared.whole(prepared.fixed_on_grid, seen, prepared.weights)
    counted = None
    if prepared.masks is not None:
        of_fixed, of_moving = prepared.masks
        out = of_fixed | (warp(of_moving[..., None].astype(jnp.float32), u)[..., 0] > 0)
        u, force, counted = fill(u, out[..., None]), force * ~out[..., None], ~out
        if prepared.distance is not None:
            u *= jnp.exp(-0.5 * (prepared.distance[..., None] / FADE) ** 2)
        u = unfolded(u)
    if u_inverse is None or prepared.masks is not None:
        u_inverse = coarse_inverse(u)
    return Deformed(**kept(prepared), contrast=contrast, correlation=r, seen=seen, counted=counted,
                    **{name: np.asarray(x) for name, x in (("u", u), ("u_inverse", u_inverse), ("force", force))})


def _contrast(prepared):
    """("same" or "other", the correlation that decided on it, or None where the request did)."""
    request, weights = prepared.request, prepared.weights
    if request.contrast != "auto":
        return request.contrast, None
    counted = None if weights is None else jnp.minimum(*weights)[..., 0]
    r = float(correlation(prepared.fixed_on_grid, prepared.moving_on_grid, counted))
    by_mind = request.method == "demons" and request.force == "mind"  # MIND descriptors need no change of contrast
    return ("same" if by_mind or r >= SAME else "other"), r
