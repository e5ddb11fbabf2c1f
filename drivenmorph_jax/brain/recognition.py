"""Recognition of a whole head, of which the brain must be extracted before a registration.

A head has a dark layer, the skull, between two brighter ones, the scalp and the brain. From the surface of a stripped
brain inwards no such layer follows, except across a fissure here and there.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from drivenmorph_jax.brain.extraction import filled
from drivenmorph_jax.images.intensity import anchored, foreground
from drivenmorph_jax.images.volume import block_means

SPACING = 2.0  # mm, about: finer images are averaged
SMOOTH = 6.0  # mm, the Gaussian that smooths the surface before its normals are taken
DEPTH = 30  # mm, to which the image is followed inwards
RAYS, FEWEST = 3000, 300
DARK = 0.4  # of the darker of the two layers around it: a layer below counts as dark
# The share of the surface from which a dark layer is found. See `tests/test_brain.py` for the images it was set with.
SHARE = 0.15
LARGE = 2200.0  # ml: more than a brain holds, and less than a head does
CUT = 0.05, 500.0  # share of the faces of the volume that show tissue, and ml, from which it is a part of a head


@dataclass(frozen=True)
class Surface:
    """What `surface` measures."""

    share: float  # of the surface, below which a dark layer lies, with a bright one on both sides
    size: float  # ml within the surface
    cut: float  # share of the faces of the volume within the surface


def is_head(volume):
    """Whether a Volume shows a whole head or a part of one, and not a stripped brain. In doubt it does not.

    It takes a share of the surface with a skull below, and a size that is a head's: the map of a tissue or the brain of
    an animal shows dark layers as well.
    """
    seen = surface(volume)
    return seen.share >= SHARE and (seen.size >= LARGE or seen.cut >= CUT[0] and seen.size >= CUT[1])


def surface(volume):
    """Measure the surface of what a Volume shows, as a `Surface`.

    From each of `RAYS` voxels of the surface, values I(t) are read at depths t = 0, 1 ... `DEPTH` mm along the inward
    normal. A dark layer lies below where

      min over t of I(t) / min(max over s <= t of I(s), max over s >= t of I(s)) < DARK
    """
    factors = np.maximum(1, np.floor(SPACING / volume.spacing * 1.005).astype(int))
    spacing = volume.spacing * factors
    x = np.nan_to_num(block_means(volume.data, factors), posinf=0, neginf=0)
    if min(x.shape) < 4:
        return Surface(0.0, 0.0, 0.0)
    x = anchored(x)
    x = np.maximum(x - np.percentile(x, 1), 0)
    inside = _inside(x)
    size = float(np.count_nonzero(inside) * spacing.prod() / 1e3)
    faces = np.concatenate([np.take(inside, place, axis).ravel() for axis in range(3) for place in (0, -1)])
    smooth = ndimage.gaussian_filter(np.pad(inside, 1, "edge").astype(np.float32), SMOOTH / spacing, mode="nearest")
    places = np.argwhere(inside & ~ndimage.binary_erosion(inside, border_value=1))
    places = places[np.random.default_rng(0).permutation(len(places))[:RAYS]]
    normals = np.stack([(smooth[tuple((places + 1 + step).T)] - smooth[tuple((places + 1 - step).T)]) / (2 * mm)
                        for step, mm in zip(np.eye(3, dtype=int), spacing, strict=True)], axis=-1)
    steep = np.linalg.norm(normals, axis=-1)
    usable = steep > 0.2 / SMOOTH  # half of what a plane has: not the surface of noise
    if np.count_nonzero(usable) < FEWEST:
        return Surface(0.0, size, float(faces.mean()))
    places, normals = places[usable], (normals / steep[:, None])[usable]
    ways = places[:, None] + np.arange(DEPTH + 1.0)[:, None] * (normals / spacing)[:, None]
    values = ndimage.map_coordinates(x, np.moveaxis(ways, -1, 0), order=1, mode="constant")
    outer = np.maximum.accumulate(values, axis=1)
    inner = np.maximum.accumulate(values[:, ::-1], axis=1)[:, ::-1]
    share = (values < DARK * np.minimum(outer, inner)).any(axis=1).mean()
    return Surface(float(share), size, float(faces.mean()))


def _inside(x):
    """The foreground without specks, and what it encloses: what no path outside joins with the faces of the volume."""
    parts, count = ndimage.label(foreground(x))
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    sizes[0] = 0
    tissue = (sizes > 0.03 * sizes.max())[parts]
    return filled(tissue)
