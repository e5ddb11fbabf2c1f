"""Atlases: images with label maps on one grid."""

from dataclasses import dataclass

import nibabel
import numpy as np

from drivenmorph_jax.data.folder import labelled_subjects


@dataclass(frozen=True, eq=False)
class Atlases:
    """Images with label maps on one grid (D, H, W), in RAS axis order."""

    root: str
    ids: tuple[str, ...]
    images: np.ndarray  # (N, D, H, W) float32 in [0, 1]
    labels: np.ndarray  # (N, D, H, W), the place of each voxel's label in `values`
    values: np.ndarray  # (K,) int32, the labels that the maps have, in ascending order; the first is 0
    names: dict[int, str]  # of labels, where the folder has a labels.csv
    affine: np.ndarray  # (4, 4), voxel to RAS mm

    @property
    def mean(self):
        """The mean of the images as a nibabel image."""
        return nibabel.Nifti1Image(self.images.mean(0), self.affine)


def read_atlases(root, ids=None):
    """Read the atlases of a folder. Arguments and errors are those of `data.folder.labelled_subjects`."""
    subjects, _, names = labelled_subjects(root, ids)
    values = np.unique(np.concatenate([[0], *(np.unique(subject.labels) for subject in subjects)]))
    kind = np.min_scalar_type(len(values) - 1)
    return Atlases(
        root=str(root), ids=tuple(subject.id for subject in subjects),
        images=np.stack([subject.image for subject in subjects]),
        labels=np.stack([np.searchsorted(values, subject.labels).astype(kind) for subject in subjects]),
        values=values.astype(np.int32), names=names, affine=subjects[0].affine)
