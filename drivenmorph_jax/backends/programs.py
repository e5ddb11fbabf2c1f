"""Options and numbers by which programs are compiled and run on each device."""

import hashlib
import os
import pickle
import platform
from functools import cache
from pathlib import Path

import jax
from jax.experimental import serialize_executable

from drivenmorph_jax.backends import current
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.files import replacing

# CPU: a lower optimisation level of LLVM. It takes three quarters of the time, and its code runs as fast. GPU: no
# search for the best of many kernels for each of the small matrix products.
OPTIONS = {"cpu": {"xla_backend_optimization_level": 1}, "gpu": {"xla_gpu_enable_triton_gemm": False}}


def compiler_options():
    """Options for `jax.jit` that make programs compile faster on the current device.

    An option that the environment variable XLA_FLAGS names is left to it.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in OPTIONS.get(current(), {}).items() if f"--{name}=" not in flags}


def kept(lower, *settings):
    """The program `lower().compile()`. A later process with the same `settings` loads it and traces nothing.

    JAX's own cache saves the compilation of a program but not its tracing, which takes longer for a network of many
    updates. The program is kept in the folder of that cache; without a cache, or on several devices, nothing is kept.

    Args:
      lower: function without arguments, returns what `jax.jit(...).lower` does.
      settings: what the program depends on beside the code of this package, JAX, its flags and the device. Their
        `repr` tells them apart.
    """
    folder = jax.config.jax_compilation_cache_dir
    if folder is None or jax.device_count() > 1:
        return lower().compile()
    told = repr((_place(), os.environ.get("XLA_FLAGS"), jax.config.jax_default_matmul_precision, settings))
    path = Path(folder) / f"program-{hashlib.sha256(told.encode()).hexdigest()}"
    try:
        return serialize_executable.deserialize_and_load(*pickle.loads(path.read_bytes()))
    except Exception:  # a missing file, or one that is cut short or of another device raises different types
        program = lower().compile()
    try:
        content = pickle.dumps(serialize_executable.serialize(program))
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except (InputError, ValueError, jax.errors.JaxRuntimeError):
        pass  # a folder that cannot be written, or a device whose programs cannot be kept, costs time alone
    return program


@cache
def _place():
    """What makes a program another one: the code of this package, JAX, the device, and the CPU with its features."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).resolve().parents[1].rglob("*.py")):
        code.update(path.read_bytes())
    features = platform.processor()
    try:
        features += next(line for line in Path("/proc/cpuinfo").read_text().splitlines()
                         if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        pass
    return code.hexdigest(), jax.__version__, jax.lib.__version__, jax.devices()[0].device_kind, features


def device_memory(compiled):
    """Bytes of every device's memory that a compiled program takes. Arguments that it may overwrite count once."""
    memory = compiled.memory_analysis()
    if current() == "tpu":  # its sum of temporary arrays counts memory twice that is reused
        return memory.peak_memory_in_bytes
    return (memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
            - memory.alias_size_in_bytes)


# On NVIDIA GPUs they have a slow float32 scatter-add, which is the derivative of a warp: jax issue 38806.
SLOW_SCATTER = ("0.10.2", "0.11.0")


def slow_scatter(version):
    """Whether the jaxlib of this version is slow at the derivative of a warp on the current device."""
    return version in SLOW_SCATTER and current() == "gpu"


def unrolled(length):
    """How many of the `length` steps of a loop are unrolled.

    On GPU all are: a loop would copy the values kept for its backward pass once more. Elsewhere one is, so that the
    step is compiled once.
    """
    return length if current() == "gpu" else 1


def pairs_ahead():
    """How many pairs are computed while the caller works on the last one.

    It is 0 on CPU, which would compute both on the same cores: the seconds of a pair would then include the caller's
    work.
    """
    return 0 if current() == "cpu" else 1
