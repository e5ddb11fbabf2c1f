"""The kernels of `kernels.cpp`: their library, which is optional, and how programs call them.

They are compiled where the package is installed, and by `make`, if there is a C++ compiler. Where the library is
missing, or does not fit this machine or its jaxlib, the forms in XLA's own operations take their place.
"""

import ctypes
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp

from drivenmorph_jax.backends import current

# Part of every name, since JAX keeps compiled programs: raise it where what a kernel takes or returns changes.
VERSION = 1
NAMES = ("convolution", "convolution_adjoint", "warp", "warp_adjoint", "damped_step", "damped_step_adjoint",
         "attention", "attention_adjoint")


@cache
def available():
    """Whether programs can call the kernels. The first call loads them."""
    if jax.devices()[0].platform != "cpu":  # asked first: JAX registers kernels only when its devices are there
        return False
    for path in Path(__file__).parent.glob("_kernels*.so"):
        try:
            library = ctypes.CDLL(str(path))
            if not library.drivenmorph_supported():
                return False
            for name in NAMES:
                handler = jax.ffi.pycapsule(library[f"drivenmorph_{name}"])
                jax.ffi.register_ffi_target(_target(name), handler, platform="cpu")
            return True
        except (OSError, AttributeError, jax.errors.JaxRuntimeError):  # damaged, incomplete, another interface of XLA
            continue
    return False


def usable(*arrays):
    """Whether kernels take these arrays: float32 ones, on one CPU. XLA cannot split a kernel over devices."""
    one = current() == "cpu" and jax.device_count() == 1
    return one and all(x.dtype == jnp.float32 for x in arrays) and available()


def call(name, shapes, *arrays, vmap_method="broadcast_all", **attributes):
    """What the kernel `name` computes from the arrays: a list of float32 arrays of `shapes`."""
    kinds = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.ffi.ffi_call(_target(name), kinds, vmap_method=vmap_method)(*arrays, **attributes)


def _target(name):
    return f"drivenmorph_{name}_{VERSION}"
