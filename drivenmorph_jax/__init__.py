"""Deformable registration of 3-D brain MRI in JAX: `register` aligns two images; the other names are its parts.

The rooms, from the bottom up: `fields`, `demons`, `images`, `brain`, `network`, `transforms`, `data`, `evaluation`,
`training`, `registration`, `labelling`, `view`, `cli`. A room imports only what stands before it. `backends` and
`runtime` hold what depends on the device and on the run.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drivenmorph_jax import demons
    from drivenmorph_jax.demons import forces
    from drivenmorph_jax.errors import InputError
    from drivenmorph_jax.evaluation.evaluate import evaluate_checkpoint
    from drivenmorph_jax.fields.integrate import exponential
    from drivenmorph_jax.fields.inverse import coarse_inverse, inverse
    from drivenmorph_jax.fields.jacobian import jacobian_determinant
    from drivenmorph_jax.fields.smooth import gaussian_smooth
    from drivenmorph_jax.fields.warp import compose, warp, warp_nearest
    from drivenmorph_jax.images.reading import load_image
    from drivenmorph_jax.labelling.label import Labelling, label
    from drivenmorph_jax.network.inference import load_checkpoint
    from drivenmorph_jax.network.model import DrivenMorph
    from drivenmorph_jax.registration.register import register
    from drivenmorph_jax.registration.result import Result
    from drivenmorph_jax.registration.strip import brain_mask
    from drivenmorph_jax.training.loop import train_and_evaluate
    from drivenmorph_jax.transforms.transform import Transform

__all__ = ["DrivenMorph", "InputError", "Labelling", "Result", "Transform", "brain_mask", "coarse_inverse", "compose",
           "demons", "evaluate_checkpoint", "exponential", "forces", "gaussian_smooth", "inverse",
           "jacobian_determinant", "label", "load_checkpoint", "load_image", "register", "train_and_evaluate", "warp",
           "warp_nearest"]

_HOME = {"DrivenMorph": "network.model", "InputError": "errors", "Labelling": "labelling.label",
         "Result": "registration.result", "Transform": "transforms.transform",
         "brain_mask": "registration.strip", "coarse_inverse": "fields.inverse", "compose": "fields.warp",
         "evaluate_checkpoint": "evaluation.evaluate", "exponential": "fields.integrate", "forces": "demons",
         "gaussian_smooth": "fields.smooth", "inverse": "fields.inverse", "jacobian_determinant": "fields.jacobian",
         "label": "labelling.label", "load_checkpoint": "network.inference", "load_image": "images.reading",
         "register": "registration.register", "train_and_evaluate": "training.loop", "warp": "fields.warp",
         "warp_nearest": "fields.warp"}


def __getattr__(name):
    # Imported when asked for, since importing JAX takes seconds that `--help` must not cost.
    if name == "demons":
        return import_module("drivenmorph_jax.demons")
    if name in _HOME:
        return getattr(import_module(f"drivenmorph_jax.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
