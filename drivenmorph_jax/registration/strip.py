"""Stage 2: the brain of each image that shows a whole head."""

from dataclasses import dataclass, replace
from pathlib import Path

import nibabel
import numpy as np

from drivenmorph_jax.brain.extraction import extract, has_rim, tightened
from drivenmorph_jax.brain.parameters import Missing
from drivenmorph_jax.brain.recognition import is_head
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.evaluation import figures
from drivenmorph_jax.files import make_folder, names_apart, stem
from drivenmorph_jax.images import writing
from drivenmorph_jax.images.intensity import anchored
from drivenmorph_jax.images.reading import Source, load_image
from drivenmorph_jax.images.volume import Volume
from drivenmorph_jax.registration.read import Pair, kept, millilitres


@dataclass(frozen=True, eq=False, kw_only=True)
class Stripped(Pair):
    """A pair of brains: in an image that showed a whole head, what is not brain is 0."""

    fixed_head: Volume | None  # the whole head; None where the image showed a brain
    moving_head: Volume | None
    fixed_brain: Volume | None  # its mask, uint8, 1 in the brain
    moving_brain: Volume | None

    @property
    def heads(self):
        """What was done, in words, for each image that showed a whole head."""
        return [f"{role}: a whole head, brain of {millilitres(brain.data > 0, brain.affine) / self.scale ** 3:.0f} ml"
                for role, brain in (("fixed", self.fixed_brain), ("moving", self.moving_brain)) if brain is not None]


def strip(pair: Pair) -> Stripped:
    """Find the brain of each image, as `strip` of the request says: in whole heads, in both images, or in none.

    Where one image shows a head and the other a stripped brain, both brains end alike: if the stripped brain has no rim
    of fluid, that of the head is taken off, see `brain.extraction.tightened`.

    Raises InputError where an image shows no brain, or where the package that finds it is missing.
    """
    images, choice = {role: getattr(pair, role) for role in ("fixed", "moving")}, pair.request.strip
    heads = {role: image for role, image in images.items() if _to_strip(image, choice)}
    stripped = [image for role, image in images.items() if role not in heads]
    tight = len(heads) == 1 and not has_rim(stripped[0])
    return stripped_by(pair, {role: _brain(image, tight) for role, image in heads.items()})


def stripped_by(pair: Pair, brains) -> Stripped:
    """A pair and {role: mask of its brain} of the images that show whole heads."""
    roles = "fixed", "moving"
    found = {role: _within(getattr(pair, role), brain) for role, brain in brains.items()}
    return Stripped(**kept(pair) | found,
                    **{f"{role}_head": getattr(pair, role) if role in brains else None for role in roles},
                    **{f"{role}_brain": brains.get(role) for role in roles})


def brain_mask(image: Source, geometry: str = "sform") -> nibabel.Nifti1Image:
    """The brain in an image of a whole head: uint8 on the grid of the image, 1 in the brain.

    The networks of deepbet find it, and a rim of fluid is taken off, see `brain.extraction`. They were trained with T1
    images of people, and find the brain in most images of other contrast.

    Args:
      image: a file, a nibabel image, or an array with voxels of 1 mm.
      geometry: as in `images.geometry.placed`.

    Raises InputError where the image cannot be used or shows no brain, or where the package deepbet is missing.
    """
    volume = load_image(image, geometry)
    return mask_image(_brain(replace(volume, data=anchored(volume.data))))


def strip_files(images, out, geometry="sform"):
    """Strip files, as `drivenmorph strip` does. Yields the path of each stripped image, or the
    `InputError` of one of several images that cannot be used.

    For an image NAME.nii.gz, the folder `out` gets NAME_stripped.nii.gz, which is 0 outside the brain, the mask
    NAME_brain.nii.gz, and the picture NAME_brain.png.

    Raises InputError where two images have one name, or the only one cannot be used.
    """
    names = names_apart(images, out, stem)
    out = make_folder(out)
    for name, path in zip(names, images, strict=True):
        try:
            yield _strip_file(path, out, name, geometry)
        except InputError as error:
            if len(images) == 1:
                raise
            yield error


def _strip_file(path, out, name, geometry):
    volume = load_image(path, geometry)
    image = replace(volume, data=anchored(volume.data))
    brain = _brain(image)
    figures.outline(out / f"{name}_brain.png", image, brain, title=Path(path).name)
    stripped = _within(volume, brain).data
    writing.write(out / f"{name}_brain.nii.gz", mask_image(brain))
    writing.write(out / f"{name}_stripped.nii.gz",
                  writing.to_nibabel(stripped, volume, dtype=volume.header.get_data_dtype()))
    return out / f"{name}_stripped.nii.gz"


def brain_of(image, choice):
    """An image, anchored, with what is not brain set to 0, as `strip` of a request says; see there for the errors."""
    return _within(image, _brain(image)) if _to_strip(image, choice) else image


def _to_strip(image, choice):
    return choice == "yes" or choice == "auto" and is_head(image)


def _within(image, brain):
    """The image with 0 outside a mask of its brain."""
    return replace(image, data=np.where(brain.data > 0, image.data, 0))


def mask_image(brain):
    """The nibabel image of a mask, a Volume of uint8."""
    return writing.to_nibabel(brain.data, brain, dtype=np.dtype(np.uint8))


def _brain(image, tight=True):
    try:
        mask = extract(image)
    except Missing as error:
        raise InputError(f"{image.path} shows a whole head, and {error}; or give a skull-stripped image and --strip "
                         "no") from error
    return replace(image, data=(tightened(mask, image) if tight else mask).astype(np.uint8))
