"""The kernels for CPU, which the package does without where they cannot be compiled. All else is in pyproject.toml."""

from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup

# XLA's headers, which come with jaxlib. The library is none of Python's modules, so one serves every version of Python.
jaxlib = find_spec("jaxlib")
kernels = Extension(
    "drivenmorph_jax.backends._kernels",
    ["drivenmorph_jax/backends/kernels.cpp"],
    include_dirs=[str(Path(path) / "include") for path in jaxlib.submodule_search_locations] if jaxlib else [],
    extra_compile_args=["-std=c++17", "-O3", "-fno-math-errno", "-w"],
    language="c++",
    optional=True,
    py_limited_api=True,
)
setup(ext_modules=[kernels], options={"bdist_wheel": {"py_limited_api": "cp311"}})
