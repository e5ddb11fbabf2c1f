"""The memory that a run returns to the system."""

import ctypes

LARGE = 24 << 20  # bytes, about a volume of a brain at 1 mm
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def return_large_arrays():
    """Have glibc return large arrays to the system when they are freed. By itself it soon keeps all up to 32 MiB, with
    holes between them, and a registration needs a sixth more memory."""
    limit = getattr(ctypes.CDLL(None), "mallopt", None)
    if limit:  # a Mac has no mallopt
        limit(M_MMAP_THRESHOLD, LARGE)


def trim_memory():
    """Return free memory to the system. glibc keeps some of the memory of every stage and validation, which adds up."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:  # a Mac has no malloc_trim
        trim(0)
