"""Affine alignment of two volumes by mutual information, with SimpleITK."""

import itertools

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.images.intensity import foreground, normalise
from drivenmorph_jax.images.volume import resample, smoothed
from drivenmorph_jax.images.working_grid import working_grid
from drivenmorph_jax.transforms.itk import FLIP, from_itk, to_itk

SPACING = 2.0  # mm; twelve parameters need no finer images
TURNS = (-25.0, 0.0, 25.0)  # starting angles about each axis, degrees
SAMPLES = 100_000  # voxels that one evaluation of the metric uses
TRIED = 4  # how many of the 27 starts are optimised


def register_affine(fixed, moving, fixed_mask=None, moving_mask=None):
    """The affine T (4, 4) from the world of the fixed to the world of the moving Volume, in RAS mm.

      moving(T x) ~ fixed(x)

    T maximises Mattes mutual information at 2 mm. The centres of mass are aligned first. Then 27 rotations about them
    are tried at 8 mm, the best four are optimised as similarities, and the best of these is optimised as an affine at
    8, 4 and 2 mm. The same input gives the same T on any number of cores.

    Args:
      fixed, moving: the Volumes.
      fixed_mask, moving_mask: Volumes on the grids of their images, or None. Voxels where a mask is above 0 are left
        out.

    Raises InputError where no overlap of the volumes is found.

    Reference: Mattes et al., PET-CT image registration in the chest using free-form deformations, 2003.
    """
    (*f, f_centre), (*m, m_centre) = _image(fixed, fixed_mask), _image(moving, moving_mask)
    try:
        result = _optimise(f, m, f_centre, m_centre)
    except RuntimeError as error:  # ITK raises this where the images do not overlap
        raise _failure(fixed, moving) from error
    scales = np.linalg.svd(result[:3, :3], compute_uv=False)
    if not (np.isfinite(result).all() and 0.4 < scales.min() and scales.max() < 2.5):
        raise _failure(fixed, moving)
    return result


def _optimise(fixed, moving, fixed_centre, moving_centre):
    levels = list(zip(_pyramid(fixed), _pyramid(moving), strict=True))
    coarsest, finest = levels[0], levels[-1]
    starts = [_start(angles, fixed_centre, moving_centre) for angles in itertools.product(TURNS, repeat=3)]
    starts.sort(key=lambda start: _metric(*coarsest, start))
    tried = starts[:TRIED]
    for start in tried:
        _run(*coarsest, start)
    similarity = min(tried, key=lambda start: _metric(*coarsest, start))

    affine = sitk.AffineTransform(3)
    affine.SetCenter(similarity.GetCenter())
    affine.SetMatrix(similarity.GetMatrix())
    affine.SetTranslation(similarity.GetTranslation())
    for level in levels:
        _run(*level, affine)

    untouched = _start((0.0, 0.0, 0.0), fixed_centre, moving_centre)
    best = min((affine, untouched), key=lambda transform: _metric(*finest, transform))
    return from_itk(best)


def _start(angles, fixed_centre, moving_centre):
    shift = (moving_centre - fixed_centre).tolist()
    rigid = sitk.Euler3DTransform(fixed_centre.tolist(), *np.deg2rad(angles).tolist(), shift)
    start = sitk.Similarity3DTransform()
    start.SetCenter(rigid.GetCenter())
    start.SetMatrix(rigid.GetMatrix())
    start.SetTranslation(rigid.GetTranslation())
    return start


def _run(fixed, moving, transform):
    """Optimise `transform` in place over a regular sample of the voxels. On coarse images the sample is every voxel."""
    method = _method(fixed, moving)
    if fixed[0].GetNumberOfPixels() > SAMPLES:
        method.SetMetricSamplingStrategy(method.REGULAR)
        method.SetMetricSamplingPercentage(SAMPLES / fixed[0].GetNumberOfPixels(), 1)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=SPACING / 2, minStep=1e-2, numberOfIterations=100, relaxationFactor=0.6)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetInitialTransform(transform, inPlace=True)
    method.Execute(fixed[0], moving[0])


def _metric(fixed, moving, transform):
    """Minus the mutual information, over every voxel."""
    method = _method(fixed, moving)
    method.SetInitialTransform(transform)
    return method.MetricEvaluate(fixed[0], moving[0])


def metric_between(fixed, moving, transforms):
    """Mutual information of two Volumes at 4 mm under each of several affines (4, 4) in RAS mm; 0 without overlap."""
    sides = [_pyramid((image, used))[1] for image, used, _ in (_image(fixed, None), _image(moving, None))]

    def information(transform):
        try:
            return -_metric(*sides, to_itk(transform))
        except RuntimeError:
            return 0.0

    return [information(transform) for transform in transforms]


def _method(fixed, moving):
    method = sitk.ImageRegistrationMethod()
    for (_, used), use in ((fixed, method.SetMetricFixedMask), (moving, method.SetMetricMovingMask)):
        if used is not None:
            use(sitk.Cast(used > 0.5, sitk.sitkUInt8))
    method.SetNumberOfWorkUnits(1)  # with more, the order of the sums varies, and with it the result
    method.SetMetricAsMattesMutualInformation(32)  # with 50 bins, the few voxels at 8 mm mislead the optimiser
    method.SetInterpolator(sitk.sitkLinear)
    return method


def _pyramid(pair):
    """The pair (image, map of the voxels in use or None) at 8, 4 and 2 mm."""
    return [tuple(x and sitk.Shrink(sitk.SmoothingRecursiveGaussian(x, SPACING * factor / 2), [factor] * 3)
                  for x in pair) for factor in (4, 2)] + [pair]


def _image(volume, mask):
    """A Volume as `_optimise` needs it.

    Returns:
      The foreground as a SimpleITK image at 2 mm, in [0, 1]; an image that is 1 at the voxels in use, or None where all
      are; the centre of mass in LPS mm.
    """
    shape, affine = working_grid(volume, SPACING, multiple=1)
    data = resample(smoothed(volume, SPACING), shape, affine)
    used = None
    if mask is not None:
        out = resample(mask, shape, affine, order=0) > 0
        data = np.where(out, np.median(data[~out & foreground(data)]), data)
        used = _to_itk((~out).astype(np.float32), affine)
    data = normalise(data)
    centre = affine @ [*ndimage.center_of_mass(data), 1.0]
    return _to_itk(data, affine), used, (FLIP @ centre)[:3]


def _to_itk(data, affine):
    lps = FLIP @ affine
    image = sitk.GetImageFromArray(data.transpose(2, 1, 0))
    image.SetSpacing([SPACING] * 3)
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / SPACING).ravel().tolist())
    return image


def _failure(fixed, moving):
    return InputError(f"{moving.path} could not be aligned to {fixed.path} by an affine; align it beforehand "
                      "and give --no-affine")
