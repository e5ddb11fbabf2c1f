"""Transforms of FreeSurfer: warps (.mgz, and .nii.gz with an extension) and linear transforms (.lta).

Layouts: `io/framed.py`, `io/fsnifti1extension.py` and `io/affine.py` of surfa, which FreeSurfer's authors write.
"""

import gzip
import re

import nibabel
import numpy as np

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.files import replacing
from drivenmorph_jax.images.volume import on_grid
from drivenmorph_jax.images.writing import compressed
from drivenmorph_jax.transforms.itk import usable
from drivenmorph_jax.transforms.world import by_planes, map_points

EXTENSION = 14  # code of FreeSurfer's extension of NIfTI headers
GEOMETRIES, META = 10, 13  # tags
WARP = 3  # FreeSurfer's intent of a file, in the upper bytes of an .mgz version
NAME_BYTES = 512
HEADER = np.dtype([("version", ">i4"), ("shape", ">i4", 4), ("type", ">i4"), ("dof", ">i4"), ("good", ">i2"),
                   ("spacing", ">f4", 3), ("axes", ">f4", (3, 3)), ("centre", ">f4", 3), ("unused", "V194")])
GEOMETRY = np.dtype([("valid", ">i4"), ("shape", ">i4", 3), ("spacing", ">f4", 3), ("axes", ">f4", (3, 3)),
                     ("centre", ">f4", 3)])
TYPES = {0: ">u1", 1: ">i4", 3: ">f4", 4: ">i2"}
VOXELS, VOXEL_DISPLACEMENTS, WORLD, WORLD_DISPLACEMENTS = range(4)  # what the vectors of a warp are


def read_mgz_warp(path):
    """Read a warp from an .mgz or .mgh file: (displacement (X, Y, Z, 3) in RAS mm, its grid, the moving grid).

    Raises InputError where the file cannot be read or is not a warp.
    """
    try:
        with (gzip.open if str(path).endswith("z") else open)(path, "rb") as file:
            content = file.read()
        header = np.frombuffer(content, HEADER, 1)[0]
        kind, count = np.dtype(TYPES[int(header["type"])]), int(np.prod(header["shape"]))
        vectors = np.frombuffer(content, kind, count, HEADER.itemsize).reshape(header["shape"], order="F")
        tags = content[HEADER.itemsize + count * kind.itemsize + 20:]  # 20: five numbers about the scan
    except (OSError, EOFError, KeyError, ValueError) as error:
        raise InputError(f"{path} cannot be read as an MGH file; copy or compute it again") from error
    if vectors.shape[3] != 3:
        raise InputError(f"{path} has shape {vectors.shape} and is no warp; give one of shape (X, Y, Z, 3)")
    return _displacement(path, vectors, *_geometries(path, tags, NAME_BYTES), None)


def read_nifti_warp(path, image, vectors):
    """The same from a NIfTI file with FreeSurfer's extension; None where the extension does not describe a warp.

    Args:
      path: name in messages.
      image: the nibabel image.
      vectors: its voxels (X, Y, Z, 3).
    """
    for extension in image.header.extensions:
        if extension.get_code() == EXTENSION:
            content = bytes(extension.get_content())
            if int.from_bytes(content[1:3], "big") == WARP:
                return _displacement(path, vectors, *_geometries(path, content[4:], None), image.affine)
    return None


def _geometries(path, tags, name_bytes):
    """(grid of the moving image, grid of the fixed image, what the vectors are) from the tags of a file.

    A geometry ends in a name of `name_bytes`, or with None in a name whose length stands before it.
    """
    found, place = {}, 0
    while place + 4 <= len(tags):
        tag = int.from_bytes(tags[place:place + 4], "big", signed=True)
        place += 4
        if tag in (0, -1):
            break
        if tag == GEOMETRIES and name_bytes is not None:  # this tag alone has no length there
            length = 2 * (GEOMETRY.itemsize + name_bytes)
        else:
            length = int.from_bytes(tags[place:place + 8], "big")
            place += 8
        found[tag] = tags[place:place + length]
        place += length
    try:
        first = found[GEOMETRIES]
        moving = np.frombuffer(first, GEOMETRY, 1)[0]
        name = name_bytes if name_bytes is not None else 4 + int.from_bytes(
            first[GEOMETRY.itemsize:GEOMETRY.itemsize + 4], "big")
        fixed = np.frombuffer(first, GEOMETRY, 1, GEOMETRY.itemsize + name)[0]
        return moving, fixed, int.from_bytes(found[META][:4], "big")
    except (KeyError, ValueError) as error:
        raise InputError(f"{path} does not hold the two geometries of a FreeSurfer warp; write it with a FreeSurfer of "
                         "version 7.4 or newer, or with surfa") from error


def _grid(shape, spacing, axes, centre, path):
    """A grid from its voxel sizes, the directions of its axes (3, 3), a row for each, and its centre, in RAS mm."""
    shape, matrix = tuple(int(n) for n in shape), np.transpose(axes).astype(float) * spacing
    return on_grid(shape, nibabel.affines.from_matvec(matrix, centre - matrix @ np.array(shape) / 2), path=str(path))


def _displacement(path, vectors, moving, fixed, kind, affine):
    if not moving["valid"] or not fixed["valid"]:
        raise InputError(f"{path} does not know the geometry of its two images; write it again with both")
    moving, fixed = (_grid(*(one[name] for name in ("shape", "spacing", "axes", "centre")), path)
                     for one in (moving, fixed))
    if affine is not None:  # of the NIfTI header, with more digits
        fixed = on_grid(fixed.data.shape, affine, path=str(path))
    if vectors.shape[:3] != fixed.data.shape or kind not in range(4):
        raise InputError(f"{path} has vectors on a grid of {vectors.shape[:3]} and says {fixed.data.shape}; write it "
                         "again")
    to_voxel = np.linalg.inv(fixed.affine)

    def plane(i, x):
        v = vectors[i].astype(float)
        if kind in (VOXELS, VOXEL_DISPLACEMENTS):
            v = map_points(moving.affine, v + (map_points(to_voxel, x) if kind == VOXEL_DISPLACEMENTS else 0))
        return v if kind == WORLD_DISPLACEMENTS else v - x

    return by_planes((*fixed.data.shape, 3), fixed.affine, plane), fixed, moving


def write_mgz_warp(path, displacement, fixed, moving):
    """Write a displacement (X, Y, Z, 3) in RAS mm as a warp of FreeSurfer, with the grids of both Volumes."""
    def geometry(volume):
        out = np.zeros((), GEOMETRY)
        out["valid"], out["shape"], out["spacing"] = 1, volume.data.shape, volume.spacing
        out["axes"] = (volume.affine[:3, :3] / volume.spacing).T
        out["centre"] = map_points(volume.affine, np.array(volume.data.shape) / 2)
        return out

    header, place = np.zeros((), HEADER), geometry(fixed)
    header["version"], header["shape"], header["type"] = WARP << 8 | 1, displacement.shape, 3
    header["dof"] = header["good"] = 1
    for name in ("spacing", "axes", "centre"):
        header[name] = place[name]
    names = bytes(NAME_BYTES)
    meta = np.array([WORLD_DISPLACEMENTS, 1], ">i4").tobytes() + np.zeros(1, ">f4").tobytes()
    content = [header.tobytes(), displacement.astype(">f4").tobytes(order="F"), np.zeros(5, ">f4").tobytes(),
               GEOMETRIES.to_bytes(4, "big"), geometry(moving).tobytes(), names, place.tobytes(), names,
               META.to_bytes(4, "big"), len(meta).to_bytes(8, "big"), meta]
    with replacing(path) as temporary, compressed(temporary) as file:
        file.write(b"".join(content))


def read_lta(path):
    """Read an .lta as (map from the fixed to the moving world (4, 4) in RAS mm, fixed grid, moving grid).

    The file holds the way from its source, the moving image, to its destination, the fixed image. A grid is None where
    the file does not know it.

    Raises InputError where the file is not an .lta of one transform, or is in a frame that cannot be known.
    """
    text = re.sub(r"#.*", "", _text(path))
    try:
        kind, number = (int(re.search(rf"^{name}\s*=\s*(\d+)", text, re.M)[1]) for name in ("type", "nxforms"))
        after = text[re.search(r"^\s*1\s+4\s+4\s*$", text, re.M).end():]
        matrix = np.array(after.split()[:16], float).reshape(4, 4)
        moving, fixed = (_described(after, name, path) for name in ("src", "dst"))
    except (TypeError, AttributeError, ValueError, LookupError) as error:
        raise InputError(f"{path} is not an .lta of FreeSurfer, or is cut short; write it again") from error
    usable(matrix, path)
    if number != 1 or kind not in (0, 1) or kind == 0 and None in (moving, fixed):
        raise InputError(f"{path} has {number} transforms of type {kind}; give one, from voxels to voxels with both "
                         "geometries (0) or from RAS to RAS (1)")
    if kind == 0:
        matrix = fixed.affine @ matrix @ np.linalg.inv(moving.affine)
    return np.linalg.inv(matrix), fixed, moving


def _text(path):
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path") from error


def _described(text, name, path):
    """The grid that an .lta describes under "src volume info" or "dst volume info", or None."""
    lines = text[re.search(rf"^{name} volume info", text, re.M).end():].strip().splitlines()[:8]
    values = {key.strip(): value.split() for key, _, value in (line.partition("=") for line in lines)}
    if int(values["valid"][0]) != 1:
        return None
    spacing, *axes, centre = (np.array(values[key], float) for key in ("voxelsize", "xras", "yras", "zras", "cras"))
    return _grid(values["volume"], spacing, axes, centre, path)


def write_lta(path, linear, fixed, moving):
    """Write the map `linear` (4, 4), from the fixed to the moving world in RAS mm, as an .lta of type RAS to RAS."""
    def numbers(values):
        return " ".join(f"{value:.15e}" for value in values)

    lines = ["type      = 1", "nxforms   = 1", "mean      = 0.0 0.0 0.0", "sigma     = 1.0", "1 4 4",
             *map(numbers, np.linalg.inv(linear))]
    for name, volume in (("src", moving), ("dst", fixed)):
        axes = (volume.affine[:3, :3] / volume.spacing).T
        lines += [f"{name} volume info", "valid = 1  # volume info valid", f"filename = {volume.path}",
                  "volume = {} {} {}".format(*volume.data.shape), f"voxelsize = {numbers(volume.spacing)}",
                  *(f"{axis}ras   = {numbers(row)}" for axis, row in zip("xyz", axes, strict=True)),
                  f"cras   = {numbers(map_points(volume.affine, np.array(volume.data.shape) / 2))}"]
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n")
