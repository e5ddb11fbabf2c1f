"""Deformable registration of 3-D brain MRI in JAX: `register` two images, or see `registration`, `demons`, `model`."""

__all__ = ["register"]


def __getattr__(name):
    # Imported when asked for: light parts of the package must not wait for JAX.
    if name == "register":
        from drivenmorph_jax.registration import register
        return register
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
