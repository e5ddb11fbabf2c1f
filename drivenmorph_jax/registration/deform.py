"""Stage 6: the deformation on the working grid."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from drivenmorph_jax import demons
from drivenmorph_jax.fields.grid import padded_pool
from drivenmorph_jax.fields.inverse import coarse_inverse
from drivenmorph_jax.fields.unfold import unfolded
from drivenmorph_jax.fields.warp import warp
from drivenmorph_jax.images.contrast import LITTLE, SAME, agreement, correlation, matched
from drivenmorph_jax.images.masks import fill
from drivenmorph_jax.images.working_grid import coarse_factor
from drivenmorph_jax.registration.prepare import Prepared
from drivenmorph_jax.registration.read import kept

FADE = 10.0  # mm, standard deviation of the Gaussian by which the deformation fades beyond a cut face


@dataclass(frozen=True, eq=False, kw_only=True)
class Deformed(Prepared):
    """Prepared images and the deformation between them, on the working grid: fields (D, H, W, 3) in voxels."""

    contrast: str  # "same" or "other"
    correlation: float | None  # of the images' values, if it decided on the contrast
    stiffness: str  # "low": by the method; "high": by `demons.registered_stiffly`
    agreement: float | None  # of the images, if it decided on the stiffness
    seen: jax.Array  # the moving image that was registered; with contrast "other" it has the values of the fixed one
    channels: tuple[jax.Array, jax.Array]  # (D, H, W, C), `fixed_on_grid` and `seen`, and their extra channels
    u: np.ndarray
    u_inverse: np.ndarray
    force: np.ndarray
    counted: jax.Array | None  # (D, H, W) bool, True at voxels outside both masks; None without masks
    landmarks_told: tuple[dict, ...] = ()  # of each landmark, see `registration.guide`
    labels_told: tuple[dict, ...] = ()  # of each pair of labels


def deform(prepared: Prepared) -> Deformed:
    """Run the method on the prepared images. Images that have little in common are registered stiffly instead."""
    weights, factor = prepared.weights, coarse_factor(prepared.spacing)

    def stiffly(fixed, moving, **how):
        return demons.registered_stiffly(fixed, moving, factor, weights, **how)

    def quickly(fixed, moving):
        return stiffly(fixed[..., None], moving[..., None], quick=True)

    pairs = (prepared.fixed_on_grid, prepared.moving_on_grid), *prepared.extra_on_grid
    contrasts = [_contrast(prepared, *pair) for pair in pairs]
    alike = [matched(quickly, *pair, weights) if contrast == "other" else pair[1]
             for pair, (contrast, _) in zip(pairs, contrasts, strict=True)]
    channels = jnp.stack([fixed for fixed, _ in pairs], -1), jnp.stack(alike, -1)
    (contrast, r), seen = contrasts[0], alike[0]
    stiffness, common = _stiffness(prepared, seen, quickly, factor)
    if stiffness == "high":
        u, u_inverse = stiffly(*channels), None
        force = demons.force_between(*channels, weights=weights)
    else:
        u, u_inverse, force = prepared.whole(*channels, weights)
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
                    stiffness=stiffness, agreement=common, channels=channels,
                    **{name: np.asarray(x) for name, x in (("u", u), ("u_inverse", u_inverse), ("force", force))})


def _contrast(prepared, fixed, moving):
    """("same" or "other", the correlation of the two images that decided on it, or None where the request did)."""
    request, weights = prepared.request, prepared.weights
    if request.contrast != "auto":
        return request.contrast, None
    counted = None if weights is None else jnp.minimum(*weights)[..., 0]
    r = float(correlation(fixed, moving, counted))
    by_mind = request.method == "demons" and request.force == "mind"  # MIND descriptors need no change of contrast
    return ("same" if by_mind or r >= SAME else "other"), r


def _stiffness(prepared, seen, quickly, factor):
    """("low" or "high", the agreement that decided on it, or None where the request did)."""
    request = prepared.request
    if request.stiffness != "auto":
        return request.stiffness, None
    if request.method == "demons" and request.force != "lncc":  # chosen with the images in view
        return "low", None
    fixed = prepared.fixed_on_grid
    images = [fixed, warp(seen[..., None], quickly(fixed, seen))[..., 0]]
    if prepared.weights is not None:
        images.append(jnp.minimum(*prepared.weights)[..., 0])
    common = float(agreement(*(padded_pool(x[..., None], factor)[..., 0] for x in images)))
    return ("high" if common < LITTLE else "low"), common
