"""What the page of a result shows: images and maps on the grid of the fixed image, numbers, checks and their places.

NiiVue shows one number a voxel. A file with a vector in each voxel it would show as colours or as frames. So vectors
are given to it as lengths in mm, the Jacobian determinant as its logarithm to base 2, and label maps as outlines.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nibabel
import numpy as np
from scipy import ndimage

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.evaluation import metrics
from drivenmorph_jax.images.intensity import anchored
from drivenmorph_jax.images.reading import load_image, load_labels
from drivenmorph_jax.images.volume import resample
from drivenmorph_jax.registration.result import SUMMARY
from drivenmorph_jax.transforms.itk import read_affine
from drivenmorph_jax.transforms.reading import read_chain
from drivenmorph_jax.transforms.world import displacement_of, map_points

RIM = 4  # voxels of the brain at its border, where the confidence is low in any case
UNCERTAIN = 4.0  # mm, the end of the colours of the uncertainty
OCTAVES = 2.0  # the colours of the Jacobian determinant go from 2^-2 to 2^2
# {check: the map in whose worst voxel it is looked at}
PLACES = {"stretch": "jacobian", "inverse": "jacobian", "similarity": "confidence", "gain": "confidence",
          "agreement": "confidence", "landmarks": "landmarks"}


@dataclass(frozen=True)
class Overlay:
    """A map over the images: its name and what it is, in words; unit; range of colours; and a table of colours."""

    name: str
    words: str
    unit: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]  # (value, text)
    colours: str  # a name in page.js


class Shown:
    """The content of the page of a result folder.

    Raises InputError where the folder holds no result, or where an image of it is missing.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        try:
            self.summary = json.loads((self.folder / SUMMARY).read_text())
            self._files, names = set(self.summary["files"]), (self.summary["fixed"], self.summary["moving"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{folder} holds no result of register: give the folder that was its --out") from error
        self.fixed, self.moving = map(self._image, names)

    def _image(self, path):
        if not Path(path).is_file():
            raise InputError(f"{path}, which {self.folder / SUMMARY} names, does not exist: put it back, or start from "
                             "the folder where register was run")
        return load_image(path)

    def _read(self, name):
        """The voxels of a file of the result."""
        return np.asarray(nibabel.load(self.folder / name).dataobj, np.float32)

    @cached_property
    def _affine(self):
        return read_affine(self.folder / "affine.tfm") if "affine.tfm" in self._files else None

    @cached_property
    def images(self):
        """{name: function that gives the voxels (X, Y, Z)} of the three images."""
        shape, affine = self.fixed.data.shape, self.fixed.affine
        return {"fixed": lambda: self.fixed.data,
                "moving": lambda: resample(self.moving, shape, affine, self._affine),
                "warped": lambda: self._read("warped.nii.gz")}

    @cached_property
    def maps(self):
        """{name: function that gives the voxels (X, Y, Z)} of the overlays that the result has files for."""
        found = {}
        if "force.nii.gz" in self._files:
            found["force"] = lambda: self._inside(np.linalg.norm(self._read("force.nii.gz")[:, :, :, 0], axis=-1))
        if self._transform and self._affine is not None:
            found["displacement"] = self._displacement
        if "jacobian.nii.gz" in self._files:
            found["jacobian"] = lambda: self._inside(np.clip(self._octaves, -OCTAVES, OCTAVES))
        if "uncertainty.nii.gz" in self._files:
            found["uncertainty"] = lambda: self._inside(self._read("uncertainty.nii.gz"))
        if "warped_labels.nii.gz" in self._files:
            found["labels"] = lambda: outlines(load_labels(self.folder / "warped_labels.nii.gz", self.fixed).data)
        return found

    @cached_property
    def _transform(self):
        names = [name for name in sorted(self._files) if name == "displacement.nii.gz" or
                 name.endswith("_mode-image_xfm.nii.gz")]
        return self.folder / names[0] if names else None

    def _displacement(self):
        """The length in mm of T^-1 phi(x) - x: the transform without its affine T."""
        move, back = read_chain(self._transform).map, np.linalg.inv(self._affine)
        found = displacement_of(lambda x: map_points(back, move(x)), self.fixed.data.shape, self.fixed.affine)
        return self._inside(np.linalg.norm(found, axis=-1))

    def _inside(self, x):
        """x with 0, which is transparent, outside the brain: there no image drives the deformation."""
        return np.where(self._brain, x, 0)

    @cached_property
    def _octaves(self):
        return np.log2(np.maximum(self._read("jacobian.nii.gz"), 2.0**-8))

    def overlays(self):
        """The `Overlay` of each map."""
        high = {name: _round(np.percentile(self.voxels(name)[self._brain], 99.5)) for name in ("force", "displacement")
                if name in self.maps}
        every = {
            "force": lambda: _lengths("Driving force", "length of the force that drove the registration",
                                      high["force"]),
            "displacement": lambda: _lengths("Displacement", "how far the deformation moves a point, without the "
                                             "affine", high["displacement"]),
            "jacobian": lambda: Overlay(
                "Jacobian determinant", "how much of the moving image is brought to a voxel, as a multiple of "
                "its volume. Red: it is shrunk; blue: it is stretched", "", -OCTAVES, OCTAVES,
                ((-2, "1/4"), (-1, "1/2"), (0, "1"), (1, "2"), (2, "4")), "two sides"),
            "uncertainty": lambda: _lengths("Uncertainty", "distance within which 90 % of the borders of structures "
                                            "lie from their place", UNCERTAIN),
            "labels": lambda: Overlay("Label outlines", "borders of the warped labels", "", 0, 1, (), "one colour")}
        return {name: every[name]() for name in self.maps}

    def voxels(self, name):
        """The voxels of an image or a map, float32, on the grid of the fixed image."""
        return np.asarray((self.images | self.maps)[name](), np.float32)

    def file(self, name):
        """The bytes of an image or a map as a NIfTI file, whose two geometries are that of the fixed image."""
        image = nibabel.Nifti1Image(self.voxels(name), self.fixed.affine)
        image.set_qform(self.fixed.affine, 1)
        image.set_sform(self.fixed.affine, 1)
        image.header.set_xyzt_units("mm")
        return image.to_bytes()

    @cached_property
    def _brain(self):
        return metrics.brain(anchored(self.fixed.data))

    def places(self):
        """{check: the point (RAS mm) where what it measures is worst}, for the checks that have one."""
        worst = {}
        if "jacobian" in self.maps:
            worst["jacobian"] = np.where(self._brain, np.abs(self._octaves), -1)
        if "confidence.nii.gz" in self._files:
            worst["confidence"] = np.where(ndimage.binary_erosion(self._brain, iterations=RIM),
                                           1 - self._read("confidence.nii.gz"), -1)
        points = {name: map_points(self.fixed.affine, np.array(np.unravel_index(x.argmax(), x.shape)))
                  for name, x in worst.items()}
        marks = [one for one in self.summary.get("landmarks", ()) if one["left_out"] is None]
        if marks:
            points["landmarks"] = np.array(max(marks, key=lambda one: one["after_mm"])["fixed"])
        return {check: points[name].tolist() for check, name in PLACES.items() if name in points}

    def described(self):
        """What the page needs beside the images, as JSON has it."""
        places = self.places()
        checks = [one | {"place": places.get(one["name"])} for one in self.summary.get("checks", ())]
        return {"title": f"{Path(self.moving.path).name} to {Path(self.fixed.path).name}",
                "middle": map_points(self.fixed.affine, np.array(self.fixed.data.shape) // 2).tolist(),
                "range": {name: _window(self.voxels(name)) for name in self.images},
                "overlays": {name: vars(one) for name, one in self.overlays().items()},
                "checks": sorted(checks, key=lambda one: one["status"] == "ok"),
                "landmarks": self.summary.get("landmarks", [])}


def outlines(labels):
    """1 at voxels of labels (X, Y, Z) that have a neighbour of a smaller label, else 0: borders are one voxel thick."""
    edge = np.zeros(labels.shape, np.float32)
    for axis in range(3):
        label, out = (np.moveaxis(x, axis, 0) for x in (labels, edge))
        out[1:][label[1:] > label[:-1]] = 1
        out[:-1][label[:-1] > label[1:]] = 1
    return edge


def _lengths(name, words, high):
    return Overlay(name, words, "mm", 0, high, tuple((high * k / 4, f"{high * k / 4:g}") for k in range(5)), "lengths")


def _round(x):
    """x, above 0, rounded up to 1, 2 or 4 times a power of ten."""
    power = 10.0 ** np.floor(np.log10(max(float(x), 1e-3)))
    return next(k * power for k in (1, 2, 4, 10) if k * power >= x * 0.999)


def _window(x):
    """The range of grey values: from the background to the 99.5th percentile of what is above it."""
    low = float(np.percentile(x, 0.5))
    above = x[x > low]
    return [low, float(np.percentile(above, 99.5)) if above.size else low + 1]
