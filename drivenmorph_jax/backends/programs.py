"""Options and numbers by which programs are compiled and run on each device."""

import os

from drivenmorph_jax.backends import current

# CPU: a lower optimisation level of LLVM. It takes three quarters of the time, and its code runs as fast. GPU: no
# search for the best of many kernels for each of the small matrix products.
OPTIONS = {"cpu": {"xla_backend_optimization_level": 1}, "gpu": {"xla_gpu_enable_triton_gemm": False}}


def compiler_options():
    """Options for `jax.jit` that make programs compile faster on the current device.

    An option that the environment variable XLA_FLAGS names is left to it.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in OPTIONS.get(current(), {}).items() if f"--{name}=" not in flags}


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
