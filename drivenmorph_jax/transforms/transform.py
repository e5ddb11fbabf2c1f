"""World-space transforms and their files: displacements in RAS mm on a grid, and 4x4 affines.

Everything pulls back. x is a point of the fixed world, y of the moving world, both RAS mm. W is the affine of
the working grid, which lies in the fixed world, u the field found on it in voxels, T the affine alignment:

    fixed to moving   y = T d(x),        d(x) = W (w + u(w)),           w = W^-1 x
    moving to fixed   x = d^-1(T^-1 y),  d^-1(z) = W (w + u_inv(w)),    w = W^-1 z

A file holds the displacement y - x (or x - y). LPS, the world of ITK and ANTs, is (-x, -y, z) of RAS.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.fields.inverse import inverse
from drivenmorph_jax.images import writing
from drivenmorph_jax.images.reading import open_nifti, read_voxels
from drivenmorph_jax.images.volume import Volume, on_grid, with_type
from drivenmorph_jax.images.writing import ENDINGS, to_nibabel
from drivenmorph_jax.transforms.files import read_displacement, read_sidecar, write_composite, write_displacement
from drivenmorph_jax.transforms.itk import write_affine
from drivenmorph_jax.transforms.world import (
    _channels_first,
    _sample,
    by_planes,
    linear_part,
    map_points,
    pull_back,
    total_inverse_displacement,
    transform_points,
)

ORDERS = {"linear": 1, "nearest": 0}


@dataclass(frozen=True, eq=False)
class Transform:
    """x -> x + displacement(x), from the world of one image to that of another, RAS mm, sampled on the first's grid.

    An image pulls back: `apply` brings one of the second world onto the grid of the first. Points move the other way,
    from the first world to the second.
    """

    displacement: np.ndarray  # (X, Y, Z, 3), RAS mm, on `grid`
    grid: Volume
    linear: np.ndarray  # (4, 4), the affine part of it: what is left is small, and is what gets inverted
    other: Volume | None = None  # the grid that the inverse is sampled on
    backward: np.ndarray | None = None  # displacement of the inverse on that grid, where it is known
    names: tuple[str, str] = ("fixed", "moving")

    @classmethod
    def load(cls, path):
        """The transform in a displacement file (as `save` writes, or ITK's), with what its sidecar tells besides.

        Raises InputError where it is none.
        """
        displacement, affine, header = read_displacement(path)
        about = read_sidecar(path)
        other = about.get("TargetGridShape")
        linear = about.get("Linear")
        return cls(displacement, on_grid(displacement.shape[:3], affine, header, str(path)),
                   linear_part(displacement, affine) if linear is None else np.array(linear),
                   other and on_grid(other, about["TargetGridAffineRAS"]),
                   names=tuple(about.get("Direction", "fixed to moving").split(" to ")))

    @cached_property
    def inverse(self):
        """The way back, on the other image's grid. Raises InputError where that grid is not known."""
        if self.other is None:
            raise InputError(f"{self.grid.path} does not tell the other image's grid: give it as --reference")
        backward = self.backward
        if backward is None:
            # linear^-1 o self lies near the identity, in the first world, where it is inverted in voxels.
            back = np.linalg.inv(self.linear)
            near = by_planes(self.displacement.shape, self.grid.affine,
                              lambda i, x: map_points(back, x + self.displacement[i]) - x)
            u = near @ np.linalg.inv(self.grid.affine[:3, :3]).T.astype(np.float32)
            backward = total_inverse_displacement(self.other.data.shape, self.other.affine, np.asarray(inverse(u)),
                                                  self.grid.affine, self.linear)
        return Transform(backward, self.other, np.linalg.inv(self.linear), self.grid, self.displacement,
                         self.names[::-1])

    def compose(self, then):
        """x -> then(self(x)), from the first world to the second of `then`; points beyond its grid move as its edge."""
        def follow(first, second):
            field, to_voxel = _channels_first(second.displacement), np.linalg.inv(second.grid.affine)

            def plane(i, x):
                y = x + first.displacement[i]
                return y + _sample(field, map_points(to_voxel, y)) - x
            return by_planes(first.displacement.shape, first.grid.affine, plane)

        known = self.backward is not None and then.backward is not None
        return Transform(follow(self, then), self.grid, then.linear @ self.linear, then.other,
                         follow(then.inverse, self.inverse) if known else None, (self.names[0], then.names[1]))

    def apply(self, image, interpolation="linear", reference=None):
        """An image of the second world on the grid of the first, as a nibabel image.

        Args:
          image: what `nifti.load_image` takes; of a 4-D series every volume is moved.
          interpolation: "linear", or "nearest" for label maps, which keeps their type.
          reference: Volume on whose grid the result lies, in place of the transform's own.
        """
        if interpolation not in ORDERS:
            raise InputError(f"interpolation is {interpolation!r}: set it to one of {', '.join(ORDERS)}")
        source, name = open_nifti(image)
        if source.ndim not in (3, 4):
            raise InputError(f"{name} has shape {source.shape}; give a 3-D image or a 4-D series")
        order, voxels = ORDERS[interpolation], read_voxels(source, name)
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
        like = with_type(grid, source.get_data_dtype())
        moved = [pull_back(Volume(volume, source.affine, source.header, name),
                       displacement, grid.affine, order)
                 for volume in (np.moveaxis(voxels, -1, 0) if voxels.ndim == 4 else voxels[None])]
        out = to_nibabel(np.stack(moved, -1) if voxels.ndim == 4 else moved[0], like)
        if voxels.ndim == 4:
            out.header["pixdim"][4] = source.header["pixdim"][4]
        return out

    def points(self, points):
        """Points (N, 3) of the first world, RAS mm, in the second."""
        return transform_points(points, self.displacement, self.grid.affine)

    def save(self, path, frame="LPS"):
        """Write what the file's ending says.

        .nii, .nii.gz: the displacement field, LPS mm as ITK, SimpleITK and ANTs read it, or frame="RAS", and a JSON
        sidecar. .h5: an ITK composite of affine and field. .tfm, .txt, .mat: the affine part alone, for ITK.

        Raises InputError where it cannot be written.
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

    def save_learn2reg(self, path):
        """Write Learn2Reg's field: A_other^-1 (x + d(x)) - i at voxel i of the grid, (X, Y, Z, 3), voxels."""
        to_fixed, to_moving = (np.linalg.inv(grid.affine) for grid in (self.grid, self.other))

        def plane(i, x):
            return map_points(to_moving, x + self.displacement[i]) - map_points(to_fixed, x)
        writing.save(path, by_planes(self.displacement.shape, self.grid.affine, plane), self.grid)
