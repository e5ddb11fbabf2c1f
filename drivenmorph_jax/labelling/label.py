"""Labels of a scan from atlases, from files to files."""

import csv
import filecmp
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from tqdm import tqdm

from drivenmorph_jax.data.folder import IMAGE, LABELS, beside
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.evaluation import figures
from drivenmorph_jax.evaluation.tables import pairs_csv
from drivenmorph_jax.files import (
    SUMMARY,
    alone_in,
    former_files,
    make_folder,
    names_apart,
    new_files,
    stem,
    write_json,
)
from drivenmorph_jax.images import writing
from drivenmorph_jax.images.reading import PATHS, Source
from drivenmorph_jax.images.volume import Volume
from drivenmorph_jax.labelling.align import DEMONS, prepared_scan, registered_atlas
from drivenmorph_jax.labelling.atlases import Atlases, read_atlases
from drivenmorph_jax.labelling.fusion import FUSIONS, fused
from drivenmorph_jax.registration.job import made, made_from
from drivenmorph_jax.registration.progress import Progress
from drivenmorph_jax.registration.read import Request, scaled, scaled_grid
from drivenmorph_jax.registration.register import begun
from drivenmorph_jax.runtime.provenance import environment

VOLUMES = "volumes.csv"
DEFINITIONS = {
    "ml": "Voxels of the label in labels.nii.gz times the volume of a voxel.",
    "confidence": "Sum of the weights of the atlases that vote for the label that won, 0 to 1; mean over the voxels of "
                  "the label."}


@dataclass(frozen=True, eq=False)
class Labelling:
    """The labels of a scan, on its own grid."""

    labels: nibabel.Nifti1Image
    confidence: nibabel.Nifti1Image  # of each voxel's label, 0 to 1
    volumes: list[dict]  # of every label but 0 that was found: {"label", "name", "ml", "confidence"}
    summary: dict  # the content of summary.json
    image: Volume  # the scan

    def overview(self, path: str | Path) -> None:
        """Draw the outlines of the labels, and the confidence, on the scan to a PNG file."""
        labels, confidence = (np.asarray(x.dataobj) for x in (self.labels, self.confidence))
        title = (f"{Path(self.image.path).name}\n{len(self.volumes)} labels from {len(self.summary['ids'])} atlases, "
                 f"mean confidence {self.summary['confidence'] or 0:.2f}")
        figures.labelled(path, self.image, labels, confidence, title)

    def save(self, out: str | Path) -> None:
        """Write labels.nii.gz, confidence.nii.gz, volumes.csv, overview.png and summary.json to the folder `out`.

        They are written to a folder inside first, and then replace those of an earlier run. summary.json comes last.

        Raises InputError where a file cannot be written, or where the folder holds something else under these names.
        """
        out = make_folder(out)
        with new_files(out, former_files(out, ("ids",))) as new:
            writing.write(new / "labels.nii.gz", self.labels)
            writing.write(new / "confidence.nii.gz", self.confidence)
            pairs_csv(new / VOLUMES, self.volumes)
            self.overview(new / "overview.png")
            self.summary["files"] = sorted(path.name for path in new.iterdir())
            write_json(new / SUMMARY, self.summary)


def label(image: Source, atlases: str | Path | Atlases, *, fusion: str = "joint", strip: str = "auto",
          geometry: str = "sform", quiet: bool = False) -> Labelling:
    """Label a scan from atlases: images with label maps, which are registered to it and vote.

    The scan is aligned to the mean of the atlases by one affine. Each atlas is registered to the scan by Demons, by
    local correlation, see `labelling.align`. Its labels are carried over by nearest neighbour. Each votes at each voxel
    with a weight, see `labelling.fusion`, and the label with most weight wins.

    Args:
      image: the scan, of the contrast of the atlases: a file, a nibabel image, or an array with voxels of 1 mm.
      atlases: a folder with ID_t1.nii.gz and ID_seg.nii.gz for each atlas, skull-stripped and on one grid, or what
        `labelling.atlases.read_atlases` returned.
      fusion: the weights. "joint": joint label fusion; "local": by local similarity; "majority": all alike.
      strip: "auto": in an image that shows a whole head, the brain is found, see `brain_mask`; "no": it is a brain.
      geometry: of the scan, as in `register`.
      quiet: print nothing.

    Returns:
      A `Labelling`.

    Raises:
      InputError: an image or a folder that cannot be used, an unknown fusion, or a scan that is one of the atlases.

    Reference: Wang et al., Multi-atlas segmentation with joint label fusion, IEEE TPAMI 2013.
    """
    for name, value, choices in (("fusion", fusion, tuple(FUSIONS)), ("strip", strip, ("auto", "no"))):
        if value not in choices:
            raise InputError(f"{name} is {value!r}: set it to {' or '.join(map(repr, choices))}")
    progress = Progress(quiet)
    if not isinstance(atlases, Atlases):
        with progress("atlases"):
            atlases = read_atlases(atlases)
    _check_apart(image, atlases)
    request = Request(fixed=image, moving=atlases.mean, method="demons", strip=strip, geometry=geometry)
    stripped = begun(request, progress)
    with progress("affine"):
        prepared = prepared_scan(stripped)
    found = []
    with progress("demons"):
        for pair in tqdm(zip(atlases.images, atlases.labels, strict=True), total=len(atlases.ids), unit="atlas",
                         dynamic_ncols=True, leave=False, disable=quiet):
            found.append(registered_atlas(prepared, *pair))
    with progress("fusion"):
        images, labels = map(np.stack, zip(*found, strict=True))
        scan = scaled(prepared.fixed, 1 / prepared.scale)
        grid = scaled_grid(prepared.grid, 1 / prepared.scale)
        places, confidence = fused(np.asarray(prepared.fixed_on_grid), images, labels, grid, scan, fusion)
    values = atlases.values[places]
    sure = float(confidence[places > 0].mean()) if places.any() else None
    summary = {
        "image": scan.path, "atlases": atlases.root, "ids": list(atlases.ids), "fusion": fusion,
        "stripped": prepared.fixed_brain is not None, "scale": prepared.scale, "affine": prepared.affine.tolist(),
        "working_grid": list(prepared.shape), "working_spacing_mm": prepared.spacing / prepared.scale,
        "iterations": list(DEMONS["iterations"]), "confidence": sure,
        "seconds": progress.seconds | {"total": sum(progress.seconds.values())}, "definitions": DEFINITIONS,
        "environment": environment()}
    head = prepared.fixed_head and scaled(prepared.fixed_head, 1 / prepared.scale)
    return Labelling(writing.to_nibabel(values, scan), writing.to_nibabel(confidence, scan),
                     _volumes(places, confidence, atlases, scan), summary, head or scan)


def label_files(images: Sequence[str | Path], atlases: str | Path, out: str | Path, fusion: str = "joint",
                strip: str = "auto", geometry: str = "sform"):
    """Label files, as `drivenmorph label` does. Yields the folder of each image's results when they are there, or the
    `InputError` of one of several images that cannot be used.

    The results of one image are written to `out`, those of several to folders in it that are called by their names, and
    the volumes of all to out/volumes.csv.
    An image whose folder has the results of the same version, settings and files is not labelled again.

    Args:
      images: paths.
      atlases: a folder, as `label` takes it.
      fusion, strip, geometry: as in `label`.

    Raises InputError where the atlases or the only image cannot be used, two images have one name, or another run uses
    `out`.
    """
    names = names_apart(images, out, stem)
    out, settings = make_folder(out), {"fusion": fusion, "strip": strip, "geometry": geometry}
    with alone_in(out):
        found = read_atlases(atlases)
        files = {f"{id}{ending}": Path(atlases) / f"{id}{ending}" for id in found.ids for ending in (IMAGE, LABELS)}
        if table := beside(Path(atlases), "labels.csv"):
            files["labels.csv"] = table
        done = []
        for name, path in zip(names, images, strict=True):
            folder = out if len(names) == 1 else out / name
            try:
                source = made_from({role: os.path.abspath(file) for role, file in (files | {"image": path}).items()},
                                   settings, (), None)
                if made(folder / SUMMARY, source):
                    print(f"{path} is labelled already")
                else:
                    former_files(folder, ("ids",))  # refused before the work, not after
                    result = label(path, found, **settings)
                    result.summary["made_from"] = source
                    result.save(folder)
            except InputError as error:
                if len(images) == 1:
                    raise
                yield error
            else:
                done.append(name)
                yield folder
        if len(names) > 1 and done:
            _write_volumes(out, done)


def _write_volumes(out, names):
    """Write the rows of the volumes.csv of several images to out/volumes.csv, each after the name of its image."""
    rows = []
    for name in names:
        with open(out / name / VOLUMES, newline="") as file:
            rows += [{"image": name, **row} for row in csv.DictReader(file)]
    pairs_csv(out / VOLUMES, rows)


def _check_apart(image, atlases):
    """Raises InputError where a scan is one of the atlases or a copy, which would vote for its own labels."""
    for id in atlases.ids:
        with suppress(OSError):
            if isinstance(image, PATHS) and filecmp.cmp(image, Path(atlases.root) / f"{id}{IMAGE}", shallow=False):
                raise InputError(f"{image} is the atlas {id} of {atlases.root}: give another image, or the atlases in "
                                 "a folder without it")


def _volumes(places, confidence, atlases, scan):
    """The rows of volumes.csv."""
    counts = np.bincount(places.ravel(), minlength=len(atlases.values))
    sums = np.bincount(places.ravel(), confidence.ravel(), minlength=len(atlases.values))
    size = abs(np.linalg.det(scan.affine[:3, :3])) / 1e3
    return [{"label": int(value), "name": atlases.names.get(int(value), ""), "ml": round(float(n * size), 4),
             "confidence": round(float(total / n), 4)}
            for value, n, total in zip(atlases.values, counts, sums, strict=True) if value and n]
