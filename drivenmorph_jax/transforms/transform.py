"""The `Transform`: a displacement between the worlds of two images, with its grid, affine part, inverse and files.

Everything is in RAS mm. `transforms.world` has the formulas.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import nibabel
import numpy as np
from numpy.typing import ArrayLike

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.fields.inverse import inverse
from drivenmorph_jax.images import writing
from drivenmorph_jax.images.intensity import background
from drivenmorph_jax.images.reading import Source, open_nifti, read_voxels
from drivenmorph_jax.images.volume import Volume, on_grid
from drivenmorph_jax.images.writing import ENDINGS, to_nibabel
from drivenmorph_jax.transforms.files import read_field, write_composite, write_displacement
from drivenmorph_jax.transforms.itk import write_affine
from drivenmorph_jax.transforms.world import (
    _channels_first,
    _sample,
    by_planes,
    linear_part,
    map_points,
    overlaps,
    pull_back,
    total_inverse_displacement,
    transform_points,
)

ORDERS = {"linear": 1, "nearest": 0}


@dataclass(frozen=True, eq=False)
class Transform:
    """The transform x -> x + displacement(x) from the world of a first image to the world of a second, in RAS mm.

    The displacement is sampled on the grid of the first image. Images are pulled back: `apply` resamples an image of
    the second world onto the grid of the first. Points move from the first world to the second.
    """

    displacement: np.ndarray  # (X, Y, Z, 3), RAS mm, on `grid`
    grid: Volume
    linear: np.ndarray  # (4, 4), the affine part; the rest is small, and `inverse` inverts only the rest iteratively
    other: Volume | None = None  # grid of the inverse, where it is known
    backward: np.ndarray | None = None  # displacement of the inverse on the grid `other`, where it is known
    names: tuple[str, str] = ("fixed", "moving")

    @classmethod
    def load(cls, path: str | Path, geometry: str = "sform") -> Self:
        """Read a transform from a displacement file, as `save` or ITK writes it, and from its sidecar if it has one.

        `geometry` is that of `images.geometry.placed`.

        Raises InputError where the file is not a displacement field, or its sidecar belongs to another field.
        """
        displacement, affine, header, about = read_field(path, geometry)
        other = about.get("TargetGridShape")
        linear = about.get("Linear")
        return cls(displacement, on_grid(displacement.shape[:3], affine, header, str(path)),
                   linear_part(displacement, affine) if linear is None else np.array(linear),
                   other and on_grid(other, about["TargetGridAffineRAS"], path=str(path)),
                   names=tuple(about.get("Direction", "fixed to moving").split(" to ")))

    @cached_property
    def inverse(self) -> "Transform":
        """The inverse `Transform`, on the grid of the other image. Raises InputError where that grid is not known."""
        if self.other is None:
            raise InputError(f"{self.grid.path} has no sidecar that names the grid of the other image: give "
                             "that image as --reference")
        backward = self.backward
        if backward is None:
            # linear^-1 o self is close to the identity and stays in the first world. It is inverted there, in voxels.
            back = np.linalg.inv(self.linear)
            near = by_planes(self.displacement.shape, self.grid.affine,
                             lambda i, x: map_points(back, x + self.displacement[i]) - x)
            u = near @ np.linalg.inv(self.grid.affine[:3, :3]).T.astype(np.float32)
            backward = total_inverse_displacement(self.other.data.shape, self.other.affine, np.asarray(inverse(u)),
                                                  self.grid.affine, self.linear)
        return Transform(backward, self.other, np.linalg.inv(self.linear), self.grid, self.displacement,
                         self.names[::-1])

    def compose(self, then: "Transform") -> "Transform":
        """x -> then(self(x)), from the first world of this transform to the second world of `then`.

        Beyond the grid of `then`, the displacement at its edge is used.
        """
        def follow(first, second):
            field, to_voxel = _channels_first(second.displacement), np.linalg.inv(second.grid.affine)

            def plane(i, x):
                y = x + first.displacement[i]
                return y + _sample(field, map_points(to_voxel, y)) - x
            return by_planes(first.displacement.shape, first.grid.affine, plane)

        known = self.backward is not None and then.backward is not None
        return Transform(follow(self, then), self.grid, then.linear @ self.linear, then.other,
                         follow(then.inverse, self.inverse) if known else None, (self.names[0], then.names[1]))

    def apply(self, image: Source, interpolation: str = "linear",
              reference: Volume | None = None, geometry: str = "sform") -> nibabel.Nifti1Image:
        """Resample an image of the second world onto the grid of the first.

        Args:
          image: any source that `images.reading.load_image` takes, or a 4-D series, of which every volume is resampled.
            Of five or more axes, the last ones are dropped where they have length 1.
          interpolation: "linear", of which the result is float32; or "nearest", which keeps values and type exactly. A
            file with a scale factor has the type float64, that of its scaled values.
          reference: a Volume whose grid replaces the grid of the transform.
          geometry: of the image, as in `images.geometry.placed`.

        Returns:
          A nibabel image. Outside `image` its value is that of the image's background, with "nearest" 0. A series keeps
          its repetition time, the time of its first volume and their unit.

        Raises InputError where the interpolation is unknown; where the image cannot be read, is not 3-D or 4-D, or has
        NaN or infinite voxels; or where no voxel of the result falls into the image.
        """
        if interpolation not in ORDERS:
            raise InputError(f"interpolation is {interpolation!r}: set it to one of {', '.join(ORDERS)}")
        source, name = open_nifti(image, geometry)
        order, voxels = ORDERS[interpolation], _voxels(source, name)
        if order:
            with np.errstate(over="ignore"):
                voxels = voxels.astype(np.float32)
        if not np.isfinite(voxels).all():
            raise InputError(f"{name} has NaN or infinite voxels, or some beyond 3e38; replace them, for instance by 0")
        grid, displacement = self.grid, self.displacement
        if reference is not None:
            grid, field, to_voxel = reference, _channels_first(displacement), np.linalg.inv(self.grid.affine)
            displacement = by_planes((*grid.data.shape, 3), grid.affine,
                                     lambda i, x: _sample(field, map_points(to_voxel, x)))
        if not overlaps(voxels.shape[:3], source.affine, displacement, grid.affine):
            raise InputError(f"{name} and the grid of {grid.path} do not overlap under the transform; give an image in "
                             f"the space of the {self.names[1]} image, or change --inverse")
        moved = [pull_back(Volume(volume, source.affine, source.header, name), displacement, grid.affine, order,
                           background(volume) if order else None)
                 for volume in np.moveaxis(voxels.reshape(*voxels.shape[:3], -1), -1, 0)]
        moved = np.stack(moved, -1).reshape(*grid.data.shape, *voxels.shape[3:])
        out = to_nibabel(moved, grid, dtype=moved.dtype)
        if voxels.ndim == 4:
            _keep_times(out.header, source.header)
        return out

    def points(self, points: ArrayLike) -> np.ndarray:
        """Move points (N, 3) of the first world to the second, in RAS mm."""
        return transform_points(points, self.displacement, self.grid.affine)

    def save(self, path: str | Path, frame: str = "LPS") -> None:
        """Write the transform in the format that the ending of the file names.

        With .nii or .nii.gz, the file is the displacement field, with a JSON sidecar. It is in LPS mm, as ITK,
        SimpleITK and ANTs read it, or in RAS mm with frame="RAS". With .h5, it is an ITK composite of the field and the
        affine. With .tfm, .txt or .mat, it is the affine part alone, for ITK.

        Raises InputError where the file has another ending or cannot be written.
        """
        if str(path).endswith(ENDINGS):
            other = {} if self.other is None else {"TargetGridShape": list(self.other.data.shape),
                                                   "TargetGridAffineRAS": self.other.affine.tolist()}
            write_displacement(path, self.displacement, self.grid, " to ".join(self.names), frame,
                               {"Linear": self.linear.tolist(), **other})
        elif str(path).endswith(".h5"):
            write_composite(path, self)
        else:
            write_affine(path, self.linear)

    def save_learn2reg(self, path: str | Path) -> None:
        """Write the field of Learn2Reg, (X, Y, Z, 3) in voxels.

          A_other^-1 (x + d(x)) - i    at voxel i of the grid

        x is the world position of voxel i, and A_other is the affine of the grid `other`.

        Raises InputError where `other` is not known, or the file cannot be written.
        """
        if self.other is None:
            raise InputError(f"{self.grid.path} has no sidecar that names the grid of the other image, in whose voxels "
                             "Learn2Reg counts")
        to_fixed, to_moving = (np.linalg.inv(grid.affine) for grid in (self.grid, self.other))

        def plane(i, x):
            return map_points(to_moving, x + self.displacement[i]) - map_points(to_fixed, x)

        writing.save(path, by_planes(self.displacement.shape, self.grid.affine, plane), self.grid)


def _voxels(source, name):
    """The voxels (X, Y, Z) of an image or (X, Y, Z, T) of a series. Of five axes or more, the last of length 1 go.

    Raises InputError where other axes remain.
    """
    shape = source.shape
    while source.ndim > 4 and len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (3, 4):
        raise InputError(f"{name} has shape {source.shape}; give a 3-D image or a 4-D series")
    return read_voxels(source, name).reshape(shape)


def _keep_times(header, source):
    """Copy the times of the volumes of a series from the header `source`. Those of its slices hold on its grid only."""
    header["pixdim"][4], header["toffset"] = source["pixdim"][4], source["toffset"]
    header["xyzt_units"] += source["xyzt_units"] & 0b111000  # these bits hold the unit of time
