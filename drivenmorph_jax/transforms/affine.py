"""Rigid, similarity and affine alignment of two volumes by mutual information, with SimpleITK."""

import itertools
from functools import partial

import numpy as np
import SimpleITK as sitk
from scipy import linalg, ndimage
from scipy.spatial.transform import Rotation

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.images.field_of_view import resample_known
from drivenmorph_jax.images.intensity import foreground, normalise
from drivenmorph_jax.images.volume import resample, smoothed
from drivenmorph_jax.images.working_grid import working_grid
from drivenmorph_jax.transforms.itk import FLIP, from_itk, to_itk

KINDS = {"affine": partial(sitk.AffineTransform, 3), "similarity": sitk.Similarity3DTransform,
         "rigid": sitk.VersorRigid3DTransform}
SPACING = 2.0  # mm; twelve parameters need no finer images
FACTORS = 4, 2, 1  # of the levels: voxels of 8, 4 and 2 mm
BINS = 32  # with 50, the few voxels at 8 mm mislead the optimiser
TISSUE = 0.1  # from this intensity on
SAMPLES, FEWER = 30_000, 2_000  # voxels that one evaluation of the metric uses; for each of the many starts
AIR = 40.0  # mm of background around the moving image that the optimiser sees
SMALL_TURNS = -25.0, 0.0, 25.0  # about each axis, degrees
ALL_TURNS = 600  # rotations, spread evenly over all
APART = 50.0  # mm between two starts that are both optimised, root mean square over the corners of the image
TRIED, DECIDED = 6, 3  # starts that are optimised, and those of them that the next level decides between
LEAST = 0.25  # share of the smaller image's tissue that both images must know
THIN = 0.65  # ratio of the least to the largest extent from which tissue determines all scales; a brain's is larger
PRIOR = 20.0  # mutual information that a squared spread of the logarithms of the scales must bring in a thin image


def register_affine(fixed, moving, fixed_mask=None, moving_mask=None, kind="affine"):
    """The affine T (4, 4) from the world of the fixed to the world of the moving Volume, in RAS mm.

      moving(T x) ~ fixed(x)

    T maximises mutual information at 2 mm. Starts are the world coordinates of the files and the centres of mass, each
    turned by 25 degrees about the axes, and the centres of mass with 600 rotations. The six best at 8 mm that are far
    from each other are optimised as similarities. The best of these at 4 mm is optimised as an affine at 4 mm and, in
    both directions, at 2 mm. The result is the mean of the two directions, unless a start is better.

    Voxels that one of the images does not know, see `images.field_of_view`, do not count. Starts are compared by voxels
    of the image that knows less, so that these are the same for all. In a slab, anisotropic scales need the more mutual
    information, see `_shrunk`. The same input gives the same T on any number of cores.

    Args:
      fixed, moving: the Volumes.
      fixed_mask, moving_mask: Volumes on the grids of their images, or None. Voxels where a mask is above 0 are left
        out.
      kind: "affine", "similarity" (rotation, translation and one scale) or "rigid" (rotation and translation).

    Raises InputError where no overlap of the volumes is found.

    Reference: Mattes et al., PET-CT image registration in the chest using free-form deformations, 2003.
    """
    f, m = _levels(fixed, fixed_mask), _levels(moving, moving_mask)
    swapped = m[-1].used is not None and (f[-1].used is None or m[-1].tissue().sum() < f[-1].tissue().sum())
    try:
        result = np.linalg.inv(_optimise(m, f, kind)) if swapped else _optimise(f, m, kind)
    except RuntimeError as error:  # ITK raises this where the images do not overlap
        raise _failure(fixed, moving) from error
    scales = np.linalg.svd(result[:3, :3], compute_uv=False)
    if not (np.isfinite(result).all() and 0.4 < scales.min() and scales.max() < 2.5):
        raise _failure(fixed, moving)
    return result


def centred(transforms, iterations=20):
    """Affines T_i M, where M is the affine from their mean world to the world in which the T_i start.

      mean over i of log(T_i M) = 0,    found by M <- M exp(-mean of log(T_i M))

    Args:
      transforms: T (N, 4, 4), from one world to N worlds, in RAS mm.

    Returns:
      T M (N, 4, 4), from the mean world to the N worlds.

    Raises InputError where one of them is a reflection or a half turn against the others, which has no logarithm.

    Reference: Arsigny, Commowick, Ayache, Pennec, "A fast and log-Euclidean polyaffine framework for locally linear
      registration", 2009.
    """
    transforms = np.asarray(transforms, float)
    for _ in range(iterations):
        logs = np.array([linalg.logm(one) for one in transforms])
        if not np.isfinite(logs).all() or np.abs(np.imag(logs)).max() > 1e-6:
            raise InputError("the images are turned against each other by 180 degrees: turn them alike beforehand")
        mean = np.real(logs).mean(0)
        mean[3] = 0
        transforms = transforms @ linalg.expm(-mean)
        if np.abs(mean).max() < 1e-9:
            break
    return transforms


class _Level:
    """An image at one voxel size.

    Attributes:
      image: for SimpleITK, in [0, 1].
      used: 1 at the voxels that count; None where all do.
      data, counts: the same as arrays (X, Y, Z); `counts` is bool or None.
      affine: (4, 4), voxel to RAS mm.
    """

    def __init__(self, image, used):
        self.image, self.used = image, used if used is None else sitk.Cast(used > 0.5, sitk.sitkUInt8)
        self.data, self.counts = (None if x is None else sitk.GetArrayFromImage(x).T for x in (self.image, self.used))
        lps = np.eye(4)
        lps[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
        lps[:3, 3] = image.GetOrigin()
        self.affine = FLIP @ lps

    def tissue(self):
        """The voxels of tissue that count: (X, Y, Z) bool."""
        tissue = self.data > TISSUE
        return tissue if self.counts is None else tissue & (self.counts > 0)


def _optimise(fixed, moving, kind):
    """T (4, 4) between the levels of two images. Every decision is by mutual information at one level."""
    first = "similarity" if kind == "affine" else kind
    starts = _starts(fixed[0], moving[0], kind != "rigid")
    tried = [_run(fixed[0], moving[0], start, first) for start in _different(fixed[0], moving[0], starts)]
    best = _ranked(fixed[1], moving[1], _ranked(fixed[0], moving[0], tried)[:DECIDED])[0]
    f, m = fixed[-1], moving[-1]
    found = _both_ways(f, m, _run(fixed[1], moving[1], best, kind), kind)
    thin = _thinness(f) if kind == "affine" else 0.0
    if thin:
        found = _shrunk(_both_ways(f, m, best, first), found, thin, f, m)
    last = np.stack([found, best, *starts[:2]])
    return last[np.argmax(_symmetric(f, m, last))]


def _both_ways(fixed, moving, start, kind):
    """The mean of the transforms that are optimised from fixed to moving and from moving to fixed.

      A exp(log(A^-1 B) / 2)

    Mutual information grows with the tissue that the sampled region shows, so that either of them is off by 1 to 2 % in
    its scale. The mean is of the same kind as both.
    """
    there = _run(fixed, moving, start, kind)
    back = np.linalg.inv(_run(moving, fixed, np.linalg.inv(start), kind))
    middle = there @ linalg.expm(np.real(linalg.logm(np.linalg.inv(there) @ back)) / 2)
    middle[3] = 0, 0, 0, 1  # up to rounding it was
    return middle


def _symmetric(fixed, moving, transforms):
    """The mean of the mutual information sampled in either image: (N,)."""
    return (_information(fixed, moving, transforms) + _information(moving, fixed, np.linalg.inv(transforms))) / 2


def _thinness(level):
    """How much less than a whole brain a cut image says about the scales, from 0 (as much) to 1.

      max(0, 1 - least / largest / THIN)    of the standard deviations of its tissue along the principal axes
    """
    if level.used is None:
        return 0.0
    spread = np.sqrt(np.linalg.eigvalsh(np.cov(np.argwhere(level.tissue()).T)))
    return max(0.0, 1 - spread[0] / spread[-1] / THIN)


def _shrunk(similarity, affine, thin, fixed, moving):
    """The transform between a similarity and an affine that a thin image supports.

      similarity + g / (g + PRIOR thin a^2) (affine - similarity)

    g is the gain of mutual information by the affine, a the standard deviation of the logarithms of its scales. This
    maximises g (1 - (1 - w)^2) - PRIOR thin (w a)^2 over the weight w of the affine.
    """
    less, more = _symmetric(fixed, moving, np.stack([similarity, affine]))
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
    """The centre of mass in RAS mm, and the cube root of the mass."""
    mass = level.data * level.tissue()
    return (level.affine @ [*ndimage.center_of_mass(mass), 1.0])[:3], np.cbrt(mass.sum())


def _different(fixed, moving, starts):
    """The best starts, at most TRIED, that are APART from each other. Raises RuntimeError where no start overlaps."""
    corners = np.array(list(itertools.product(*((0, n - 1) for n in fixed.data.shape), (1,)))) @ fixed.affine.T
    information, kept = _information(fixed, moving, starts, FEWER), []
    for place in np.argsort(-information, kind="stable")[:np.count_nonzero(information > 0)]:
        apart = [np.sqrt(np.mean(np.sum((corners @ (starts[place] - other).T) ** 2, 1))) for other in kept]
        if min(apart, default=np.inf) > APART and len(kept) < TRIED:
            kept.append(starts[place])
    if not kept:
        raise RuntimeError("no start overlaps")
    return kept


def _ranked(fixed, moving, transforms):
    """The transforms, the best first."""
    return [transforms[k] for k in np.argsort(-_information(fixed, moving, transforms), kind="stable")]


def _information(fixed, moving, transforms, samples=SAMPLES):
    """The mutual information of two levels under transforms (N, 4, 4): (N,). It is 0 where tissue of the fixed image
    hardly overlaps what is known of the moving one."""
    places = np.argwhere(np.ones(fixed.data.shape, bool) if fixed.counts is None else fixed.counts)
    places = places[::max(1, len(places) // samples)]
    values = fixed.data[tuple(places.T)]
    points = fixed.affine @ np.concatenate([places.T, np.ones((1, len(places)))])
    to_moving = np.linalg.inv(moving.affine)
    sizes = [np.count_nonzero(x.tissue()) * abs(np.linalg.det(x.affine)) for x in (fixed, moving)]
    least = LEAST * min(1.0, sizes[1] / sizes[0]) * np.count_nonzero(values > TISSUE)

    def information(transform):
        x = (to_moving @ transform @ points)[:3]
        f, m = values, ndimage.map_coordinates(moving.data, x, order=1, prefilter=False)
        if moving.counts is not None:
            known = ndimage.map_coordinates(moving.counts, x, order=0, mode="nearest", prefilter=False) > 0
            f, m = f[known], m[known]
        if np.count_nonzero(f > TISSUE) < least:
            return 0.0
        of_fixed, of_moving = (np.clip(x * BINS, 0, BINS - 1).astype(int) for x in (f, m))
        joint = np.bincount(of_fixed * BINS + of_moving, minlength=BINS**2).reshape(BINS, BINS) / len(f)
        there, alone = joint > 0, joint.sum(1, keepdims=True) * joint.sum(0)
        return max(0.0, round(float(np.sum(joint[there] * np.log(joint[there] / alone[there]))), 9))  # 0 without tissue

    return np.array([information(transform) for transform in transforms])


def _run(fixed, moving, start, kind):
    """The transform of a kind, optimised from `start` (4, 4) by Mattes mutual information; `start` where that fails.

    It uses a regular sample of the voxels. On coarse images the sample is every voxel.
    """
    method, spacing = sitk.ImageRegistrationMethod(), fixed.image.GetSpacing()[0]
    method.SetNumberOfWorkUnits(1)  # with more, the order of the sums varies, and with it the result
    method.SetMetricAsMattesMutualInformation(BINS)
    method.SetInterpolator(sitk.sitkLinear)
    method.MetricUseFixedImageGradientFilterOff()  # the gradient is that of the interpolated image
    method.MetricUseMovingImageGradientFilterOff()
    share = SAMPLES / fixed.image.GetNumberOfPixels()
    if share < 1:
        method.SetMetricSamplingStrategy(method.REGULAR)
        method.SetMetricSamplingPercentage(share, 1)
    pad = [round(AIR / spacing)] * 3
    if fixed.used is not None:
        method.SetMetricFixedMask(fixed.used)
    if moving.used is not None:
        method.SetMetricMovingMask(sitk.ZeroFluxNeumannPad(moving.used, pad, pad))
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=spacing / 2, minStep=spacing / 200, numberOfIterations=100, relaxationFactor=0.6)
    method.SetOptimizerScalesFromPhysicalShift()
    transform, given = KINDS[kind](), to_itk(start)
    centre = fixed.image.TransformContinuousIndexToPhysicalPoint([n / 2 for n in fixed.image.GetSize()])
    transform.SetCenter(centre)
    transform.SetMatrix(given.GetMatrix())
    transform.SetTranslation(np.subtract(given.TransformPoint(centre), centre).tolist())
    method.SetInitialTransform(transform, inPlace=True)
    try:
        method.Execute(fixed.image, sitk.ConstantPad(moving.image, pad, pad))
    except RuntimeError:  # the images came to overlap no more
        return start
    return from_itk(transform)


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
