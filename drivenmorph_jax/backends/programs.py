"""How programs are compiled and run on each device."""

from drivenmorph_jax.backends import current

# CPU: a lower effort of LLVM, which takes three quarters of the time and makes code that runs as fast. GPU: no search
# for the best of many kernels for each of the small matrix products.
OPTIONS = {"cpu": {"xla_backend_optimization_level": 1}, "gpu": {"xla_gpu_enable_triton_gemm": False}}


def compiler_options():
    """Options for `jax.jit` with which programs compile sooner on the current device."""
    return OPTIONS.get(current(), {})


def device_memory(compiled):
    """Bytes that a compiled program takes of each device; arguments that it may overwrite count once."""
    memory = compiled.memory_analysis()
    if current() == "tpu":  # its sum of temporary arrays counts places that are used twice
        return memory.peak_memory_in_bytes
    return (memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
            - memory.alias_size_in_bytes)


def unrolled(length):
    """How many of `length` steps of a loop are written out. All on GPU, where a loop copies what it keeps for its
    backward pass once more; one elsewhere, so that the step is compiled once."""
    return length if current() == "gpu" else 1


def pairs_ahead():
    """Pairs that are computed while the caller works on the last one. None on CPU, which would have to do both at once:
    the seconds of a pair would then tell of both."""
    return 0 if current() == "cpu" else 1
