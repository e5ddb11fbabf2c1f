"""Rigid, similarity and affine alignment of two volumes by mutual information, with SimpleITK."""

import itertools
from dataclasses import dataclass
from functools import partial

import numpy as np
import SimpleITK as sitk
from scipy import ndimage
from scipy.spatial.transform import Rotation

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.images.field_of_view import resample_known
from drivenmorph_jax.images.intensity import foreground, normalise
from drivenmorph_jax.images.volume import resample, smoothed
from drivenmorph_jax.images.working_grid import working_grid
from drivenmorph_jax.transforms.itk import FLIP, from_itk, to_itk

KINDS = {"rigid": sitk.VersorRigid3DTransform, "similarity": sitk.Similarity3DTransform, "affine": partial(sitk.AffineTransform, 3)}
SPACING = 2.0  # mm; twelve parameters need no finer images
FACTORS = 4, 2, 1  # of the levels: voxels of 8, 4 and 2 mm
BINS = 32  # with 50, the few voxels at 8 mm mislead the optimiser
SAMPLES = 50_000  # voxels that one evaluation of the metric uses
FEWER = 2_000  # for each of the many starts
AIR = 40.0  # mm of background around the moving image that the optimiser sees
SMALL_TURNS = -25.0, 0.0, 25.0  # about each axis, degrees
ALL_TURNS = 600  # rotations, evenly over all
APART = 25.0  # mm between two starts that are both optimised, root mean square over the image
TRIED, DECIDED = 6, 3  # starts that are optimised, and those of them that the next level decides between
PRIOR = 20.0  # mutual information that a squared spread of the scales' logarithms must bring in a thin image
LEAST = 0.25  # share of the tissue in one image that has to be known in the other


@dataclass(frozen=True, eq=False)
class _Level:
    """An image with voxels of one size."""

    image: sitk.Image  # in [0, 1]
    used: sitk.Image | None  # 1 at the voxels that count; None: all count

    def __post_init__(self):
        affine = np.eye(4)
        affine[:3, :3] = np.reshape(self.image.GetDirection(), (3, 3)) * self.image.GetSpacing()
        affine[:3, 3] = self.image.GetOrigin()
        put = object.__setattr__
        put(self, "affine", FLIP @ affine)  # voxel to RAS mm
        put(self, "data", sitk.GetArrayViewFromImage(self.image).T)
        put(self, "counts", None if self.used is None else sitk.GetArrayViewFromImage(self.used).T)


def register_affine(fixed, moving, fixed_mask=None, moving_mask=None, kind="affine"):
    """The transform T (4, 4) from the world of the fixed to the world of the moving Volume, in RAS mm.
    """
    f, m = _levels(fixed, fixed_mask), _levels(moving, moving_mask)
    swapped = _volume_cut(m) and (not _volume_cut(f) or _tissue(m[-1]) < _tissue(f[-1]))
    try:
        result = np.linalg.inv(_optimise(m, f, kind)) if swapped else _optimise(f, m, kind)
    except RuntimeError as error:  # ITK raises this where the images do not overlap
        raise _failure(fixed, moving) from error
    scales = np.linalg.svd(result[:3, :3], compute_uv=False)
    if not (np.isfinite(result).all() and 0.4 < scales.min() and scales.max() < 2.5):
        raise _failure(fixed, moving)
    return result


def _volume_cut(levels):
    return levels[-1].used is not None


def _tissue(level):
    return np.count_nonzero(level.data > 0.1)


def _optimise(fixed, moving, kind):
    """T (4, 4) of two lists of levels. Every decision is by the mutual information at one level."""
    first = "similarity" if kind == "affine" else kind
    starts = _starts(fixed[0], moving[0], kind != "rigid")
    tried = [_run(fixed[0], moving[0], start, first) for start in _different(fixed[0], moving[0], starts)]
    best = _ranked(fixed[1], moving[1], _ranked(fixed[0], moving[0], tried)[:DECIDED])[0]
    found = best
    for f, m in zip(fixed[1:], moving[1:], strict=True):
        found = _run(f, m, found, kind)
    found = _ranked(fixed[-1], moving[-1], [found, best, *starts[:2]])[0]
    thin = _thinness(fixed[-1]) if kind == "affine" else 0
    return _shrunk(found, _run(fixed[-1], moving[-1], best, first), thin, fixed[-1], moving[-1]) if thin else found


def _thinness(level):
    """How much less than a whole brain a cut image determines the scales: 0 (as much) to 1. Its tissue has the
    standard deviations s along its principal axes: 1 - min s / (.65 max s)."""
    if level.used is None:
        return 0.0
    spread = np.linalg.eigvalsh(np.cov(np.argwhere((level.data > 0.1) & (level.counts > 0.5)).T))
    return 1 - min(1.0, np.sqrt(spread[0] / spread[-1]) / 0.65)


def _shrunk(affine, similarity, thin, fixed, moving):
    """The transform between a similarity and an affine that the images support.

      similarity + w (affine - similarity),    w = g / (g + PRIOR thin a^2)

    g is the gain of mutual information by the affine, a the standard deviation of the logarithms of its scales.
    """
    less, more = _information(fixed, moving, [similarity, affine])
    gain, spread = max(more - less, 0.0), np.std(np.log(np.linalg.svd(affine[:3, :3], compute_uv=False)))
    return similarity + gain / (gain + PRIOR * thin * spread**2 + 1e-12) * (affine - similarity)


def _starts(fixed, moving, scaled):
    """The world's own alignment, that of the centres of mass, and turned ones of both: (N, 4, 4)."""
    (f, f_size), (m, m_size) = _moments(fixed), _moments(moving)
    whole = fixed.used is None and moving.used is None
    scale = np.clip(m_size / f_size, 0.5, 2) if scaled and whole else 1.0
    small = Rotation.from_euler("xyz", list(itertools.product(SMALL_TURNS, repeat=3)), degrees=True).as_matrix()
    world, mass = _about(f, f, small), _about(f, m, scale * np.concatenate([small, _rotations(ALL_TURNS)]))
    untouched = len(small) // 2
    return np.concatenate([world[[untouched]], mass[[untouched]], world, mass])


def _about(centre, to, linear):
    """Transforms (N, 4, 4) with linear parts (N, 3, 3) that map `centre` to `to`."""
    result = np.tile(np.eye(4), (len(linear), 1, 1))
    result[:, :3, :3] = linear
    result[:, :3, 3] = to - linear @ centre
    return result


def _rotations(n):
    """n rotations (n, 3, 3), spread evenly.

    Reference: Alexa, Super-Fibonacci spirals: fast, low-discrepancy sampling of SO(3), CVPR 2022.
    """
    s = np.arange(n) + 0.5
    r, big = np.sqrt(s / n), np.sqrt(1 - s / n)
    a, b = 2 * np.pi * s / np.sqrt(2), 2 * np.pi * s / 1.533751168755204288118041
    return Rotation.from_quat(np.stack([r * np.sin(a), r * np.cos(a), big * np.sin(b), big * np.cos(b)], 1)).as_matrix()


def _moments(level):
    """The centre of mass in RAS mm and the cube root of the mass."""
    data = np.clip(level.data, 0, None) * (1 if level.counts is None else level.counts > 0.5)
    centre = level.affine @ [*ndimage.center_of_mass(data), 1.0]
    return centre[:3], np.cbrt(data.sum())


def _different(fixed, moving, starts):
    """The best starts that are far from each other."""
    corners = np.array(list(itertools.product(*((0, n) for n in fixed.data.shape), (1,)))) @ fixed.affine.T
    kept = []
    for place in np.argsort(-_information(fixed, moving, starts, FEWER), kind="stable"):
        moved = corners @ starts[place].T
        if all(np.sqrt(np.mean(np.sum((moved - corners @ other.T) ** 2, 1))) > 2 * APART for other in kept):
            kept.append(starts[place])
        if len(kept) == TRIED:
            break
    return kept


def _ranked(fixed, moving, transforms):
    order = np.argsort(-_information(fixed, moving, transforms), kind="stable")
    return [transforms[k] for k in order]


def _information(fixed, moving, transforms, samples=SAMPLES):
    """The mutual information of two levels under transforms (N, 4, 4): (N,)."""
    count = np.ones(fixed.data.shape, bool) if fixed.counts is None else fixed.counts > 0.5
    places = np.argwhere(count)
    places = places[:: max(1, len(places) // samples)]
    values = fixed.data[tuple(places.T)]
    points = (np.concatenate([places, np.ones((len(places), 1))], 1) @ fixed.affine.T).T
    to_moving = np.linalg.inv(moving.affine)
    return np.array([_of_values(values, *_sampled(moving, to_moving @ transform @ points)) for transform in transforms])


def _sampled(level, x):
    """(values, whether they are known) at voxel coordinates x (4, N)."""
    values = ndimage.map_coordinates(level.data, x[:3], order=1, prefilter=False)
    if level.counts is None:
        return values, np.ones(len(values), bool)
    return values, ndimage.map_coordinates(level.counts, x[:3], order=0, mode="nearest", prefilter=False) > 0.5


def _of_values(f, m, known):
    seen = np.count_nonzero(known & (f > 0.1))
    if seen < LEAST * np.count_nonzero(f > 0.1):
        return 0.0
    a, b = (np.clip(v[known] * BINS, 0, BINS - 1).astype(int) for v in (f, m))
    joint = np.bincount(a * BINS + b, minlength=BINS * BINS).reshape(BINS, BINS) / len(a)
    apart = joint.sum(1, keepdims=True) * joint.sum(0)
    return np.sum(joint[joint > 0] * np.log(joint[joint > 0] / apart[joint > 0]))


def _run(fixed, moving, start, kind):
    """Optimise over a regular sample of the voxels. On coarse images the sample is every voxel."""
    method = sitk.ImageRegistrationMethod()
    method.SetNumberOfWorkUnits(1)  # with more, the order of the sums varies, and with it the result
    method.SetMetricAsMattesMutualInformation(BINS)
    method.SetInterpolator(sitk.sitkLinear)
    method.MetricUseFixedImageGradientFilterOff()
    method.MetricUseMovingImageGradientFilterOff()
    spacing, share = fixed.image.GetSpacing()[0], SAMPLES / fixed.image.GetNumberOfPixels()
    if share < 1:
        method.SetMetricSamplingStrategy(method.REGULAR)
        method.SetMetricSamplingPercentage(share, 1)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=spacing / 2, minStep=spacing / 200, numberOfIterations=100, relaxationFactor=0.6)
    method.SetOptimizerScalesFromPhysicalShift()
    pad = [round(AIR / spacing)] * 3
    if fixed.used is not None:
        method.SetMetricFixedMask(sitk.Cast(fixed.used > 0.5, sitk.sitkUInt8))
    if moving.used is not None:
        method.SetMetricMovingMask(sitk.ZeroFluxNeumannPad(sitk.Cast(moving.used > 0.5, sitk.sitkUInt8), pad, pad))
    transform = _as_kind(start, kind, fixed)
    method.SetInitialTransform(transform, inPlace=True)
    method.Execute(fixed.image, sitk.ConstantPad(moving.image, pad, pad))
    return from_itk(transform)


def _as_kind(start, kind, fixed):
    itk, given = KINDS[kind](), to_itk(start)
    centre = fixed.image.TransformContinuousIndexToPhysicalPoint([n / 2 for n in fixed.image.GetSize()])
    itk.SetCenter(centre)
    itk.SetMatrix(given.GetMatrix())
    itk.SetTranslation(np.subtract(given.TransformPoint(centre), centre).tolist())
    return itk


def metric_between(fixed, moving, transforms):
    """Mutual information of two Volumes at 4 mm under each of several affines (4, 4) in RAS mm; 0 without overlap."""
    return _information(_levels(fixed, None)[1], _levels(moving, None)[1], transforms).tolist()


def _levels(volume, mask):
    """A Volume, without what its mask leaves out, at 8, 4 and 2 mm."""
    shape, affine = working_grid(volume, SPACING, multiple=1)
    data, used = resample_known(smoothed(volume, SPACING), shape, affine)
    if mask is not None:
        out = resample(mask, shape, affine, order=0) > 0
        data = np.where(out, np.median(data[~out & foreground(data)]), data)
        used = ~out if used is None else used & ~out
    pair = _to_itk(normalise(data), affine), None if used is None else _to_itk(used.astype(np.float32), affine)
    return [_Level(*(x and _coarser(x, k) for x in pair)) for k in FACTORS]


def _coarser(image, k):
    # sitk.Shrink by an even factor may displace the image by half a voxel.
    return image if k == 1 else sitk.SmoothingRecursiveGaussian(image, SPACING * k / 2)[::k, ::k, ::k]


def _to_itk(data, affine):
    lps = FLIP @ affine
    image = sitk.GetImageFromArray(data.transpose(2, 1, 0))
    image.SetSpacing([SPACING] * 3)
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / SPACING).ravel().tolist())
    return image


def _failure(fixed, moving):
    return InputError(f"{moving.path} could not be aligned to {fixed.path} by an affine; align it beforehand "
                      "and give --affine none")
