"""What differs between CPU, GPU and TPU.

Every operation is defined once, in the room that uses it, as its formula. The modules here hold forms of it that are
fast on one device, and one table an operation, `FORMS`: {device: form}. `chosen` takes the form of the device that
programs are compiled for; a device that no table names gets the definition. Tests compare every form with the
definition, its derivatives too (`tests/test_backends.py`).
"""

from contextlib import contextmanager

import jax

_asked_for = None


def current():
    """The device that programs are compiled for: "cpu", "gpu" or "tpu". Nothing else in the package asks JAX for it."""
    return _asked_for or jax.default_backend()


@contextmanager
def compiling_for(backend):
    """Within the block, programs are traced for `backend`, which need not be here: to compile ahead of time, or to run
    the form of one device on another. JAX forgets what it has traced, when the block begins and when it ends."""
    global _asked_for
    before, _asked_for = _asked_for, backend
    jax.clear_caches()
    try:
        yield
    finally:
        _asked_for = before
        jax.clear_caches()


def chosen(forms, definition):
    """The form of the current device, of a table {device: form}; the definition where the table has none."""
    return forms.get(current(), definition)
