"""The memory that a run returns to the system."""

import ctypes


def trim_memory():
    """Return free memory to the system. glibc keeps some of the memory of every stage and validation, which adds up."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:  # a Mac has no malloc_trim
        trim(0)
