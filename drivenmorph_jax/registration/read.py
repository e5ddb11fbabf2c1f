"""Stage 1: the request is checked, and the images are read."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from drivenmorph_jax.demons import FORCES
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.images.reading import PATHS, load_image, load_labels
from drivenmorph_jax.images.volume import Volume
from drivenmorph_jax.network.inference import load_checkpoint
from drivenmorph_jax.runtime.checkpoint import SHIPPED
from drivenmorph_jax.transforms.itk import read_affine

REFINE_STEPS = {"drivenmorph": 10, "demons": 0}
CHOICES = {"method": tuple(REFINE_STEPS), "force": tuple(FORCES), "contrast": ("auto", "same", "other")}


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """The arguments of `register`, whose docstring explains each field.

    Raises InputError for an unknown method, force or contrast.
    """

    fixed: Any
    moving: Any
    checkpoint: str | Path = SHIPPED
    method: str = "drivenmorph"
    force: str = "lncc"
    contrast: str = "auto"
    affine: Any = True
    refine_steps: int | None = None
    fixed_labels: Any = None
    moving_labels: Any = None
    fixed_mask: Any = None
    moving_mask: Any = None
    memory: float | None = None

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                *others, last = map(repr, choices)
                raise InputError(f"{name} is {getattr(self, name)!r}: set it to {', '.join(others)} or {last}")


@dataclass(frozen=True, eq=False, kw_only=True)
class Pair:
    """The two images as they are on disk, with their label maps and masks, and the network for method "drivenmorph"."""

    request: Request
    fixed: Volume
    moving: Volume
    fixed_labels: Volume | None
    moving_labels: Volume | None
    fixed_mask: Volume | None
    moving_mask: Volume | None
    given_affine: bool | np.ndarray  # True: find it; False: world coordinates agree; else (4, 4), RAS mm
    refine_steps: int
    network: tuple[Any, Any, dict] | None  # (config, params, about) of `network.inference.load_checkpoint`

    @property
    def masked(self):
        """Whether one of the images has a mask."""
        return self.fixed_mask is not None or self.moving_mask is not None


def read(request: Request) -> Pair:
    """Read the images, label maps, masks, affine and weights that the request names.

    Raises InputError for a file that cannot be used.
    """
    fixed, moving = load_image(request.fixed), load_image(request.moving)
    maps = {f"{role}_{kind}": None if (source := getattr(request, f"{role}_{kind}")) is None
            else load_labels(source, image)
            for kind in ("labels", "mask") for role, image in (("fixed", fixed), ("moving", moving))}
    affine = request.affine
    if isinstance(affine, PATHS):
        affine = read_affine(affine)
    elif not isinstance(affine, bool):
        affine = np.asarray(affine, float)
    steps = request.refine_steps
    return Pair(request=request, fixed=fixed, moving=moving, **maps, given_affine=affine,
                refine_steps=REFINE_STEPS[request.method] if steps is None else steps,
                network=load_checkpoint(request.checkpoint) if request.method == "drivenmorph" else None)


def kept(stage):
    """The fields of a stage's dataclass as keyword arguments for the dataclass of the next stage."""
    return {field.name: getattr(stage, field.name) for field in fields(stage)}
