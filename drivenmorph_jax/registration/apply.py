"""Application of a saved transform to files: images, label maps, series and points."""

from dataclasses import replace
from pathlib import Path

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.files import IMAGE_ENDINGS, check_apart, make_folder, names_apart, replacing
from drivenmorph_jax.images import writing
from drivenmorph_jax.images.geometry import checked
from drivenmorph_jax.images.reading import PATHS, load_grid
from drivenmorph_jax.transforms.points import move_table
from drivenmorph_jax.transforms.reading import BACK, read_chain
from drivenmorph_jax.transforms.transform import Transform


def apply_files(transform, out, images=None, points=None, interpolation="linear", inverse=False, reference=None,
                geometry="sform", convention=None, source=None):
    """Move files by a transform, as `drivenmorph apply` does. Yields each path that it wrote, or the
    `InputError` of one of several images that cannot be used.

    Args:
      transform: a file of a transform, or several, as `Transform.load` takes them.
      out: a file for one image or for the points; a folder for several images, which keep their names.
      images: files to resample; or points: a table that `transforms.points.move_table` takes.
      interpolation: as in `Transform.apply`.
      inverse: use the inverse transform. It lies on the grid of the other image, which the sidecar describes; where it
        does not, on the grid of `reference`.
      reference: image or series on whose grid the results lie. Its voxels are not read.
      geometry: of all these files, as in `images.geometry.placed`.
      convention: of a transform that does not tell it, as in `Transform.load`.
      source: image of the space that `images` come from. Its grid is needed for transforms of FSL. By default it is
        the first of `images`.

    Raises InputError where a file cannot be used or written.
    """
    checked(geometry)
    if len(images or ()) > 1:
        if str(out).lower().endswith(IMAGE_ENDINGS):
            raise InputError(f"{out} is the name of an image, and several images need a folder: give one as --out")
        places = [Path(out) / name for name in names_apart(images, out, lambda path: Path(path).name)]
    else:
        places = [Path(out)]
    transforms = [transform] if isinstance(transform, PATHS) else transform
    inputs = (*(str(path).removesuffix(BACK) for path in transforms), *(images or ()), points, reference, source)
    check_apart([path for path in inputs if isinstance(path, PATHS)], places)
    source = source or (images[0] if images else None)  # opened for transforms of FSL only
    reference = None if reference is None else load_grid(reference, geometry)
    fixed, moving = (source, reference) if inverse else (reference, source)
    if points is not None:
        way = read_chain(transform, geometry, convention, fixed, moving).map
        with replacing(out) as temporary:
            move_table(points, temporary, way.inverse if inverse else way)
        yield out
        return
    found = Transform.load(transform, geometry, convention, fixed, moving)
    if inverse:
        if reference and not found.other:
            found, reference = replace(found, other=reference), None  # it need not be sampled there once more
        found = found.inverse
    if len(images) > 1:
        make_folder(out)
    for image, place in zip(images, places, strict=True):
        try:
            writing.write(place, found.apply(image, interpolation, reference, geometry))
        except InputError as error:
            if len(images) == 1:
                raise
            yield error
        else:
            yield place
