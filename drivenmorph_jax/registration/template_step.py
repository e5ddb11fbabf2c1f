"""What is computed for one subject of a template, in stages. Each stage leaves a file, which says that it is done.

    OUT/.template/ID/brain.npz        read: the brain on its own grid
    OUT/.template/ID/affine.npy       affine: the affine from the first subject
    OUT/.template/ID/aligned.npy      resample: the brain on the grid of the template, through the affine
    OUT/.template/ID/round-K.npy      round K: the displacement from the mean of this round
    OUT/subjects/ID/                  write: the transform and its inverse
    OUT/.template/ID/warped.npy       write: the brain and its label map on the grid of the template

Displacements are half as fine as the grid of their round, in voxels of their own grid. The other files in .template are
those of all subjects, see `registration.template`.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from drivenmorph_jax.demons import classical
from drivenmorph_jax.fields.grid import average_pool, coarsen_field, resize_field
from drivenmorph_jax.fields.inverse import coarse_inverse
from drivenmorph_jax.fields.unfold import unfolded
from drivenmorph_jax.fields.warp import compose
from drivenmorph_jax.files import new_files, replacing, write_json
from drivenmorph_jax.images.intensity import anchored, normalise
from drivenmorph_jax.images.reading import load_image, load_labels
from drivenmorph_jax.images.volume import Volume, on_grid, resample, smoothed
from drivenmorph_jax.registration.job import DONE, FAILED, FAILURE, MISSING, Job, made
from drivenmorph_jax.registration.read import scaled, scaled_grid, scaled_transform
from drivenmorph_jax.registration.result import save_transforms
from drivenmorph_jax.registration.strip import brain_of
from drivenmorph_jax.transforms.affine import register_affine
from drivenmorph_jax.transforms.transform import Transform
from drivenmorph_jax.transforms.world import (
    followed_by,
    pull_back,
    total_inverse_displacement,
    unfolded_in_world,
)

STATE, SUBJECTS = ".template", "subjects"
STRIDE = 2  # the grid of a displacement is so many times coarser than that of the images
ITERATIONS = {4: 60, 2: 20, 1: 10}  # of a round, by how many times coarser its images are than the template


@dataclass(frozen=True)
class Step(Job):
    """One stage of one subject. It can be sent to another process.

    `files` has the paths of the image and, where there is one, of the label map. `settings` has geometry and strip, and
    from the affine on what the stages before found: see `registration.template`.
    """

    stage: str  # "read", "affine", "resample", "round-K" or "write"

    @property
    def folder(self):
        return Path(self.out) / SUBJECTS / self.name

    @property
    def notes(self):
        return Path(self.out) / STATE / self.name

    @property
    def path(self):
        """The file that this stage leaves."""
        names = {"read": "brain.npz", "affine": "affine.npy", "resample": "aligned.npy", "write": "warped.npy"}
        return self.notes / names.get(self.stage, f"{self.stage}.npy")

    def state(self):
        """{"status": DONE}, {"status": FAILED, "error": a sentence}, or MISSING."""
        if self.path.is_file():
            return {"status": DONE}
        if found := made(self.notes / FAILURE, self.made_from):
            return {"status": FAILED, "error": found["error"]}
        return {"status": MISSING}

    def run(self):
        """Compute the stage, from its files to its file. An error becomes its failure."""
        try:
            getattr(self, f"_{self.stage.partition('-')[0]}")()
        except Exception as error:
            self.fail(error)

    def _read(self):
        geometry = self.settings["geometry"]
        image = load_image(self.files["image"], geometry)
        if "labels" in self.files:
            load_labels(self.files["labels"], image, geometry)  # refused before the work, not after
        image = brain_of(replace(image, data=anchored(image.data)), self.settings["strip"])
        with replacing(self.path) as temporary:
            np.savez(temporary, data=image.data, affine=image.affine)

    def brain(self):
        """The brain as a Volume, in the lengths in which the template is made."""
        with np.load(self.notes / "brain.npz") as found:
            return scaled(Volume(found["data"], found["affine"], None, self.files["image"]),
                          self.settings.get("scale", 1.0))

    def _affine(self):
        first, kind = replace(self, name=self.settings["first"]), self.settings["affine"]
        same = first.name == self.name or kind == "none"
        save(self.path, np.eye(4) if same else register_affine(first.brain(), self.brain(), kind=kind))

    def _resample(self):
        image = smoothed(self.brain(), self.settings["spacing"])
        save(self.path, normalise(resample(image, *self._grid())))

    def _grid(self):
        """(shape, affine of the grid of the template, affine from its world to that of the subject)."""
        settings = self.settings
        return settings["shape"], np.array(settings["grid"]), np.array(settings["affines"][self.name])

    def aligned(self, factor):
        """The brain (D, H, W, 1) after the affine, on a grid so many times coarser than that of the template."""
        return average_pool(jnp.asarray(np.load(self.notes / "aligned.npy"))[..., None], factor)

    def field(self, rounds):
        """The displacement from the mean to this subject after so many rounds; None before the first.

          phi o exp(w)    phi of the last round, w the velocity by which the mean was moved at its end
        """
        if not rounds:
            return None
        move = np.load(shared(self.out, f"move-{rounds}.npy"))
        return compose(jnp.asarray(np.load(self.notes / f"round-{rounds}.npy")), jnp.asarray(move))

    def _round(self):
        number = int(self.stage.partition("-")[2])
        factor, mean = self.settings["factor"], np.load(shared(self.out, f"mean-{number}.npy"))
        start, half = self.field(number - 1), [n // STRIDE for n in mean.shape]
        settings = classical.LNCC | {"iterations": (ITERATIONS[factor],), "stride": STRIDE}
        found = classical.demons(jnp.asarray(mean)[..., None], self.aligned(factor), **settings,
                                 initial=None if start is None else resize_field(start, half))
        save(self.path, coarsen_field(found.u, half))

    def _write(self):
        (shape, grid, linear), scale = self._grid(), self.settings["scale"]
        u = unfolded(resize_field(self.field(self.settings["rounds"]), shape))
        u, back = np.asarray(u), np.asarray(coarse_inverse(u))
        grid, linear = scaled_grid(grid, 1 / scale), scaled_transform(linear, 1 / scale)
        image = replace(self, settings=self.settings | {"scale": 1.0}).brain()
        source = load_image(self.files["image"], self.settings["geometry"])
        vectors = u @ grid[:3, :3].T.astype(np.float32)  # at the voxels of the template, so that nothing is sampled
        there = unfolded_in_world(followed_by(linear, vectors, grid), grid, linear)
        transform = Transform(there, on_grid(shape, grid, path="template.nii.gz"), linear, source,
                              total_inverse_displacement(image.data.shape, image.affine, back, grid, linear),
                              ("template", "subject"))
        self._save_transforms(transform)
        if "labels" in self.files:
            labels = load_labels(self.files["labels"], source, self.settings["geometry"])
            save(self.notes / "labels.npy", pull_back(labels, there, grid, "nearest"))
        save(self.path, pull_back(replace(image, data=normalise(image.data)), there, grid))

    def _save_transforms(self, transform):
        """Write the transforms to the folder of the subject, and their names, so that other files there stay."""
        with new_files(self.folder) as new:
            save_transforms(new, transform, self.formats)
            names = sorted(path.name for path in new.iterdir())
        write_json(self.notes / "files.json", names)

    def files_written(self):
        """The files of the subject in the result."""
        return [self.folder / name for name in json.loads((self.notes / "files.json").read_text())]


def shared(out, name):
    """A file of the template itself in its folder of intermediate results."""
    return Path(out) / STATE / name


def save(path, array):
    """Write an array to a .npy file, complete or not at all."""
    with replacing(path) as temporary:
        np.save(temporary, np.asarray(array))
