"""What the page of a result shows: images and maps on the grid of the fixed image, checks and their places.

All is cut to the box of what the images show, which a browser draws in half of the time of the whole grid.
"""

from functools import cached_property
from pathlib import Path

import nibabel
import numpy as np
from scipy import ndimage

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.evaluation import layers, metrics
from drivenmorph_jax.files import SUMMARY
from drivenmorph_jax.images.intensity import anchored
from drivenmorph_jax.images.reading import load_image, load_labels
from drivenmorph_jax.images.volume import affine_of_part, resample
from drivenmorph_jax.registration.checks import after_correction
from drivenmorph_jax.registration.guide import RADIUS
from drivenmorph_jax.registration.result import read_summary, transform_names
from drivenmorph_jax.transforms.itk import read_affine
from drivenmorph_jax.transforms.transform import Transform
from drivenmorph_jax.transforms.world import map_points, without_affine

IMAGES = "fixed", "warped", "moving"  # in the order in which the page needs them
EVERY = 2  # voxels along an axis, of which one tells where images show something: the first panel waits for it
RIM = 4  # voxels of the brain at its border, where the confidence is low in any case
# {check: the map in whose worst voxel it is looked at}
PLACES = {"stretch": "jacobian", "inverse": "jacobian", "similarity": "confidence", "gain": "confidence",
          "agreement": "confidence", "landmarks": "landmarks"}


class Shown:
    """What is shown of a result folder. Its methods take a state of a correction, by default the result as it is.

    Raises InputError where the folder holds no result, or where an image of it is missing.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.summary = read_summary(folder)
        self._files, self._images, self._windows = set(self.summary["files"]), {}, {}
        self.fixed, self.moving = (self._image(self.summary[role]) for role in ("fixed", "moving"))

    def _image(self, path):
        if not Path(path).is_file():
            raise InputError(f"{path}, which {self.folder / SUMMARY} names, does not exist: put it back, or start from "
                             "the folder where register was run")
        return load_image(path)

    def _read(self, name):
        """The voxels of a file of the result."""
        return np.asarray(nibabel.load(self.folder / name).dataobj, np.float32)

    @cached_property
    def linear(self):
        """The affine part T (4, 4) of the transform; None where no file has it."""
        if "affine.tfm" in self._files:
            return read_affine(self.folder / "affine.tfm")
        return None if self._transform is None else Transform.load(self._transform, fixed=self.fixed).linear

    def image(self, name):
        """The voxels (X, Y, Z) of an image of `IMAGES`."""
        if name not in self._images:
            self._images[name] = self.fixed.data if name == "fixed" else self._read("warped.nii.gz") if (
                name == "warped") else self._moving()
        return self._images[name]

    def _moving(self, every=1):
        """The moving image after the affine, at voxels of the fixed grid of which each axis has one in `every`."""
        shape = [-(-n // every) for n in self.fixed.data.shape]
        return resample(self.moving, shape, self.fixed.affine @ np.diag([every] * 3 + [1]), self.linear)

    def maps(self, state=None):
        """{name: function that gives what `layers.overlay` takes} of the overlays."""
        found = {}
        if "force.nii.gz" in self._files:
            found["force"] = lambda: self._read("force.nii.gz")[:, :, :, 0]
        if self._transform:
            found["displacement"] = lambda: without_affine(self._total if state is None else state.displacement,
                                                           self.fixed.affine, self.linear)
        if "jacobian.nii.gz" in self._files:
            found["jacobian"] = lambda: self._read("jacobian.nii.gz") if state is None else state.jacobian
        if "uncertainty.nii.gz" in self._files and state is None:  # it is measured anew when a correction is exported
            found["uncertainty"] = lambda: self._read("uncertainty.nii.gz")
        if "warped_labels.nii.gz" in self._files and (state is None or state.labels is not None):
            found["labels"] = lambda: (load_labels(self.folder / "warped_labels.nii.gz", self.fixed).data
                                       if state is None else state.labels)
        return found

    @cached_property
    def _transform(self):
        """The file of the transform, or None where the result has it in other formats only."""
        name = transform_names(self.summary.get("bids"))[0]
        found = [f"{name}{end}" for end in (".nii.gz", "_ras.nii.gz", ".h5") if f"{name}{end}" in self._files]
        return self.folder / found[0] if found else None

    @property
    def _total(self):
        return Transform.load(self._transform, fixed=self.fixed).displacement

    @cached_property
    def brain(self):
        """(X, Y, Z) bool, the voxels of the fixed brain."""
        return metrics.brain(anchored(self.fixed.data))

    @cached_property
    def box(self):
        """Three slices of the grid of the fixed image, outside of which no image shows anything."""
        some = (slice(None, None, EVERY),) * 3
        images = self.image("fixed")[some], self.image("warped")[some], self._moving(EVERY)
        between = np.array([[1 - EVERY], [EVERY - 1]])
        return layers.box([EVERY * layers.bounds(x) + between for x in images], self.fixed.data.shape)

    def _window(self, name):
        """The range of grey values of an image of `IMAGES`."""
        if name not in self._windows:
            self._windows[name] = layers.window(self.image(name)[self.box])
        return self._windows[name]

    def layer(self, name, state=None):
        """(voxels on the grid of the fixed image, lowest and highest value of the colours) of an image or a map."""
        if name in IMAGES:
            x = self.image(name) if state is None or name != "warped" else state.warped
            return x, *self._window(name)
        return layers.overlay(name, self.maps(state)[name](), self.brain)

    def file(self, name, state=None):
        """The bytes of an image or a map as a NIfTI file, in the box."""
        x, low, high = self.layer(name, state)
        return layers.nifti(x[self.box], low, high, self.affine).to_bytes()

    @cached_property
    def affine(self):
        """The affine (4, 4) of the box, from voxels to RAS mm."""
        return affine_of_part(self.fixed.affine, self.box)

    def drawing(self, mask):
        """The bytes of a mask on the grid of the fixed image as a NIfTI file, in the box, for NiiVue's drawing."""
        return nibabel.Nifti1Image(mask[self.box].astype(np.uint8), self.affine).to_bytes()

    def mask(self, drawing):
        """The mask (X, Y, Z) bool of such a file. Raises InputError where it is no mask in the box."""
        shape = tuple(one.stop - one.start for one in self.box)
        try:
            image = nibabel.Nifti1Image.from_bytes(drawing)
            if image.shape != shape or not np.allclose(image.affine, self.affine, atol=1e-2):
                raise ValueError
            found = np.zeros(self.fixed.data.shape, bool)
            found[self.box] = np.asarray(image.dataobj) > 0
        except Exception as error:  # damaged bytes make nibabel raise exceptions of nearly any kind
            raise InputError("the page sent a drawing that does not lie on its images: load the page again") from error
        return found

    def places(self):
        """{check: the point (RAS mm) where what it measures is worst}, for the checks that have one."""
        worst = {}
        if "jacobian.nii.gz" in self._files:
            worst["jacobian"] = np.where(self.brain, np.abs(layers.octaves(self._read("jacobian.nii.gz"))), -1)
        if "confidence.nii.gz" in self._files:
            worst["confidence"] = np.where(ndimage.binary_erosion(self.brain, iterations=RIM),
                                           1 - self._read("confidence.nii.gz"), -1)
        points = {name: map_points(self.fixed.affine, np.array(np.unravel_index(x.argmax(), x.shape)))
                  for name, x in worst.items()}
        marks = [one for one in self.summary.get("landmarks", ()) if one["left_out"] is None]
        if marks:
            points["landmarks"] = np.array(max(marks, key=lambda one: one["after_mm"])["fixed"])
        return {check: points[name].tolist() for check, name in PLACES.items() if name in points}

    def described(self):
        """What the page needs beside the images, as JSON has it."""
        return {"title": f"{Path(self.moving.path).name} to {Path(self.fixed.path).name}",
                "middle": map_points(self.fixed.affine, np.array(self.fixed.data.shape) // 2).tolist(),
                "colours": layers.COLOURS, "overlays": {name: vars(layers.OVERLAYS[name]) for name in self.maps()},
                "radius": RADIUS, "checks": self.checks()}

    def checks(self, state=None, landmarks=(), labels=()):
        """The checks, those that warn first. Of a state: with those that tell of its landmarks and pairs of labels."""
        found = self.summary.get("checks", ())
        return sorted(found if state is None else after_correction(found, landmarks, labels),
                      key=lambda one: one["status"] == "ok")
