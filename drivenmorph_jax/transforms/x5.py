"""Transforms in X5 files, the HDF5 format of nitransforms and of a draft of BIDS.

Matrices and coordinates are RAS mm and lead from the fixed to the moving image. A dense field lies on the grid whose
affine is its domain's mapping. Source: nitransforms 25.1, nitransforms.io.x5.
"""

import numpy as np

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.transforms.world import by_planes


def read_x5(path):
    """The transform of an .x5 file: a matrix (4, 4), or for a dense field its displacement (X, Y, Z, 3) in RAS mm and
    the affine (4, 4) of its grid.

    Raises InputError where the file is none of X5, where it holds several transforms or one of another kind, and where
    h5py is missing.
    """
    try:
        import h5py
    except ImportError as error:
        raise InputError(f"{path} needs the package h5py; pip install h5py") from error
    try:
        with h5py.File(path) as file:
            if file.attrs.get("Format") != "X5":
                raise InputError(f"{path} is not an X5 file; give one that nitransforms wrote")
            transforms = list(file["TransformGroup"].values())
            if len(transforms) != 1:
                raise InputError(f"{path} holds {len(transforms)} transforms; write each to a file of its own")
            return _one(path, transforms[0])
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path} is damaged or cut short; write it again") from error


def _one(path, node):
    kind, form, data = node.attrs["Type"], node.attrs.get("Representation"), np.asarray(node["Transform"], float)
    if kind == "linear" and data.shape in ((4, 4), (1, 4, 4)):
        return data.reshape(4, 4)
    if kind == "nonlinear" and form in ("displacements", "deformations") and data.ndim == 4 and data.shape[3] == 3:
        affine = np.asarray(node["Domain"]["Mapping"], float)
        if form == "deformations":
            return by_planes(data.shape, affine, lambda i, x: data[i] - x), affine
        return data.astype(np.float32), affine
    raise InputError(f"{path} holds a {kind} transform ({form}, {'x'.join(map(str, data.shape))}), which is not read "
                     "here; convert it to a dense field")
