"""Images and maps as NiiVue shows them: one number a voxel, with a range and a table of colours.

A file with a vector in each voxel NiiVue would show as colours or as frames. So vectors are given to it as lengths in
mm, the Jacobian determinant as its logarithm to base 2, and label maps as outlines.
"""

from dataclasses import dataclass

import nibabel
import numpy as np

from drivenmorph_jax.fields.grid import widened
from drivenmorph_jax.images.intensity import anchored, foreground

OCTAVES = 2.0  # the colours of the Jacobian determinant go from 2^-2 to 2^2
UNCERTAIN = 4.0  # mm, the end of the colours of the uncertainty
MARGIN = 2  # voxels of background around what images show
STEPS = 32767  # of the numbers in a file: 16 bits take half of the time of 32
# Tables of colours as NiiVue takes them: red, green, blue and opacity at places I from 0 to 255. NiiVue shows an
# overlay wherever its opacity is not 0, so what says little is 0.
COLOURS = {
    "lengths": {"R": [0, 40, 60, 200, 250, 255], "G": [0, 15, 20, 50, 160, 255], "B": [0, 120, 140, 90, 20, 160],
                "A": [0, 0, 255, 255, 255, 255], "I": [0, 12, 13, 100, 185, 255]},
    "two sides": {"R": [20, 60, 190, 190, 255, 255, 255, 150], "G": [60, 150, 220, 220, 215, 215, 120, 0],
                  "B": [190, 255, 255, 255, 190, 190, 70, 20], "A": [255, 255, 255, 0, 0, 255, 255, 255],
                  "I": [0, 70, 119, 120, 135, 136, 186, 255]},
    "one colour": {"R": [0, 255], "G": [0, 220], "B": [0, 60], "A": [0, 255], "I": [0, 255]}}


@dataclass(frozen=True)
class Overlay:
    """A map over the images: its name, unit and what it is, in words; and a table of `COLOURS`."""

    name: str
    words: str
    unit: str
    colours: str


OVERLAYS = {
    "force": Overlay("Driving force", "length of the force that drove the registration", "mm", "lengths"),
    "displacement": Overlay("Displacement", "how far the deformation moves a point, without the affine", "mm",
                            "lengths"),
    "jacobian": Overlay("Jacobian determinant", "how much of the moving image is brought to a voxel, as a multiple of "
                        "its volume. Red: it is shrunk; blue: it is stretched", "", "two sides"),
    "uncertainty": Overlay("Uncertainty", "distance within which 90 % of the borders of structures lie from their "
                           "place", "mm", "lengths"),
    "labels": Overlay("Label outlines", "borders of the warped labels", "", "one colour")}


def overlay(name, x, brain):
    """(voxels, lowest and highest value of the colours) of an overlay of `OVERLAYS`.

    Args:
      x: what it is made from. "force", "displacement": vectors (X, Y, Z, 3) in mm; "jacobian": determinants, (X, Y, Z);
        "uncertainty": mm; "labels": whole numbers.
      brain: (X, Y, Z) bool. Outside the value is 0, which is transparent: there no image drives the deformation.
    """
    if name == "labels":
        return outlines(x), 0.0, 1.0
    low, high = 0.0, UNCERTAIN
    if name == "jacobian":
        x, low, high = np.clip(octaves(x), -OCTAVES, OCTAVES), -OCTAVES, OCTAVES
    elif name != "uncertainty":
        x = np.sqrt(np.einsum("...i,...i", x, x))
        high = _round(np.percentile(x[brain], 99.5))
    return np.where(brain, x, np.float32(0)), low, high


def octaves(jacobian):
    """The logarithm to base 2 of determinants, which are taken for 2^-8 below it."""
    return np.log2(np.maximum(jacobian, np.float32(2.0**-8)))


def outlines(labels):
    """1 at voxels of labels (X, Y, Z) that have a neighbour of a smaller label, else 0: borders are one voxel thick."""
    edge = np.zeros(labels.shape, np.float32)
    for axis in range(3):
        label, out = (np.moveaxis(x, axis, 0) for x in (labels, edge))
        out[1:][label[1:] > label[:-1]] = 1
        out[:-1][label[:-1] > label[1:]] = 1
    return edge


def bounds(x):
    """The first and the last voxel (2, 3) of what an image (X, Y, Z) shows."""
    seen = foreground(anchored(x))
    planes = [np.flatnonzero(seen.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    return np.array([[some[0], some[-1]] for some in planes]).T


def box(found, shape):
    """Three slices of a grid of `shape`, outside of which no image shows anything. `found` are the `bounds` of each."""
    low, high = np.min(found, axis=0)[0], np.max(found, axis=0)[1]
    return widened([slice(int(a), int(b) + 1) for a, b in zip(low, high, strict=True)], shape, MARGIN)


def window(x):
    """The range of grey values: from the background to the 99.5th percentile of what is above it."""
    low = float(np.percentile(x, 0.5))
    above = x[x > low]
    return low, float(np.percentile(above, 99.5)) if above.size else low + 1


def nifti(x, low, high, affine):
    """An image or a map as a NIfTI image of 16 bits whose header has the range of its colours.

    0 stays 0, and other values are rounded to a 32767th of the largest. Both geometries of the file are `affine`.
    """
    slope = float(np.abs(x).max()) / STEPS or 1.0
    image = nibabel.Nifti1Image(np.rint(x / np.float32(slope)).astype(np.int16), affine)
    image.header.set_slope_inter(slope, 0)
    image.header["cal_min"], image.header["cal_max"] = low, high
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    image.header.set_xyzt_units("mm")
    return image


def _round(x):
    """x, above 0, rounded up to 1, 2 or 4 times a power of ten."""
    power = 10.0 ** np.floor(np.log10(max(float(x), 1e-3)))
    return float(next(k * power for k in (1, 2, 4, 10) if k * power >= x * 0.999))
