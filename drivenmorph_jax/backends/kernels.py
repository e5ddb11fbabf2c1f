"""The kernels of `kernels.cpp`: their library, which is optional, and how XLA calls them.

They are compiled where the package is installed, or by `make`, if there is a C++ compiler. Where the library is missing,
does not run on this machine, or was made for another version of XLA's interface, the forms in XLA's own operations take
their place.
"""

import ctypes
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp

from drivenmorph_jax.backends import current

VERSION = 1  # part of every name, since JAX keeps compiled programs: raise it when what a kernel takes or returns changes
NAMES = "convolution", "convolution_adjoint", "warp", "warp_adjoint", "damped_step", "damped_step_adjoint", "attention",\
    "attention_adjoint"


@cache
def available():
    """Whether XLA can call the kernels. The first call loads them."""
    for path in sorted(Path(__file__).parent.glob("_kernels*")):
        try:
            library = ctypes.CDLL(str(path))
            if not library.drivenmorph_supported():
                return False
            for name in NAMES:
                handler = getattr(library, f"drivenmorph_{name}")
                jax.ffi.register_ffi_target(_target(name), jax.ffi.pycapsule(handler), platform="cpu")
            return True
        except (OSError, AttributeError, jax.errors.JaxRuntimeError):
            continue
    return False


def usable(*arrays):
    """Whether kernels take these arrays: float32 ones, on one CPU.

    XLA cannot split the work of a kernel over devices.
    """
    here = current() == "cpu" and jax.device_count() == 1
    return here and all(x.dtype == jnp.float32 for x in arrays) and available()


def call(name, shapes, *arrays, vmap_method="broadcast_all", **numbers):
    """What the kernel `name` makes of the arrays: float32 arrays of `shapes`."""
    kinds = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.ffi.ffi_call(_target(name), kinds, vmap_method=vmap_method)(*arrays, **numbers)


def _target(name):
    return f"drivenmorph_{name}_{VERSION}"
