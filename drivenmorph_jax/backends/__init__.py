"""The differences between CPU, GPU and TPU.

Every operation is defined once, as its formula, in the room that uses it. The modules here hold implementations of such
definitions that are fast on one device. Each operation has one table, `FORMS`: {device: implementation}. `chosen` takes
the implementation for the device that programs are compiled for. A device that is not in the table gets the definition.
Choices of one line, as in `fusion` and `programs`, ask `current` instead of a table. Tests compare every implementation
and its derivatives with the definition (`tests/test_backends.py`).
"""

from contextlib import contextmanager

import jax

_asked_for = None


def current():
    """The device that programs are compiled for: "cpu", "gpu" or "tpu".

    This is the only place in the package that asks JAX for its backend.
    """
    return _asked_for or jax.default_backend()


@contextmanager
def compiling_for(backend):
    """Within the block, programs are traced for the device `backend`, which this machine need not have.

    This serves to compile ahead of time, or to run the implementation for one device on another. JAX drops the programs
    that it has traced when the block begins and when it ends.
    """
    global _asked_for
    before, _asked_for = _asked_for, backend
    jax.clear_caches()
    try:
        yield
    finally:
        _asked_for = before
        jax.clear_caches()


def chosen(forms, definition):
    """The implementation for the current device from {device: implementation}; `definition` where it has none."""
    return forms.get(current(), definition)
