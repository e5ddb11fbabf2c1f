"""Transforms of every tool, read as maps from the fixed to the moving world in RAS mm.

The ending of a file names its format. Of a NIfTI file with vectors, the header tells what they are: its intent, the
name of its intent, its extensions and its axes. Where it does not, the user has to say it, by `convention`.
"""

import functools
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.images.reading import PATHS, load_grid, open_nifti, read_voxels
from drivenmorph_jax.images.volume import Volume, on_grid, part_of
from drivenmorph_jax.transforms import freesurfer, fsl
from drivenmorph_jax.transforms.files import DISPLACEMENT, VECTOR, read_sidecar
from drivenmorph_jax.transforms.itk import FLIP, check_whole, flat, from_itk, read_itk, usable
from drivenmorph_jax.transforms.maps import Affine, Chain, Field, faded
from drivenmorph_jax.transforms.world import by_planes, linear_part, map_points
from drivenmorph_jax.transforms.x5 import read_x5

CONVENTIONS = {
    "itk": "displacements in mm, LPS: ITK, ANTs, AFNI",
    "ras": "displacements in mm, RAS: NiftyReg, dipy, FreeSurfer",
    "spm": "coordinates in mm, RAS: SPM, NiftyReg",
    "fsl": "a warp of FNIRT",
    "l2r": "displacements in voxels: Learn2Reg",
    "greedy": "a matrix of text between RAS worlds, from fixed to moving: greedy, NiftyReg",
    "flirt": "a matrix of FLIRT",
}
MATRICES = ("greedy", "flirt")
AFNI = 4  # code of AFNI's extension of NIfTI headers
NIFTYREG = {0: "spm", 1: "ras"}  # intent_p1 of a field of NiftyReg
BACK = ":inverse"
SAMPLES, MOST_SAMPLES = 12, 2**24  # of a B-spline, between two knots and in all


@dataclass(frozen=True, eq=False)
class Read:
    """A transform as it was read."""

    map: Affine | Field | Chain
    grid: Volume | None = None  # on which it is sampled, in the fixed world
    displacement: np.ndarray | None = None  # on this grid, RAS mm, where the file holds one
    linear: np.ndarray | None = None  # (4, 4), its affine part
    other: Volume | None = None  # grid of the moving image, where it is known
    names: tuple[str, str] = ("fixed", "moving")
    by_user: bool = False  # whether the user said what its numbers are

    @property
    def is_affine(self):
        """Whether the map is an affine, or a chain of affines."""
        return all(isinstance(one, Affine) for one in (self.map.maps if isinstance(self.map, Chain) else (self.map,)))


def read_transform(path, geometry="sform", convention=None, fixed=None, moving=None) -> Read:
    """Read a transform.

    Args:
      path: the file.
      geometry: of NIfTI files, as in `images.geometry.placed`.
      convention: one of CONVENTIONS, for a file that does not tell what its numbers are.
      fixed, moving: the two images, or Volumes with their grids, which FSL's transforms need. Files are opened where
        they are needed only.

    Raises InputError where the file is missing or damaged, where it is no transform, or where it needs one of the
    arguments.
    """
    path = str(path)
    if convention not in (None, *CONVENTIONS):
        raise InputError(f"convention is {convention!r}: set it to one of {', '.join(CONVENTIONS)}")
    if not os.path.exists(path):
        raise InputError(f"{path} does not exist; check the path")
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder; give the file of a transform")
    name = path.lower()
    if name.endswith((".mgz", ".mgh")):
        return _field(path, *freesurfer.read_mgz_warp(path))
    if name.endswith(".lta"):
        matrix, _, other = freesurfer.read_lta(path)
        return Read(Affine(matrix), linear=matrix, other=other)
    if name.endswith(".m3z"):
        raise InputError(f"{path} is not read here; convert it by mri_warp_convert --inm3z {path} --outmgzwarp X.mgz")
    if name.endswith(".x5"):
        return _x5(path)
    if name.endswith((".mha", ".mhd", ".nrrd", ".nhdr")):
        return _itk_image(path)
    if name.endswith((".txt", ".mat", ".tfm", ".h5", ".hdf5", ".hdf", ".xfm", ".aff12.1d")):
        matrix = _matrix_of_text(path)
        if matrix is None:
            return _itk(path)
        return _matrix(path, matrix, geometry, convention, fixed, moving)
    if not name.endswith((".nii", ".nii.gz", ".img", ".hdr")):
        raise InputError(f"{path} is no file of a transform; give a displacement field or an affine, such as "
                         "displacement.nii.gz")
    return _nifti(path, geometry, convention, fixed, moving)


def _field(path, displacement, grid, other=None, linear=None, outside=None, names=("fixed", "moving")):
    """The `Read` of a displacement in RAS mm. Its affine part, where it is None, is found by least squares. Beyond the
    grid the map is `outside`, by default the affine part."""
    if not np.isfinite(displacement).all():
        raise InputError(f"{path} has NaN or infinite displacements; compute it again")
    linear = linear_part(displacement, grid.affine) if linear is None else np.asarray(linear, float)
    return Read(faded(displacement, grid.affine, linear if outside is None else outside), grid, displacement, linear,
                other, names)


# Matrices in text files

def _matrix_of_text(path):
    """The matrix (4, 4) of a text file that holds nothing else, or None."""
    try:
        rows = [line.split("#")[0].split() for line in Path(path).read_text("ascii").splitlines()]
        matrix = np.array([row for row in rows if row], float)
    except (OSError, ValueError):
        return None
    return matrix if matrix.shape == (4, 4) and np.allclose(matrix[3], (0, 0, 0, 1)) else None


def _matrix(path, matrix, geometry, convention, fixed, moving):
    if convention not in MATRICES:  # a field's, or none
        raise InputError(f"{path} is a matrix that does not say what it maps; give --convention greedy (from the fixed "
                         "to the moving world, RAS mm) or --convention flirt (of FSL)")
    usable(matrix, path)
    if convention == "flirt":
        fixed, moving = _needed(path, "a matrix of FLIRT", geometry, fixed, moving)
        matrix = fsl.from_flirt(matrix, fixed, moving)
    return Read(Affine(matrix), linear=matrix, by_user=True)


def grid_of(image, geometry):
    """The grid of an image as a Volume, which it may be already."""
    return image if isinstance(image, Volume) else load_grid(image, geometry)


def _needed(path, what, geometry, fixed, moving):
    """The grids of both images. Raises InputError where one of the images is not known."""
    missing = " and ".join(role for role, grid in (("fixed", fixed), ("moving", moving)) if grid is None)
    if missing:
        raise InputError(f"{path} is {what}, whose numbers depend on the images; the {missing} image is missing: give "
                         "the fixed one as --reference, and the moving one as --moving or --source")
    return grid_of(fixed, geometry), grid_of(moving, geometry)


def _x5(path):
    found = read_x5(path)
    if isinstance(found, np.ndarray):
        return Read(Affine(usable(found, path)), linear=found)
    displacement, affine = found
    return _field(path, displacement, on_grid(displacement.shape[:3], affine, path=path))


# ITK

def _itk(path):
    """An ITK transform of any type, or a chain of several, from a .tfm, .txt, .mat or .h5 file."""
    if path.lower().endswith(".txt") and Path(path).read_bytes()[:10] == b"(Transform":
        raise InputError(f"{path} holds parameters of elastix; give the deformation field that transformix -def all "
                         "writes")
    check_whole(path)
    try:
        itk = read_itk(path)
    except RuntimeError as error:
        raise InputError(f"{path} is not a transform of ITK, greedy or FSL; give a .tfm, .txt, .mat or .h5 file of one "
                         "of them") from error
    if itk.GetDimension() != 3:
        raise InputError(f"{path} is not a 3-D transform; give one between 3-D images")
    # ITK applies the last transform of its list first.
    steps = [_itk_step(path, one) for one in reversed(flat(itk))]
    if len(steps) == 1:
        return steps[0]
    return replace(_chained(steps), grid=next((step.grid for step in steps if step.grid is not None), None))


def _itk_step(path, itk):
    if itk.IsLinear():
        matrix = usable(from_itk(itk), path)
        return Read(Affine(matrix), linear=matrix)
    if isinstance(itk, sitk.DisplacementFieldTransform):
        return _itk_field(path, itk.GetDisplacementField())
    if not isinstance(itk, sitk.BSplineTransform):
        raise InputError(f"{path} holds a {itk.GetName()}, which is not read here; convert it to a displacement field, "
                         "for instance by SimpleITK.TransformToDisplacementField")
    return _itk_field(path, _sampled_spline(itk))


def _sampled_spline(spline):
    """The displacements of a B-spline of ITK, sampled SAMPLES times between its knots. Beyond its domain it is 0."""
    size = np.array(spline.GetTransformDomainPhysicalDimensions())
    knots = np.array(spline.GetTransformDomainMeshSize())
    samples = knots * max(1, min(SAMPLES, int((MOST_SAMPLES / knots.prod()) ** (1 / 3)))) + 1
    inside = 1 - 1e-6  # at the border itself rounding decides whether a point belongs to the domain
    direction = np.reshape(spline.GetTransformDomainDirection(), (3, 3))
    origin = spline.GetTransformDomainOrigin() + direction @ (size * (1 - inside) / 2)
    return sitk.TransformToDisplacementField(spline, sitk.sitkVectorFloat64, samples.tolist(), origin.tolist(),
                                             (size * inside / (samples - 1)).tolist(), direction.ravel().tolist())


def _itk_field(path, image):
    """A displacement field of ITK. Beyond its grid ITK gives the identity, which is its affine part here, too."""
    displacement = sitk.GetArrayFromImage(image).transpose(2, 1, 0, 3) * np.diag(FLIP)[:3]
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    grid = on_grid(displacement.shape[:3], FLIP @ affine, path=path)
    return _field(path, displacement.astype(np.float32), grid, outside=np.eye(4))


def _itk_image(path):
    try:
        image = sitk.ReadImage(path)
    except RuntimeError as error:
        raise InputError(f"{path} cannot be read as an image of ITK; copy or compute it again") from error
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 3:
        raise InputError(f"{path} is not a displacement field; give a 3-D image of vectors")
    return _itk_field(path, image)


# NIfTI

def _nifti(path, geometry, convention, fixed, moving):
    image, path = open_nifti(path, geometry)
    if int(image.header["intent_code"]) in fsl.COEFFICIENTS:
        raise InputError(f"{path} holds coefficients of splines; convert them by fnirtfileutils --in={path} "
                         "--ref=FIXED --out=WARP --withaff")
    if image.ndim == 5 and image.shape[3:] == (3, 2):
        return _dipy(path, image)
    if image.shape[3:] not in ((1, 3), (3,)):
        raise InputError(f"{path} is not a displacement field; give one of shape (X, Y, Z, 1, 3), such as ITK's with "
                         "intent 1007, or an affine")
    stored = read_voxels(image, path).astype(np.float32)
    about, vectors = read_sidecar(path, stored), stored.reshape(*stored.shape[:3], 3)
    grid = on_grid(vectors.shape[:3], image.affine, image.header, path)
    warp = freesurfer.read_nifti_warp(path, image, vectors)
    if warp is not None:
        return _field(path, *warp)
    told = _told(path, image, about)
    if told is None and (convention is None or convention in MATRICES):
        raise InputError(f"{path} does not tell what its vectors are; give --convention, one of "
                         + ", ".join(sorted(set(CONVENTIONS) - set(MATRICES))))
    read = _by_convention(path, told or convention, vectors, grid, about, geometry, moving)
    return read if told else replace(read, by_user=True)


def _told(path, image, about):
    """The convention that a NIfTI file tells, or None. Raises InputError where it tells one that is no field."""
    header, name = image.header, Path(path).name
    code, intent = int(header["intent_code"]), header["intent_name"].item().decode("latin-1")
    if intent == "NREG_TRANS":  # NREG_TRANS_TYPE in NiftyReg's Maths.hpp
        kind = round(float(header["intent_p1"]))
        if kind not in NIFTYREG:
            raise InputError(f"{path} holds splines or velocities of NiftyReg; convert it by reg_transform -ref FIXED "
                             f"-def {path} FIELD")
        return NIFTYREG[kind]
    if intent == "Mapping":
        return "spm"
    known = {VECTOR: "itk", DISPLACEMENT: "ras", fsl.DISPLACEMENTS: "fsl"}
    if code in known:
        return known[code]
    if AFNI in header.extensions.get_codes() or about.get("Frame") == "LPS":
        return "itk"
    return "l2r" if image.ndim == 4 and name.startswith("disp_") else None


def _by_convention(path, convention, vectors, grid, about, geometry, moving):
    other = about.get("TargetGridShape")
    other = other and on_grid(other, about["TargetGridAffineRAS"], path=path)
    if convention == "itk":
        displacement = vectors * np.float32([-1, -1, 1])
    elif convention == "ras":
        displacement = vectors
    elif convention == "spm":
        displacement = by_planes(vectors.shape, grid.affine, lambda i, x: vectors[i] - x)
    elif convention == "l2r":
        _, other = _needed(path, "a field of Learn2Reg", geometry, grid, moving)
        to_voxel = np.linalg.inv(grid.affine)
        displacement = by_planes(vectors.shape, grid.affine, lambda i, x: map_points(
            other.affine, vectors[i] + map_points(to_voxel, x)) - x)
    else:
        displacement = fsl.from_warp(vectors, *_needed(path, "a warp of FNIRT", geometry, grid, moving))
    displacement, grid = _of_image(displacement, grid, about)
    return _field(path, displacement, grid, other, about.get("Linear"),
                  names=tuple(about.get("Direction", "fixed to moving").split(" to ")))


def _of_image(displacement, grid, about):
    """A displacement without the margin in which it fades, see `maps.faded`, and its grid, that of the image."""
    if "ImageGridShape" not in about:
        return displacement, grid
    shape, affine = about["ImageGridShape"], np.array(about["ImageGridAffineRAS"])
    inside = np.ascontiguousarray(displacement[part_of(grid.affine, shape, affine)])
    return inside, on_grid(shape, affine, grid.header, grid.path)


def _dipy(path, image):
    """The mapping of dipy, whose second half leads from the static to the moving image. Its header holds the inverse of
    the affine of its grid, that of the static image."""
    backward = np.ascontiguousarray(read_voxels(image, path)[..., 1], np.float32)
    return _field(path, backward, on_grid(backward.shape[:3], np.linalg.inv(image.affine), path=path))


# Chains

def read_chain(paths, geometry="sform", convention=None, fixed=None, moving=None) -> Read:
    """Read a transform that consists of several, in the order in which a point passes them from fixed to moving.

    `paths` is a file or a sequence of them. ":inverse" after the name of a file takes its inverse. The other arguments
    are those of `read_transform`. The fixed image is that of the first file, and the moving image that of the last.
    """
    paths = [paths] if isinstance(paths, PATHS) else paths
    if not isinstance(paths, (list, tuple)) or not all(isinstance(path, PATHS) for path in paths):
        raise InputError(f"a transform is read from a file or a list of files, not from {type(paths).__name__}: save "
                         "it, and give the file")
    paths, steps = [str(path) for path in paths], []
    for k, path in enumerate(paths):
        back = path.endswith(BACK) and not os.path.exists(path)
        ends = fixed if k == 0 else None, moving if k == len(paths) - 1 else None
        step = read_transform(path.removesuffix(BACK) if back else path, geometry, convention,
                              *(ends[::-1] if back else ends))
        steps.append(_inverted(step) if back else step)
    if convention is not None and not any(step.by_user for step in steps):
        raise InputError(f"convention is {convention}, but {', '.join(paths)} tell their own: leave it out")
    return steps[0] if len(steps) == 1 else _chained(steps)


def _chained(steps):
    """The first of `steps`, then the second, and so on."""
    linear = functools.reduce(lambda before, step: step.linear @ before, steps, np.eye(4))
    return Read(Chain(tuple(step.map for step in steps)), steps[0].grid, linear=linear, other=steps[-1].other,
                names=(steps[0].names[0], steps[-1].names[1]))


def _inverted(step):
    return Read(step.map.inverse, step.other, None, np.linalg.inv(step.linear), step.grid, step.names[::-1],
                step.by_user)
