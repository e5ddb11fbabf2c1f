"""What a data set is: subjects on one grid, in three splits."""

import csv
from dataclasses import dataclass, replace

import numpy as np

from drivenmorph_jax.errors import InputError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, eq=False)
class Subject:
    """One brain on the data set's grid (D, H, W), in RAS axis order."""

    id: str
    image: np.ndarray  # (D, H, W) float32 in [0, 1]
    labels: np.ndarray | None  # (D, H, W) int32
    affine: np.ndarray  # (4, 4), voxel -> RAS mm
    to_template: np.ndarray | None = None  # (D, H, W, 3) voxels: x shows the template's x + to_template(x)
    from_template: np.ndarray | None = None  # (D, H, W, 3) voxels, the inverse


@dataclass(frozen=True, eq=False)
class Dataset:
    """Subjects by split; a split that was not asked for is empty."""

    name: str
    train: tuple[Subject, ...]
    val: tuple[Subject, ...]
    test: tuple[Subject, ...]
    spacing: float  # mm, the same along every axis
    label_names: dict[int, str]
    exclude: tuple[int, ...]  # labels left out of scores; background is always one
    atlas: Subject | None = None  # the moving image of every pair, where there is one

    def pairs(self, split):
        """The pairs (fixed, moving) of a split."""
        return ordered_pairs(getattr(self, split), self.atlas)


def ordered_pairs(subjects, atlas=None):
    """(fixed, moving): all n (n - 1) ordered pairs of different subjects, or the atlas to each of them."""
    movings = subjects if atlas is None else (atlas,)
    return [(fixed, moving) for fixed in subjects for moving in movings if fixed is not moving]


def padded(dataset, multiple):
    """The data set with background added at the far end of each axis, up to a multiple; affines stay true."""
    def pad(x):
        if x is None:
            return None
        # A field goes on as at the border, anything else with background.
        return np.pad(x, [(0, -n % multiple) for n in x.shape[:3]] + [(0, 0)] * (x.ndim - 3),
                      mode="edge" if x.ndim == 4 else "constant")

    def pad_subject(s):
        return replace(s, image=pad(s.image), labels=pad(s.labels), to_template=pad(s.to_template),
                       from_template=pad(s.from_template))

    shapes = {subject.image.shape for split in SPLITS for subject in getattr(dataset, split)}
    if all(side % multiple == 0 for shape in shapes for side in shape):
        return dataset
    return replace(dataset, **{split: tuple(map(pad_subject, getattr(dataset, split))) for split in SPLITS},
                   atlas=dataset.atlas and pad_subject(dataset.atlas))


def read_label_names(path):
    """Names by number from a table whose first two columns are number and name, with or without a header.

    Raises InputError where no row has a whole number in its first column.
    """
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file) if len(row) >= 2 and row[0].strip().isdigit()]
    if not rows:
        raise InputError(f"{path} is not a label table: give each label a row 'number,name'")
    return {int(row[0]): row[1].strip() for row in rows}
