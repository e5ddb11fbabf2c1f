"""World-space transforms and their files: displacements in RAS mm on a grid, and 4x4 affines.

Everything pulls back. x is a point of the fixed world, y of the moving world, both RAS mm. W is the affine of
the working grid, which lies in the fixed world, u the field found on it in voxels, T the affine alignment:

    fixed to moving   y = T d(x),        d(x) = W (w + u(w)),           w = W^-1 x
    moving to fixed   x = d^-1(T^-1 y),  d^-1(z) = W (w + u_inv(w)),    w = W^-1 z

A file holds the displacement y - x (or x - y). LPS, the world of ITK and ANTs, is (-x, -y, z) of RAS.
"""

import csv
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from drivenmorph_jax import demons, nifti
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.files import replacing
from drivenmorph_jax.integrate import inverse
from drivenmorph_jax.jacobian import determinant

FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS to LPS and back
INTENTS = {"LPS": 1007, "RAS": 1006}  # vector; displacement vector
AFFINE_ENDINGS = (".tfm", ".txt", ".mat")
ORDERS = {"linear": 1, "nearest": 0}


@dataclass(frozen=True, eq=False)
class Transform:
    """x -> x + displacement(x), from the world of one image to that of another, RAS mm, sampled on the first's grid.

    An image pulls back: `apply` brings one of the second world onto the grid of the first. Points move the other way,
    from the first world to the second.
    """

    displacement: np.ndarray  # (X, Y, Z, 3), RAS mm, on `grid`
    grid: nifti.Volume
    linear: np.ndarray  # (4, 4), the affine part of it: what is left is small, and is what gets inverted
    other: nifti.Volume | None = None  # the grid that the inverse is sampled on
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
        return cls(displacement, nifti.on_grid(displacement.shape[:3], affine, header, str(path)),
                   linear_part(displacement, affine) if linear is None else np.array(linear),
                   other and nifti.on_grid(other, about["TargetGridAffineRAS"]),
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
            near = _by_planes(self.displacement.shape, self.grid.affine,
                              lambda i, x: _map(back, x + self.displacement[i]) - x)
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
                return y + _sample(field, _map(to_voxel, y)) - x
            return _by_planes(first.displacement.shape, first.grid.affine, plane)

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
        source, name = nifti.open_nifti(image)
        if source.ndim not in (3, 4):
            raise InputError(f"{name} has shape {source.shape}; give a 3-D image or a 4-D series")
        order, voxels = ORDERS[interpolation], nifti.read_voxels(source, name)
        if order:
            with np.errstate(over="ignore"):
                voxels = voxels.astype(np.float32)
        if not np.isfinite(voxels).all():
            raise InputError(f"{name} has NaN or infinite voxels, or some beyond 3e38; replace them, for instance by 0")
        grid, displacement = self.grid, self.displacement
        if reference is not None:
            grid, field, to_voxel = reference, _channels_first(displacement), np.linalg.inv(self.grid.affine)
            displacement = _by_planes((*grid.data.shape, 3), grid.affine,
                                      lambda i, x: _sample(field, _map(to_voxel, x)))
        like = nifti.with_type(grid, source.get_data_dtype())
        moved = [apply(nifti.Volume(volume, source.affine, source.header, name),
                       displacement, grid.affine, order)
                 for volume in (np.moveaxis(voxels, -1, 0) if voxels.ndim == 4 else voxels[None])]
        out = nifti.to_nibabel(np.stack(moved, -1) if voxels.ndim == 4 else moved[0], like)
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
        if str(path).endswith(nifti.ENDINGS):
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
        nifti.save(path, _by_planes(self.displacement.shape, self.grid.affine,
                                    lambda i, x: _map(to_moving, x + self.displacement[i]) - _map(to_fixed, x)),
                   self.grid)


def linear_part(displacement, affine):
    """The affine (4, 4) nearest to x -> x + displacement(x), in RAS mm: least squares over every fourth voxel."""
    some = tuple(slice(None, None, 4) for _ in range(3))
    index = np.moveaxis(np.indices(displacement.shape[:3]), 0, -1)[some].reshape(-1, 3)
    x = _map(affine, index)
    y = x + displacement[some].reshape(-1, 3)
    found, *_ = np.linalg.lstsq(np.column_stack([x, np.ones(len(x))]), y, rcond=None)
    out = np.eye(4)
    out[:3] = found.T
    return out


def total_displacement(shape, affine, u, work_affine, transform):
    """T d(x) - x, from fixed to moving, at every voxel of the fixed grid: (X, Y, Z, 3), RAS mm.

    (shape, affine) is the fixed grid; u (D, H, W, 3), in voxels of the grid with affine `work_affine`, is
    sampled linearly and edge-clamped; `transform` T (4, 4) maps the fixed to the moving world. It is `unfolded`.
    """
    deform = _deformation(u, work_affine)
    return unfolded(_displacement(shape, affine, lambda x: _map(transform, deform(x))), affine, transform)


def total_inverse_displacement(shape, affine, u_inverse, work_affine, transform):
    """d^-1(T^-1 y) - y, from moving to fixed, at every voxel of the moving grid: (X, Y, Z, 3), RAS mm.

    (shape, affine) is the moving grid; u_inverse (D, H, W, 3) lies on the same working grid as u, and
    `transform` is the same T. It is `unfolded`.
    """
    deform, back = _deformation(u_inverse, work_affine), np.linalg.inv(transform)
    return unfolded(_displacement(shape, affine, lambda y: deform(_map(back, y))), affine, back)


def unfolded(displacement, affine, transform):
    """A displacement (X, Y, Z, 3) in RAS mm with Jacobian determinants above 0, as `demons.unfolded` makes it.

    On a grid coarser than the one it was found on, samples of a field that folds nowhere can fold: a difference over
    two voxels bridges what turns within them. Where they do not, or where the affine part, `transform` (4, 4), is a
    reflection, the displacement is returned as it is.
    """
    if np.linalg.det(transform) < 0 or jacobian_determinant_of_displacement(displacement, affine).min() > 0:
        return displacement
    linear = affine[:3, :3].astype(np.float32)
    return np.asarray(demons.unfolded(displacement @ np.linalg.inv(linear).T)) @ linear.T


def force_on_grid(shape, affine, force, work_affine):
    """Forces (D, H, W, 3) in voxels of the working grid as vectors in RAS mm on another grid: (X, Y, Z, 3)."""
    to_voxel, channels = np.linalg.inv(work_affine), _channels_first(force)
    return _by_planes((*shape, 3), affine, lambda i, x: _sample(channels, _map(to_voxel, x)) @ work_affine[:3, :3].T)


def apply(volume, displacement, affine, order=1):
    """Pull a Volume back: out(x) = volume(x + displacement(x)), (X, Y, Z) in the volume's own type.

    `displacement` (X, Y, Z, 3) in RAS mm lies on the grid with `affine`. Order 1 is linear, 0 nearest;
    outside the volume the value is 0.
    """
    to_voxel = np.linalg.inv(volume.affine)

    def plane(i, x):
        voxel = np.moveaxis(_map(to_voxel, x + displacement[i]), -1, 0)
        return ndimage.map_coordinates(volume.data, voxel, order=order, mode="grid-constant", prefilter=False)
    return _by_planes(displacement.shape[:3], affine, plane, volume.data.dtype)


def transform_points(points, displacement, affine):
    """Move points (N, 3) in RAS mm: p + displacement(p), sampled linearly and edge-clamped.

    A pull-back displacement from fixed to moving moves points of the fixed image to the moving one.
    """
    points = np.asarray(points, np.float64)
    return points + _sample(_channels_first(displacement), _map(np.linalg.inv(affine), points))


def move_table(source, out, transform):
    """Write the CSV file `source` to `out` with the points in its columns x, y, z, RAS mm, moved by a `Transform`.

    Raises InputError where it has no such columns, or what stands in them are no numbers.
    """
    try:
        with open(source, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        points = np.array([[float(row[axis]) for axis in "xyz"] for row in rows])
    except OSError as error:
        raise InputError(f"{source} cannot be read ({error.strerror}); check the path") from error
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{source} is not a table of points; give a CSV with a header and numbers in its columns "
                         "x, y, z") from error
    if not rows or not np.isfinite(points).all():
        raise InputError(f"{source} holds no points, or some that are not finite; give numbers in columns x, y, z")
    for row, point in zip(rows, transform.points(points), strict=True):
        row.update(zip("xyz", (f"{x:.6g}" for x in point), strict=True))
    with open(out, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def jacobian_determinant_of_displacement(displacement, affine):
    """det d(x + displacement(x)) / dx at every voxel, by central differences in world space: (X, Y, Z).

    `displacement` (X, Y, Z, 3) in RAS mm on a grid with `affine`, oblique or sheared as it may be.
    """
    to_voxel = np.linalg.inv(affine)[:3, :3].T.astype(np.float32)
    depth, step = len(displacement), 16  # a slab at a time: nine derivatives of a whole head fill memory
    out = np.empty(displacement.shape[:3], np.float32)
    for start in range(0, depth, step):
        stop, first, last = min(start + step, depth), max(start - 1, 0), min(start + step + 1, depth)
        gradient = np.gradient(displacement[first:last] @ to_voxel, axis=(0, 1, 2))
        out[start:stop] = determinant([[g[start - first:stop - first, ..., j] + (i == j) for j in range(3)]
                                       for i, g in enumerate(gradient)])
    return out


def write_displacement(path, displacement, like, direction, frame="LPS", about=()):
    """Write a displacement (X, Y, Z, 3) in RAS mm on the grid of the Volume `like`, and a JSON sidecar.

    The file is NIfTI, (X, Y, Z, 1, 3) float32 in mm: frame "LPS" with intent 1007, which ITK, SimpleITK and
    ANTs read as a displacement field, or "RAS" with intent 1006. `direction` says in words from which image
    to which the points move, e.g. "fixed to moving"; the sidecar gets the items of `about` too. Raises InputError
    where it cannot be written.
    """
    _write_vectors(path, displacement, like, frame, {
        "Content": "displacement d(x) of the total transform, affine and deformable: x moves to x + d(x)",
        "Direction": direction,
        "Use": "pull-back: an image of the space moved to is resampled at x + d(x) onto the grid below",
        **dict(about)})


def write_force(path, force, like, content):
    """Write driving forces (X, Y, Z, 3) in RAS mm as `write_displacement` writes: LPS mm, sidecar with `content`."""
    _write_vectors(path, force, like, "LPS", {"Content": content})


def _write_vectors(path, vectors, like, frame, sidecar):
    signs = np.diag(FLIP)[:3] if frame == "LPS" else np.ones(3)
    nifti.save(path, (vectors * signs).astype(np.float32)[..., None, :], like, INTENTS[frame])
    sidecar = sidecar | {"Frame": frame, "Unit": "mm", "GridShape": list(vectors.shape[:3]),
                         "GridAffineRAS": like.affine.tolist()}
    with replacing(_sidecar(path)) as temporary:
        temporary.write_text(json.dumps(sidecar, indent=2) + "\n")


def read_sidecar(path):
    """What the JSON beside a displacement file says; nothing where there is none that can be read."""
    try:
        return json.loads(Path(_sidecar(path)).read_text())
    except (OSError, ValueError):
        return {}


def read_displacement(path):
    """A displacement file as (displacement (X, Y, Z, 3) in RAS mm, float32; affine of its grid; its header).

    Intent 1007 is taken as LPS and 1006 as RAS. Raises InputError for any other file.
    """
    image, path = nifti.open_nifti(path)
    frames = {intent: frame for frame, intent in INTENTS.items()}
    frame = frames.get(int(image.header["intent_code"]))
    if frame is None or image.ndim != 5 or image.shape[3:] != (1, 3):
        raise InputError(f"{path} is not a displacement field; give a NIfTI of shape (X, Y, Z, 1, 3) "
                         "and intent 1007 (LPS) or 1006 (RAS)")
    displacement = nifti.read_voxels(image, path)[..., 0, :].astype(np.float32)
    if not np.isfinite(displacement).all():
        raise InputError(f"{path} has NaN or infinite displacements; compute it again")
    if frame == "LPS":
        displacement[..., :2] *= -1
    return displacement, image.affine, image.header


def write_composite(path, transform):
    """Write a `Transform` as ITK's composite, .h5: the field on its grid, x -> linear^-1(x + d(x)), then the affine."""
    back, grid = np.linalg.inv(transform.linear), transform.grid
    near = _by_planes(transform.displacement.shape, grid.affine,
                      lambda i, x: _map(back, x + transform.displacement[i]) - x)
    field = sitk.GetImageFromArray((near * np.diag(FLIP)[:3]).transpose(2, 1, 0, 3).astype(float), isVector=True)
    lps, spacing = FLIP @ grid.affine, grid.spacing
    field.SetSpacing(spacing.tolist())
    field.SetOrigin(lps[:3, 3].tolist())
    field.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    composite = sitk.CompositeTransform([to_itk(transform.linear), sitk.DisplacementFieldTransform(field)])
    with replacing(path) as temporary:
        sitk.WriteTransform(composite, str(temporary))


def write_affine(path, transform):
    """Write T (4, 4), RAS world to RAS world, as an ITK affine (LPS): text in .tfm and .txt, MATLAB in .mat.

    Raises InputError where it cannot be written.
    """
    if not str(path).endswith(AFFINE_ENDINGS):
        raise InputError(f"{path} must end in {', '.join(AFFINE_ENDINGS)} to be written as an affine")
    with replacing(path) as temporary:
        sitk.WriteTransform(to_itk(transform), str(temporary))


def read_affine(path):
    """The linear transform in an ITK file, whatever its ITK type, as T (4, 4) from RAS world to RAS world.

    Raises InputError where the file cannot be read, or its transform is not linear, 3-D and invertible.
    """
    if not os.path.exists(path):
        raise InputError(f"{path} does not exist; check the path")
    try:
        itk = sitk.ReadTransform(str(path))
    except RuntimeError as error:
        raise InputError(f"{path} is not an ITK transform; give a .tfm, .txt or .mat file") from error
    if itk.GetDimension() != 3 or not itk.IsLinear():
        raise InputError(f"{path} is not a linear 3-D transform; give an affine or rigid one")
    transform = from_itk(itk)
    if not np.isfinite(transform).all() or abs(np.linalg.det(transform[:3, :3])) < 1e-6:
        raise InputError(f"{path} holds a singular or non-finite affine; compute it again")
    return transform


def to_itk(transform):
    """T (4, 4) in RAS as a SimpleITK affine, which lives in LPS."""
    lps = FLIP @ transform @ FLIP
    itk = sitk.AffineTransform(3)
    itk.SetMatrix(lps[:3, :3].ravel().tolist())
    itk.SetTranslation(lps[:3, 3].tolist())
    return itk


def from_itk(itk):
    """Any linear SimpleITK transform, in LPS, as T (4, 4) in RAS."""
    origin = np.array(itk.TransformPoint((0.0, 0.0, 0.0)))
    lps = np.eye(4)
    lps[:3, 3] = origin
    lps[:3, :3] = np.stack([itk.TransformPoint(e) - origin for e in np.eye(3).tolist()], axis=1)
    return FLIP @ lps @ FLIP


def _deformation(u, affine):
    """The map z -> W (w + u(w)), w = W^-1 z, of world points (..., 3)."""
    to_voxel, field = np.linalg.inv(affine), _channels_first(u)

    def deform(points):
        voxel = _map(to_voxel, points)
        return _map(affine, voxel + _sample(field, voxel))

    return deform


def _displacement(shape, affine, move):
    return _by_planes((*shape, 3), affine, lambda i, x: move(x) - x)


def _by_planes(shape, affine, plane, dtype=np.float32):
    """plane(i, world points (Y, Z, 3)) for every plane i of a grid (X, Y, Z, ...), as one array.

    Planes run on all cores, and one by one: all points of a head at once, in float64, would fill memory.
    """
    y, z = np.meshgrid(np.arange(shape[1]), np.arange(shape[2]), indexing="ij")
    first = np.stack([np.zeros_like(y), y, z], axis=-1)
    out = np.empty(shape, dtype)

    def fill(i):
        out[i] = plane(i, _map(affine, first + (i, 0, 0)))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fill, range(shape[0])))
    return out


def _map(matrix, points):
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def _channels_first(field):
    return np.ascontiguousarray(np.moveaxis(np.asarray(field, np.float32), -1, 0))


def _sample(channels, voxel):
    voxel = np.moveaxis(voxel, -1, 0)
    return np.stack([ndimage.map_coordinates(c, voxel, order=1, mode="nearest", prefilter=False)
                     for c in channels], axis=-1)


def _sidecar(path):
    path = str(path)
    return path[: -len(".nii.gz" if path.endswith(".nii.gz") else ".nii")] + ".json"
