"""The parameters of deepbet's two networks, read from the installed package without importing it.

A file of parameters is a zip archive. Its members `data/0` to `data/37` are the tensors as little-endian float32, in
the order in which the network applies them. The rest of the archive is not read, and nothing is unpickled. Only the two
files of version 1.0.2 are accepted: their sums are compared.

Reference: Fisch et al., "deepbet: Fast brain extraction of T1-weighted MRI using convolutional neural networks",
  Computers in Biology and Medicine, 2024; https://github.com/wwu-mmll/deepbet (MIT).
"""

import hashlib
import io
import zipfile
from importlib import metadata

import numpy as np

from drivenmorph_jax.errors import InputError

VERSION = "1.0.2"
INSTALL = f"pip install --no-deps deepbet=={VERSION}"
SUMS = {  # SHA-256 of the files of version 1.0.2
    "bbox_model.pt": "39a7b2b5f799faa1391ea97bfcdc0b9299f20d84f2316a4ff8918dc4685e40aa",
    "model.pt": "de8ee7c69654d0dd3935dc4a5d84571d8ecf4637a6bfc01df399c4c2bc86e0fd",
}


class Missing(InputError):
    """The package deepbet is missing."""


def _block(name, inputs, outputs, stride):
    """The shapes of a residual block: two 3x3x3 convolutions, and the 1x1x1 of its shortcut where it has a stride."""
    return {f"{name}.0": (outputs, inputs, 3, 3, 3), f"{name}.1": (outputs, outputs, 3, 3, 3),
            **({f"{name}.shortcut": (outputs, inputs, 1, 1, 1)} if stride > 1 else {})}


def _down(name, inputs, outputs, stride):
    return _block(f"{name}.a", inputs, outputs, stride) | _block(f"{name}.b", outputs, outputs, 1)


def _up(name, inputs, outputs):
    between = inputs // 4
    return {f"{name}.in": (between, inputs, 1, 1, 1), f"{name}.transposed": (between, between, 3, 3, 3),
            f"{name}.out": (outputs, between, 1, 1, 1)}


# The tensors in the order of the file. Kernels are (O, I, D, H, W), those of transposed convolutions (I, O, D, H, W).
SHAPES = {
    "stem": (16, 1, 7, 7, 7),
    **_down("down0", 16, 16, 1), **_down("down1", 16, 32, 2), **_down("down2", 32, 64, 2), **_down("down3", 64, 128, 2),
    **_up("up0", 128, 64), **_up("up1", 64, 32), **_up("up2", 32, 16), **_up("up3", 16, 16),
    "head.transposed": (16, 8, 3, 3, 3), "head.transposed.bias": (8,),
    "head": (8, 8, 3, 3, 3), "head.bias": (8,),
    "head.out": (8, 2, 2, 2, 2), "head.out.bias": (2,),
}
TRANSPOSED = {name for name in SHAPES if name.endswith(".transposed")} | {"head.out"}


def load(name):
    """The parameters of one network: {name: float32 array}, kernels as (D, H, W, I, O).

    Args:
      name: "bbox_model.pt", which finds the brain in the whole image, or "model.pt", which finds its outline.

    Raises InputError where the package deepbet is missing, has another version or is damaged.
    """
    try:
        package = metadata.distribution("deepbet")
    except metadata.PackageNotFoundError as error:
        raise Missing(f"the package deepbet, which finds the brain in a head, is missing: {INSTALL}") from error
    if package.version != VERSION:
        raise InputError(f"the package deepbet has version {package.version}, not {VERSION}: {INSTALL}")
    paths = [file for file in package.files or () if file.parts[-3:] == ("data", "models", name)]
    try:
        content = paths[0].locate().read_bytes()
    except (IndexError, OSError) as error:
        raise _damaged(name) from error
    if hashlib.sha256(content).hexdigest() != SUMS[name]:
        raise _damaged(name)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {"/".join(member.split("/")[1:]): member for member in archive.namelist()}
        return {key: _kernel(key, np.frombuffer(archive.read(members[f"data/{k}"]), "<f4").reshape(shape))
                for k, (key, shape) in enumerate(SHAPES.items())}


def _kernel(key, tensor):
    if tensor.ndim == 1:
        return tensor
    return np.ascontiguousarray(tensor.transpose((2, 3, 4, 0, 1) if key in TRANSPOSED else (2, 3, 4, 1, 0)))


def _damaged(name):
    return InputError(f"{name} of the package deepbet {VERSION} is missing or damaged; install it again: "
                      f"{INSTALL} --force-reinstall")
