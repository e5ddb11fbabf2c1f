"""The classes `Subject` and `Dataset`: subjects on one grid, in three splits, and the pairs of a split."""

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
    to_template: np.ndarray | None = None  # (D, H, W, 3) voxels: x shows the template at x + to_template(x)
    from_template: np.ndarray | None = None  # (D, H, W, 3) voxels, the inverse


@dataclass(frozen=True, eq=False)
class Dataset:
    """The subjects of a data set by split. A split that was not requested is empty."""

    name: str
    train: tuple[Subject, ...]
    val: tuple[Subject, ...]
    test: tuple[Subject, ...]
    spacing: float  # mm, the same along every axis
    label_names: dict[int, str]
    exclude: tuple[int, ...]  # labels that scores leave out, always with background
    atlas: Subject | None = None  # the moving image of every pair; None for pairs of subjects

    def pairs(self, split):
        """The pairs (fixed, moving) of a split, by `ordered_pairs`."""
        return ordered_pairs(getattr(self, split), self.atlas)


def ordered_pairs(subjects, atlas=None):
    """All pairs (fixed, moving): the n (n - 1) ordered pairs of different subjects, or the atlas to each subject."""
    movings = subjects if atlas is None else (atlas,)
    return [(fixed, moving) for fixed in subjects for moving in movings if fixed is not moving]


def padded(dataset, multiple):
    """The data set with background added at the far end of each axis, up to a multiple of `multiple` voxels.

    The affines stay valid, because the first voxel does not move.
    """
    def pad(x):
        if x is None:
            return None
        # Beyond the border, a field repeats its edge. Images and labels get background.
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
    """Read the names of labels from a CSV table as {number: name}.

    The first two columns are number and name. A header is optional.

    Raises InputError where no row has a whole number in its first column.
    """
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file) if len(row) >= 2 and row[0].strip().isdigit()]
    if not rows:
        raise InputError(f"{path} is not a label table: give each label a row 'number,name'")
    return {int(row[0]): row[1].strip() for row in rows}
