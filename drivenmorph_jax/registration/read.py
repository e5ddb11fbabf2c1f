"""Stage 1: the request is checked, and the images are read."""

from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from drivenmorph_jax.demons import FORCES
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.files import checksum
from drivenmorph_jax.images.geometry import checked
from drivenmorph_jax.images.intensity import anchored, foreground
from drivenmorph_jax.images.reading import PATHS, load_image, load_labels, load_mask
from drivenmorph_jax.images.volume import Volume
from drivenmorph_jax.network.inference import load_checkpoint
from drivenmorph_jax.runtime.checkpoint import SHIPPED
from drivenmorph_jax.transforms.affine import KINDS
from drivenmorph_jax.transforms.itk import read_affine
from drivenmorph_jax.transforms.maps import Chain, Field
from drivenmorph_jax.transforms.points import Landmarks, read_landmarks
from drivenmorph_jax.transforms.reading import BACK, read_chain
from drivenmorph_jax.transforms.world import map_points

REFINE_STEPS = {"drivenmorph": 5, "demons": 0}
CHOICES = {"strip": ("auto", "yes", "no"), "method": tuple(REFINE_STEPS), "force": tuple(FORCES),
           "contrast": ("auto", "same", "other"), "stiffness": ("auto", "low", "high"),
           "mask_sense": ("ignore", "use")}
FILES = ("fixed", "moving", "fixed_labels", "moving_labels", "fixed_mask", "moving_mask", "initial_transform",
         "landmarks")
AFFINES = *KINDS, "none"  # none: the world coordinates agree
SIZES = 100, 20_000  # ml; outside, lengths are scaled
TYPICAL = 1300  # ml
MOST_MASKED = 0.5  # share of an image's foreground that may be ignored


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """The arguments of `register`, whose docstring explains each field.

    Raises InputError for an unknown method, force or contrast, and for extra channels or pairs of labels that cannot be
    used.
    """

    fixed: Any
    moving: Any
    strip: str = "auto"
    checkpoint: str | Path = SHIPPED
    method: str = "drivenmorph"
    force: str = "lncc"
    contrast: str = "auto"
    stiffness: str = "auto"
    affine: Any = True
    initial_transform: Any = None
    convention: str | None = None
    refine_steps: int | None = None
    fixed_labels: Any = None
    moving_labels: Any = None
    fixed_mask: Any = None
    moving_mask: Any = None
    mask_sense: str = "ignore"
    landmarks: Any = None
    extra_fixed: Any = ()
    extra_moving: Any = ()
    guide_labels: Any = None
    geometry: str = "sform"
    memory: float | None = None

    def __post_init__(self):
        checked(self.geometry)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                *others, last = map(repr, choices)
                raise InputError(f"{name} is {getattr(self, name)!r}: set it to {', '.join(others)} or {last}")
        steps, memory = self.refine_steps, self.memory
        if steps is not None and (not isinstance(steps, Integral) or steps < 0):
            raise InputError(f"refine_steps is {steps!r}: set it to a whole number, 0 or more")
        if memory is not None and (not isinstance(memory, Real) or memory <= 0):
            raise InputError(f"memory is {memory!r}: set it to a number of bytes, such as 4e9")
        if self.affine is None:
            raise InputError(f"affine is None: set it to {', '.join(map(repr, AFFINES))}, a file or a matrix (4, 4)")
        self.label_pairs  # noqa: B018 refused now
        if len(self.extra["fixed"]) != len(self.extra["moving"]):
            raise InputError(f"extra_fixed has {len(self.extra['fixed'])} images and extra_moving "
                             f"{len(self.extra['moving'])}: give the same number of both, in the same order")
        if self.extra["fixed"] and self.method == "drivenmorph" and self.refine_steps == 0:
            raise InputError("extra_fixed and extra_moving drive the refinement, and refine_steps is 0: leave it out, "
                             "or set method to 'demons'")

    @property
    def label_pairs(self):
        """The pairs of labels of `guide_labels`, see `label_pairs`."""
        return label_pairs(self.guide_labels)

    @property
    def extra(self):
        """{"fixed": the sources of its extra channels, "moving": the same}."""
        found = {role: getattr(self, f"extra_{role}") for role in ("fixed", "moving")}
        return {role: tuple(some) if isinstance(some, (list, tuple)) else () if some is None else (some,)
                for role, some in found.items()}


@dataclass(frozen=True, eq=False, kw_only=True)
class Pair:
    """The two images on their own grids, their label maps and masks, and the network for method "drivenmorph".

    The background of the images is 0 and their tissue is above, see `images.intensity.anchored`. Lengths in the world
    are those of the files times `scale`, so that grids, margins and widths in mm suit the brain of a mouse, too.
    """

    request: Request
    fixed: Volume
    moving: Volume
    source: Volume  # the moving image with the intensities of its file, which the result has too
    scale: float
    fixed_labels: Volume | None
    moving_labels: Volume | None
    fixed_mask: Volume | None
    moving_mask: Volume | None
    extra: tuple[tuple[Volume, Volume], ...]  # further channels of the fixed and of the moving image, on any grids
    given_affine: str | np.ndarray  # what to find, of AFFINES; or (4, 4), RAS mm
    start: Chain | Field | None  # a deformable transform to start from, in the lengths of the files
    landmarks: Landmarks | None  # in the lengths of the files
    refine_steps: int
    network: tuple[Any, Any, dict] | None  # (config, params, about) of `network.inference.load_checkpoint`
    inputs: dict  # see `inputs_of`

    @property
    def masked(self):
        """Whether one of the images has a mask."""
        return self.fixed_mask is not None or self.moving_mask is not None


def read(request: Request) -> Pair:
    """Read the images, label maps, masks, affine and weights that the request names.

    Raises InputError for a file that cannot be used.
    """
    sources = {role: load_image(getattr(request, role), request.geometry) for role in ("fixed", "moving")}
    images = {role: replace(image, data=anchored(image.data)) for role, image in sources.items()}
    maps = {f"{role}_labels": None if (labels := getattr(request, f"{role}_labels")) is None
            else load_labels(labels, image, request.geometry) for role, image in images.items()}
    maps |= {f"{role}_mask": None if (mask := getattr(request, f"{role}_mask")) is None
             else _ignored(mask, image, request) for role, image in images.items()}
    extra = tuple(zip(*([load_image(source, request.geometry) for source in some] for some in request.extra.values()),
                      strict=True))
    check_labels(request.label_pairs, maps)
    affine, start = _initial(request, images) if request.initial_transform is not None else (request.affine, None)
    if isinstance(affine, bool):
        affine = "affine" if affine else "none"
    elif isinstance(affine, PATHS):
        affine = affine if affine in AFFINES else read_affine(affine)
    else:
        affine = np.asarray(affine, float)
    fixed = images["fixed"]
    scale, steps = scale_of(millilitres(foreground(fixed.data), fixed.affine)), request.refine_steps
    volumes = {name: volume and scaled(volume, scale) for name, volume in (images | maps).items()}
    return Pair(request=request, **volumes, source=scaled(sources["moving"], scale), scale=scale,
                extra=tuple(tuple(scaled(replace(x, data=anchored(x.data)), scale) for x in both) for both in extra),
                given_affine=affine if isinstance(affine, str) else scaled_transform(affine, scale), start=start,
                landmarks=None if request.landmarks is None else _landmarks(request.landmarks, sources),
                refine_steps=REFINE_STEPS[request.method] if steps is None else steps,
                network=load_checkpoint(request.checkpoint) if request.method == "drivenmorph" else None,
                inputs=inputs_of(request))


def inputs_of(request):
    """{role: [{"path", "crc32"} of each file]} of the files of a request, by which a change of theirs is found.

    What is no file, such as an array, has neither.
    """
    found = {}
    for role in FILES:
        given = getattr(request, role)
        if given is not None:
            files = given if isinstance(given, (list, tuple)) else [given]
            found[role] = [{"path": str(file), "crc32": checksum(str(file).removesuffix(BACK))}
                           if isinstance(file, PATHS) else {"path": None, "crc32": None} for file in files]
    return found


def _initial(request, images):
    """(the affine part (4, 4) of the transform to start from; the whole of it, or None where it is an affine)."""
    found = read_chain(request.initial_transform, request.geometry, request.convention, images["fixed"],
                       images["moving"])
    return found.linear, None if found.is_affine else found.map


def _landmarks(source, images):
    """The landmarks of a request. Raises InputError where one lies outside its image, as points in LPS do."""
    return within(read_landmarks(source), images, f"{source}: " if isinstance(source, PATHS) else "")


def within(landmarks, images, file=""):
    """The landmarks, where each point lies in its image of {"fixed": Volume, "moving": Volume}. Else it raises
    InputError, whose sentence begins with `file`."""
    for role, image in images.items():
        to_voxel = np.linalg.inv(image.affine)
        lines = [(f"{curve.name}, a curve,", point) for curve in landmarks.curves for point in getattr(curve, role)]
        for name, point in (*zip(landmarks.names, getattr(landmarks, role), strict=True), *lines):
            voxel = map_points(to_voxel, point)
            if ((voxel < -0.5) | (voxel > np.array(image.data.shape) - 0.5)).any():
                raise InputError(f"{file}the {role} point of landmark {name} lies outside {image.path}; give points in "
                                 "RAS mm, or delete it")
    return landmarks


def label_pairs(given):
    """The pairs (label of the fixed image, label of the moving image) of texts such as 17, or 10=49.

    Raises InputError where these are no labels, or one label of an image is in two pairs.
    """
    found = []
    if given is not None and not isinstance(given, (list, tuple)):
        raise InputError(f"guide_labels is {given!r}: give a list of labels, such as [17, '10=49']")
    for text in map(str, given or ()):
        numbers = [int(part) if part.isdecimal() else 0 for part in text.split("=")]
        if len(numbers) > 2 or min(numbers) < 1:
            raise InputError(f"guide_labels has {text!r}: give labels above 0 such as 17, or 10=49 where label 10 of "
                             "the fixed image is 49 in the moving one")
        found.append((numbers[0], numbers[-1]))
    for name, numbers in zip(("fixed", "moving"), zip(*found, strict=True), strict=False):
        if repeated := [number for number in numbers if numbers.count(number) > 1]:
            raise InputError(f"the pairs of labels name label {repeated[0]} of the {name} image twice: name each once")
    return tuple(found)


def check_labels(pairs, maps):
    """Raises InputError where a pair has a label that its map lacks, or a map is None; `maps` are {"fixed_labels",
    "moving_labels": Volume}."""
    for k, role in enumerate(("fixed", "moving")):
        for pair in pairs:
            if (labels := maps[f"{role}_labels"]) is None:
                raise InputError(f"pairs of labels need the label maps of both images: give {role}_labels to register, "
                                 "too")
            if not (labels.data == pair[k]).any():
                raise InputError(f"{labels.path} has no label {pair[k]}, which a pair of labels names: give one that "
                                 "it has")


def _ignored(source, image, request):
    """The mask of an image as a Volume that is above 0 where the image is to be ignored; None where it is nowhere.

    Raises InputError where most of the image would be ignored: the mask is meant in the other sense.
    """
    mask, tissue = load_mask(source, image, request.geometry), foreground(image.data)
    if mask is None:
        return None
    if request.mask_sense == "use":
        mask = replace(mask, data=(tissue & (mask.data == 0)).astype(mask.data.dtype))
    share = np.mean(mask.data[tissue] > 0)
    if share > MOST_MASKED:
        means, other = {"ignore": ("is above 0 where the image is to be ignored", "use"),
                        "use": ("is above 0 where the image is to be used", "ignore")}[request.mask_sense]
        raise InputError(f"{mask.path} leaves out {share:.0%} of the brain in {image.path}: such a mask {means}; for "
                         f"the other sense give --mask_sense {other}")
    return mask if mask.data.any() else None


def millilitres(inside, affine):
    """The volume in ml of the voxels `inside` (bool) of a grid with an affine (4, 4) in mm."""
    return np.count_nonzero(inside) * abs(np.linalg.det(affine[:3, :3])) / 1e3


def scale_of(volume):
    """The factor for all lengths, from the volume of a foreground in ml: 1 for brains of people and large animals and
    for heads, else to a person's size."""
    return 1.0 if SIZES[0] < volume < SIZES[1] else float(f"{(TYPICAL / volume) ** (1 / 3):.2g}")


def scaled(volume, scale):
    """A Volume whose world coordinates are multiplied by `scale`."""
    return volume if scale == 1 else replace(volume, affine=scaled_grid(volume.affine, scale))


def scaled_grid(affine, scale):
    """The affine (4, 4) of a grid, from voxels to a world whose coordinates are multiplied by `scale`."""
    return np.diag([scale, scale, scale, 1]) @ affine


def scaled_transform(matrix, scale):
    """The affine transform (4, 4) in a world whose coordinates are multiplied by `scale`."""
    matrix = np.array(matrix, float)
    matrix[:3, 3] *= scale
    return matrix


def kept(stage):
    """The fields of a stage's dataclass as keyword arguments for the dataclass of the next stage."""
    return {field.name: getattr(stage, field.name) for field in fields(stage)}
