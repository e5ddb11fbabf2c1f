"""Preparation of a public data set, or of any folder of images, for training and evaluation.

    drivenmorph prepare NAME SOURCE DESTINATION

`python -m drivenmorph_jax.data.prepare` does the same. NAME is the layout of SOURCE, one of `LAYOUTS`. Images must be
skull-stripped. Each image is checked and turned to RAS. Unless the layout is aligned already, the image is aligned to
the MNI152 brain by an affine, resampled to 1 mm and cropped to one grid. Labels follow by nearest neighbour.

DESTINATION gets

    ID_t1.nii.gz        the images
    ID_seg.nii.gz       the label maps
    splits.json         the subjects of each split; all images of a person are in one
    labels.csv          the names of the labels, where SOURCE has this file
    mni152_t1.nii.gz    the MNI152 brain, where images were aligned to it; data.atlas can name it
    contact_sheet.png   a slice of every subject, to be looked at

ID is the BIDS name of an image or its whole file name without the ending. A subject that cannot be used is named and
left out. Subjects that are already there are not made again.
"""

import io
import json
import os
import pickle
import shutil
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import nibabel
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

from drivenmorph_jax.data.bids import bids
from drivenmorph_jax.data.folder import IMAGE, LABELS, drawn_splits
from drivenmorph_jax.data.layouts import (
    folder,
    ixi,
    ixi_pickles,
    learn2reg_oasis,
    lpba40,
    malf,
    mindboggle,
    neurite_oasis,
)
from drivenmorph_jax.errors import InputError, InputWarning
from drivenmorph_jax.files import make_folder, replacing
from drivenmorph_jax.images import writing
from drivenmorph_jax.images.geometry import checked
from drivenmorph_jax.images.intensity import anchored, foreground, normalise
from drivenmorph_jax.images.reading import load_image, load_labels
from drivenmorph_jax.images.volume import canonical, on_grid, resample, smoothed

SHAPE, SPACING = (160, 192, 160), 1.0  # of the grid in MNI space: the brain of the template and 10 mm around
TEMPLATE = "mni152"  # the id of the MNI152 brain
LAYOUTS = {  # name: (function that finds {id: (image, labels or None, split or None)}, whether images are aligned)
    "oasis": (neurite_oasis, True), "oasis-l2r": (learn2reg_oasis, True), "ixi": (ixi, False),
    "ixi-pkl": (ixi_pickles, True), "lpba40": (lpba40, False), "mindboggle": (mindboggle, False),
    "malf": (malf, False), "bids": (bids, False), "folder": (folder, False),
}


class _Arrays(pickle.Unpickler):
    """An unpickler for NumPy arrays only. A pickle can call any function, and this class allows no others."""

    ALLOWED = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
               *((f"numpy.{core}.{module}", name) for core in ("core", "_core")
                 for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"),
                                      ("numeric", "_frombuffer")))}  # by protocol 5, the default of Python 3.14

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return super().find_class(module, name)


def load_pickle(path):
    """Read (image, labels) from a pickle of TransMorph's authors.

    Raises InputError where the pickle does not hold just two 3-D arrays of one shape.
    """
    try:
        image, labels = _Arrays(io.BytesIO(Path(path).read_bytes())).load()
        image, labels = np.asarray(image, np.float32), np.asarray(labels)
    except Exception as error:
        raise InputError(f"{path} is not a pair of NumPy arrays ({error}); it is not read") from None
    if image.ndim != 3 or image.shape != labels.shape:
        raise InputError(f"{path} holds arrays of shapes {image.shape} and {labels.shape}; give volumes of one shape")
    return image, labels


def prepare(name, source, destination, workers=None, geometry="sform"):
    """Prepare the data set in the folder `source` for training and evaluation, in the folder `destination`.

    Args:
      name: layout of `source`, a name of `LAYOUTS`.
      source, destination: folders.
      workers: number of subjects at a time; by default one a core.
      geometry: as in `images.geometry.placed`.

    Returns:
      The ids of the subjects in `destination`.

    Raises InputError where `source` is not a folder, two of its images would have one id or two label maps fit one
    image, `destination` cannot be made, or fewer than two subjects can be used.
    """
    source, destination = Path(source), Path(destination)
    if not source.is_dir():
        raise InputError(f"{source} is not a folder: give the one that holds the data set")
    layout, aligned = LAYOUTS[name]
    found = layout(source)
    if len(found) < 2:
        raise InputError(f"{source} holds {len(found)} subjects in the layout {name}: {layout.__doc__}")
    for id in found:
        if not aligned and id.casefold() == TEMPLATE:
            raise InputError(f"{found[id][0]} has the id of the MNI152 brain, which the result holds too: rename it")
    make_folder(destination)
    jobs = [(id, image, labels, destination, aligned, checked(geometry)) for id, (image, labels, _) in found.items()]
    with ProcessPoolExecutor(workers or os.cpu_count(), get_context("spawn")) as pool:
        outcomes = list(tqdm(pool.map(_prepared, jobs), total=len(jobs), unit="subject", dynamic_ncols=True))
    made = []
    for (id, *_), (fault, doubts) in zip(jobs, outcomes, strict=True):
        for doubt in doubts:
            print(f"{id}: {doubt}")
        if fault:
            print(f"{id} is left out: {fault}")
        else:
            made.append(id)
    if len(made) < 2:
        raise InputError(f"{source}: {len(made)} of {len(jobs)} subjects can be used; the reasons are above")
    _write_splits(destination, {id: found[id][2] for id in made})
    for table in sorted(source.glob("labels.csv")):
        shutil.copyfile(table, destination / "labels.csv")
    if not aligned:
        template, grid = mni_grid()
        _save(destination / f"{TEMPLATE}{IMAGE}", resample(template, SHAPE, grid), on_grid(SHAPE, grid))
    contact_sheet(destination / "contact_sheet.png", destination, made)
    return made


def _prepared(job):
    """Prepare one subject: (a message about an input that cannot be used, or None; the warnings about its files).

    Each process prepares one subject at a time, on one core.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", InputWarning)
        fault = _fault(*job)
    return fault, dict.fromkeys(str(x.message) for x in caught if issubclass(x.category, InputWarning))


def _fault(id, image, labels, destination, aligned, geometry):
    out = destination / f"{id}{IMAGE}"
    if out.is_file():
        return None
    try:
        if image.suffix == ".pkl":
            voxels, segmentation = load_pickle(image)
            image, labels = load_image(voxels), load_labels(segmentation.astype(np.int32))
        else:
            image = load_image(_source(image), geometry)
            labels = load_labels(_source(labels), image, geometry) if labels is not None else None
        image = replace(image, data=anchored(image.data))
        if aligned:
            image, labels = canonical(image), labels and canonical(labels)
            voxels, segmentation, grid = image.data, labels and labels.data, image.affine
        else:
            from drivenmorph_jax.transforms.affine import register_affine
            template, grid = mni_grid()
            transform = register_affine(template, image)
            voxels = resample(smoothed(image, SPACING), SHAPE, grid, transform)
            segmentation = labels and resample(labels, SHAPE, grid, transform, order=0)
        like = on_grid(voxels.shape, grid)
        if segmentation is not None:
            writing.save(destination / f"{id}{LABELS}", segmentation.astype(np.int32), like)
        _save(out, voxels, like)  # last, so that a subject with an image is complete
    except InputError as error:
        return str(error)
    return None


def _save(path, voxels, like):
    # 255 steps are finer than the noise of a scanner.
    writing.save(path, np.rint(255 * normalise(voxels)).astype(np.int16), like)


def _source(path):
    """The image to give to `load_image`: Analyze files are opened here, other paths are returned.

    `load_image` refuses Analyze files, because they do not say which side is left. Only LPBA40 still has them, and only
    for this data set is it known.
    """
    return nibabel.load(path) if path.name.endswith((".img", ".img.gz")) else path


def mni_grid():
    """The MNI152 brain as a Volume, and the affine of a grid of `SHAPE` around it."""
    from nilearn.datasets import load_mni152_template
    template = canonical(load_image(load_mni152_template(resolution=1)))
    inside = np.argwhere(foreground(template.data))
    centre = template.affine @ [*(inside.min(0) + inside.max(0)) / 2, 1]
    affine = np.diag([SPACING, SPACING, SPACING, 1.0])
    affine[:3, 3] = np.round(centre[:3] - SPACING * (np.array(SHAPE) - 1) / 2)
    return template, affine


def _write_splits(destination, given):
    """Write splits.json, with the splits of the data set where it has them.

    Otherwise all persons are divided at random, a tenth for val and a tenth for test. If the data set has fewer than
    two subjects for val, its train subjects are divided in this way; a test split that it has stays as it is.
    """
    splits = {split: [id for id in given if given[id] == split] for split in ("train", "val", "test")}
    if not all(given.values()):
        splits = drawn_splits(sorted(given))
    elif len(splits["val"]) < 2:
        drawn = drawn_splits(sorted(splits["train"]))
        # A test split of the data set stays as it is: what is drawn for test is trained on.
        splits |= drawn if not splits["test"] else {"train": drawn["train"] + drawn["test"], "val": drawn["val"]}
    with replacing(destination / "splits.json") as temporary:
        temporary.write_text(json.dumps(splits, indent=1) + "\n")


def contact_sheet(path, folder, ids):
    """Write a picture with the middle axial slice of every subject and the outlines of its labels.

    A turned or shifted brain stands out in it.
    """
    columns = min(12, len(ids))
    rows = -(-len(ids) // columns)
    figure = Figure(figsize=(1.2 * columns, 1.45 * rows), facecolor="black", layout="tight")
    for k, id in enumerate(ids):
        ax = figure.add_subplot(rows, columns, k + 1)
        image = load_image(folder / f"{id}{IMAGE}").data
        plane = image[:, :, image.shape[2] // 2].T
        ax.imshow(plane, cmap="gray", origin="lower")
        if (folder / f"{id}{LABELS}").is_file():
            labels = load_labels(folder / f"{id}{LABELS}").data[:, :, image.shape[2] // 2].T
            edges = (labels != np.roll(labels, 1, 0)) | (labels != np.roll(labels, 1, 1))
            ax.imshow(np.where(edges, 1.0, np.nan), cmap="autumn", origin="lower", alpha=0.6)
        ax.set_title(id, fontsize=6, color="white", pad=2)
        ax.set_axis_off()
    FigureCanvasAgg(figure)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)


if __name__ == "__main__":
    from drivenmorph_jax.cli import prepare as program
    from drivenmorph_jax.cli.program import run

    run(program.main)
