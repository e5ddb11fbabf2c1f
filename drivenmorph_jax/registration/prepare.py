"""Stage 5: both images on the working grid, with intensities in [0, 1] and masked voxels filled."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.evaluation import metrics
from drivenmorph_jax.images.field_of_view import beyond
from drivenmorph_jax.images.intensity import normalise
from drivenmorph_jax.images.masks import fill
from drivenmorph_jax.images.volume import resample, smoothed
from drivenmorph_jax.registration.align import RIM
from drivenmorph_jax.registration.plan import Planned
from drivenmorph_jax.registration.read import kept
from drivenmorph_jax.transforms.maps import rescaled
from drivenmorph_jax.transforms.world import displacement_of, pull_back


@dataclass(frozen=True, eq=False, kw_only=True)
class Prepared(Planned):
    """A planned registration and its images on the working grid (D, H, W). The moving image is aligned, affinely or by
    the transform to start from."""

    fixed_on_grid: jax.Array
    moving_on_grid: jax.Array
    extra_on_grid: tuple[tuple[jax.Array, jax.Array], ...]  # the same of each extra channel
    masks: tuple[jax.Array, jax.Array] | None  # (D, H, W) bool, True where the fixed and the moving image do not count
    weights: tuple[jax.Array, jax.Array] | None  # (D, H, W, 1), 0 there
    distance: np.ndarray | None  # (D, H, W), mm from where both images are known; None where none is cut


def prepare(planned: Planned) -> Prepared:
    """Resample both images to the working grid and normalise them. Masked voxels are interpolated from around. Those
    beyond a cut face of one of the images are 0 and do not count. Extra channels are 0 outside the brain of their
    image; where one of them is cut, both go on smoothly.

    Raises InputError where the moving image does not overlap the fixed one, or an extra channel its image.
    """
    shape, grid, on_working_grid = planned.shape, planned.grid, sampler(planned)
    sides = ((planned.fixed, planned.fixed_mask, None), (planned.moving, planned.moving_mask, planned.affine))
    with ThreadPoolExecutor(len(sides)) as pool:  # SciPy samples an image on one core
        images = list(pool.map(lambda side: on_working_grid(smoothed(side[0], planned.spacing), side[2]), sides))
    masks = weights = distance = None
    if planned.masked:
        masks = tuple(jnp.zeros(shape, bool) if mask is None else
                      on_working_grid(mask, through, order=0) > 0 for _, mask, through in sides)
        images = [x if own is None else fill(x[..., None], mask[..., None])[..., 0]
                  for x, mask, (_, own, _) in zip(images, masks, sides, strict=True)]
    if planned.cut:
        found = [beyond(volume, shape, grid, through, RIM) for volume, _, through in sides]
        masks = tuple(mask if out is None else mask | out[1] for mask, out in zip(masks, found, strict=True))
        distance = np.max([out[0] for out in found if out is not None], axis=0)
    if masks is not None:
        weights = tuple(1.0 - mask[..., None] for mask in masks)
    extra = tuple(_extra(both, sides, on_working_grid, planned) for both in planned.extra)
    f, m = (jnp.asarray(normalise(np.asarray(x))) for x in images)
    if not (m > 0).any():
        remedy = "leave out --affine none" if planned.request.initial_transform is None else (
            "check the direction of --initial_transform, from fixed to moving, or leave it out")
        raise InputError(f"{planned.moving.path} does not overlap {planned.fixed.path} in world coordinates: {remedy}")
    return Prepared(**kept(planned), fixed_on_grid=f, moving_on_grid=m, extra_on_grid=extra, masks=masks,
                    weights=weights, distance=distance)


def sampler(planned):
    """A function (volume, through, order=1) that samples a Volume on the working grid (D, H, W), linearly or nearest.

    `through` is None for a Volume of the fixed world, and the affine for one of the moving world. The latter is sampled
    through the transform to start from, where there is one.
    """
    shape, grid = planned.shape, planned.grid
    if planned.start is not None:
        way = displacement_of(rescaled(planned.start, planned.scale), shape, grid)

    def on_working_grid(volume, through, order=1):
        if through is None or planned.start is None:
            return jnp.asarray(resample(volume, shape, grid, through, order=order))
        return jnp.asarray(pull_back(volume, way, grid, "linear" if order else "nearest"))

    return on_working_grid


def _extra(both, sides, on_working_grid, planned):
    """One extra channel of the fixed and of the moving image on the working grid, normalised.

    Raises InputError where it shows nothing of the brain in its image.
    """
    found, unknown = [], jnp.zeros(planned.shape, bool)
    for volume, (image, mask, through) in zip(both, sides, strict=True):
        brain = replace(image, data=metrics.brain(image.data).astype(np.float32))
        brain = on_working_grid(brain, through, order=0) > 0
        x = on_working_grid(smoothed(volume, planned.spacing), through) * brain
        if not (x > 0).any():
            raise InputError(f"{volume.path} does not overlap the brain of {image.path} in world coordinates: give an "
                             "image that is aligned to it")
        if mask is not None:
            x = fill(x[..., None], on_working_grid(mask, through, order=0)[..., None] > 0)[..., 0]
        if (out := beyond(volume, planned.shape, planned.grid, through, RIM)) is not None:
            unknown |= out[1]
        found.append((x, brain))
    if unknown.any():
        found = [(fill(x[..., None], unknown[..., None])[..., 0], brain) for x, brain in found]
    return tuple(jnp.asarray(normalise(np.asarray(x * brain))) for x, brain in found)
