"""The `Transform`: a displacement between the worlds of two images, with its grid, affine part, inverse and files.

Everything is in RAS mm. `transforms.world` has the formulas.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import nibabel
import numpy as np
from numpy.typing import ArrayLike

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.images import writing
from drivenmorph_jax.images.intensity import background
from drivenmorph_jax.images.reading import PATHS, Source, open_nifti, read_voxels
from drivenmorph_jax.images.volume import Volume, on_grid, part_of
from drivenmorph_jax.images.writing import ENDINGS, to_nibabel
from drivenmorph_jax.transforms import freesurfer, fsl
from drivenmorph_jax.transforms.files import VECTOR, write_composite, write_displacement
from drivenmorph_jax.transforms.itk import write_affine
from drivenmorph_jax.transforms.maps import Chain, Field, faded
from drivenmorph_jax.transforms.reading import grid_of, read_chain
from drivenmorph_jax.transforms.world import (
    by_planes,
    displacement_of,
    followed_by,
    map_points,
    overlaps,
    pull_back,
    unfolded_in_world,
)

MARGIN_STEPS = 64  # of the displacement in the margin of a file, in a mm
FORMS = {"itk": {"frame": "LPS"}, "ras": {"frame": "RAS"}, "afni": {"frame": "LPS", "intent": 0}}
INTERPOLATIONS = ("linear", "nearest", "label", "cubic")


@dataclass(frozen=True, eq=False)
class Transform:
    """The transform x -> x + displacement(x) from the world of a first image to the world of a second, in RAS mm.

    The displacement is sampled on the grid of the first image. Images are pulled back: `apply` resamples an image of
    the second world onto the grid of the first. Points move from the first world to the second. Beyond the grid the
    affine part continues, see `transforms.maps.faded`.
    """

    displacement: np.ndarray  # (X, Y, Z, 3), RAS mm, on `grid`
    grid: Volume
    linear: np.ndarray  # (4, 4), the affine part
    other: Volume | None = None  # grid of the inverse, where it is known
    backward: np.ndarray | None = None  # displacement of the inverse on the grid `other`, where it is known
    names: tuple[str, str] = ("fixed", "moving")
    exact: Callable | None = None  # the map of points that `displacement` samples, where it is known

    @classmethod
    def load(cls, path: str | Path | Sequence[str | Path], geometry: str = "sform", convention: str | None = None,
             fixed: Volume | Source | None = None, moving: Volume | Source | None = None) -> Self:
        """Read a transform from a file of this package, ITK, ANTs, greedy, FSL, FreeSurfer, SPM, NiftyReg, AFNI, dipy
        or Learn2Reg, or from several files.

        Args:
          path: a file, or files in the order in which a point passes them on its way from the fixed to the moving
            world. ":inverse" after the name of a file takes its inverse.
          geometry: as in `images.geometry.placed`.
          convention: one of `transforms.reading.CONVENTIONS`, for a file that does not tell what its numbers are.
          fixed: the fixed image, or a Volume with its grid. A transform that has no grid of its own is sampled there.
          moving: the moving image, or a Volume with its grid. FSL's transforms need both.

        Raises InputError where a file is not a transform, needs an argument that is missing, or has a sidecar that
        belongs to another field.
        """
        found = read_chain(path, geometry, convention, fixed, moving)
        if found.displacement is not None:
            return cls(found.displacement, found.grid, found.linear, found.other, names=found.names, exact=found.map)
        grid = found.grid if fixed is None else grid_of(fixed, geometry)
        if grid is None:
            raise InputError(f"{path if isinstance(path, PATHS) else path[0]} has no grid on which an image could be "
                             "resampled: give an image with that grid as --reference, or in Python as fixed")
        return cls(displacement_of(found.map, grid.data.shape, grid.affine), grid, found.linear,
                   moving if isinstance(moving, Volume) else found.other, names=found.names, exact=found.map)

    @cached_property
    def field(self) -> Field:
        """The displacement as a `transforms.maps.Field`."""
        return faded(self.displacement, self.grid.affine, self.linear)

    @property
    def map(self):
        """The transform as a function of points (..., 3), one of `transforms.maps`."""
        return self.field if self.exact is None else self.exact

    @cached_property
    def inverse(self) -> "Transform":
        """The inverse `Transform`, on the grid of the other image. Raises InputError where that grid is not known."""
        if self.other is None:
            raise InputError(f"{self.grid.path} has no sidecar that names the grid of the other image: give "
                             "that image as --reference")
        back, backward, exact = np.linalg.inv(self.linear), self.backward, None
        if backward is None:
            exact = self.map.inverse
            backward = unfolded_in_world(displacement_of(exact, self.other.data.shape, self.other.affine),
                                         self.other.affine, back)
        return Transform(backward, self.other, back, self.grid, self.displacement, self.names[::-1], exact)

    def compose(self, then: "Transform") -> "Transform":
        """x -> then(self(x)), from the first world of this transform to the second world of `then`."""
        def follow(first, second):
            return displacement_of(Chain((first.map, second.map)), first.grid.data.shape, first.grid.affine)

        known = self.backward is not None and then.backward is not None
        return Transform(follow(self, then), self.grid, then.linear @ self.linear, then.other,
                         follow(then.inverse, self.inverse) if known else None, (self.names[0], then.names[1]),
                         Chain((self.map, then.map)))

    def apply(self, image: Source, interpolation: str = "linear",
              reference: Volume | None = None, geometry: str = "sform") -> nibabel.Nifti1Image:
        """Resample an image of the second world onto the grid of the first.

        Args:
          image: any source that `images.reading.load_image` takes, or a 4-D series, of which every volume is resampled.
            Of five or more axes, the last ones are dropped where they have length 1.
          interpolation: "linear" or "cubic" (B-splines), of which the result is float32; or, for label maps, "nearest"
            or "label", which keep values and type exactly. "label" takes the label with the largest linear weight. A
            file with a scale factor has the type float64, that of its scaled values.
          reference: a Volume whose grid replaces the grid of the transform.
          geometry: of the image, as in `images.geometry.placed`.

        Returns:
          A nibabel image. Outside `image` its value is that of the image's background, for labels 0. A series keeps
          its repetition time, the time of its first volume and their unit.

        Raises InputError where the interpolation is unknown; where the image cannot be read, is not 3-D or 4-D, or has
        NaN or infinite voxels; or where no voxel of the result falls into the image.
        """
        if interpolation not in INTERPOLATIONS:
            raise InputError(f"interpolation is {interpolation!r}: set it to one of {', '.join(INTERPOLATIONS)}")
        source, name = open_nifti(image, geometry)
        values, voxels = interpolation in ("linear", "cubic"), _voxels(source, name)
        if values:
            with np.errstate(over="ignore"):
                voxels = voxels.astype(np.float32)
        if not np.isfinite(voxels).all():
            raise InputError(f"{name} has NaN or infinite voxels, or some beyond 3e38; replace them, for instance by 0")
        grid, displacement = self.grid, self.displacement
        if reference is not None:
            grid, displacement = reference, displacement_of(self.map, reference.data.shape, reference.affine)
        if not overlaps(voxels.shape[:3], source.affine, displacement, grid.affine):
            raise InputError(f"{name} and the grid of {grid.path} do not overlap under the transform; give an image in "
                             f"the space of the {self.names[1]} image, or change --inverse")
        moved = [pull_back(Volume(volume, source.affine, source.header, name), displacement, grid.affine, interpolation,
                           background(volume) if values else None)
                 for volume in np.moveaxis(voxels.reshape(*voxels.shape[:3], -1), -1, 0)]
        moved = np.stack(moved, -1).reshape(*grid.data.shape, *voxels.shape[3:])
        out = to_nibabel(moved, grid, dtype=moved.dtype)
        if voxels.ndim == 4:
            _keep_times(out.header, source.header)
        return out

    def points(self, points: ArrayLike) -> np.ndarray:
        """Move points (N, 3) or (3,) of the first world to the second, in RAS mm.

        Raises InputError where they have another shape.
        """
        points = np.asarray(points, float)
        if points.shape[-1:] != (3,) and points.size:
            raise InputError(f"the points have the shape {points.shape}: give (N, 3), in RAS mm")
        return self.map(points.reshape(-1, 3)).reshape(points.shape if points.size else (0, 3))

    def save(self, path: str | Path, form: str = "itk") -> None:
        """Write the transform in the format that the ending of the file names.

        With .nii or .nii.gz, the file holds a field, and `form` says which:

          "itk"   displacement in LPS mm, as ITK, SimpleITK and ANTs read it, with a JSON sidecar
          "ras"   displacement in RAS mm, with a JSON sidecar
          "afni"  displacement in LPS mm for AFNI, with a JSON sidecar
          "spm"   coordinates in RAS mm, a deformation y_ of SPM
          "fsl"   relative warp of FNIRT, for applywarp

        With .h5 it is an ITK composite of the field and the affine, with .mgz a warp of FreeSurfer. With .tfm, .txt or
        .mat it is the affine part alone, for ITK, and with .lta the affine part for FreeSurfer.

        The grid of the forms "itk" and "ras" and of .h5 has a margin in which the deformation fades, so that the affine
        part continues beyond. The others lie on the grid of the first image.

        Raises InputError where the file has another ending or cannot be written; or where the format needs the grid
        `other`, which is not known.
        """
        if str(path).endswith(ENDINGS):
            self._save_field(path, form)
        elif str(path).endswith(".h5"):
            write_composite(path, self.field)
        elif str(path).endswith(".mgz"):
            freesurfer.write_mgz_warp(path, self.displacement, self.grid, self._other("FreeSurfer's warps"))
        elif str(path).endswith(".lta"):
            freesurfer.write_lta(path, self.linear, self.grid, self._other("FreeSurfer's .lta"))
        else:
            write_affine(path, self.linear)

    def _save_field(self, path, form):
        if form == "fsl":
            fsl.write_warp(path, self.displacement, self.grid, self._other("FSL's warps"))
        elif form == "spm":
            coordinates = by_planes(self.displacement.shape, self.grid.affine, lambda i, x: x + self.displacement[i])
            writing.save(path, coordinates[..., None, :], self.grid, VECTOR, "Mapping")
        elif form in FORMS:
            about = {"Linear": self.linear.tolist()}
            if self.other is not None:
                about |= {"TargetGridShape": list(self.other.data.shape),
                          "TargetGridAffineRAS": self.other.affine.tolist()}
            wide, grid = (self.displacement, self.grid) if form == "afni" else self._with_margin()
            if grid is not self.grid:
                about |= {"ImageGridShape": list(self.grid.data.shape),
                          "ImageGridAffineRAS": self.grid.affine.tolist()}
            write_displacement(path, wide, grid, " to ".join(self.names), about=about, **FORMS[form])
        else:
            raise InputError(f"form is {form!r}: set it to one of {', '.join((*FORMS, 'spm', 'fsl'))}")

    def _with_margin(self):
        """(the displacement and a margin in which the deformation fades, its grid): those of the image where it needs
        no margin. In the margin it is rounded, so that it takes a third of the space."""
        field = faded(self.displacement, self.grid.affine, self.linear)  # not `self.field`, which would stay in memory
        if field.near.shape == self.displacement.shape:
            return self.displacement, self.grid
        wide = followed_by(field.linear, field.near, field.affine, out=field.near)  # at its voxels: nothing is sampled
        wide *= MARGIN_STEPS
        np.rint(wide, wide)
        wide /= MARGIN_STEPS
        wide[part_of(field.affine, self.grid.data.shape, self.grid.affine)] = self.displacement
        return wide, on_grid(wide.shape[:3], field.affine, self.grid.header, self.grid.path)

    def _other(self, what):
        """The grid of the other image. Raises InputError where it is not known, with `what` needs it."""
        if self.other is None:
            raise InputError(f"{self.grid.path} has no sidecar that names the grid of the other image, which {what} "
                             "need")
        return self.other

    def save_learn2reg(self, path: str | Path) -> None:
        """Write the field of Learn2Reg, (X, Y, Z, 3) in voxels.

          A_other^-1 (x + d(x)) - i    at voxel i of the grid

        x is the world position of voxel i, and A_other is the affine of the grid `other`.

        Raises InputError where `other` is not known, or the file cannot be written.
        """
        other = self._other("Learn2Reg's fields")
        to_fixed, to_moving = (np.linalg.inv(grid.affine) for grid in (self.grid, other))

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
