"""The effect of guidance: Dice before and after a registration is guided by landmarks, or by the borders of structures.

python -m benchmarks.guidance --data FOLDER [--split test] [--pairs 3] [--radius 10] [--iterations 20]
python -m benchmarks.guidance --data FOLDER --structures 47 48 [--radius 5]

The folder is as for `eval.py --data`. Each pair is registered by Demons with local correlation.

Without --structures, ten landmarks go from the centres of mass of the ten labels with the lowest Dice in the fixed
image to those in the moving image. Landmarks that contradict others or are out of reach are left out, as `register`
does. "Guided" are the ten labels. With --structures, the borders of these labels go to those in the moving image.

"Far" is the largest change of the displacement beyond three radii from all landmarks and borders, "left" the largest
distance of a landmark from its target, or the largest mean distance of a border, in mm.
"""

import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from benchmarks.demons import EXCLUDE, arguments, pairs
from drivenmorph_jax import demons
from drivenmorph_jax.evaluation import metrics
from drivenmorph_jax.fields.inverse import coarse_inverse
from drivenmorph_jax.fields.jacobian import jacobian_determinant
from drivenmorph_jax.fields.warp import warp
from drivenmorph_jax.runtime import sharding

NUMBER = 10
TITLES = ("pair", "used", "mm before", "left (mm)", "guided before", "guided after", "gain", "others", "least other",
          "far (mm)", "least J", "inverse (mm)")


def centres(labels, which):
    return np.array(ndimage.center_of_mass(np.ones(labels.shape), labels, which))


def main():
    parser = arguments(__doc__)
    parser.add_argument("--structures", type=int, nargs="+", help="labels whose borders guide; default: landmarks")
    parser.add_argument("--radius", type=float, help="of all landmarks or borders, mm; default: 10 or 5")
    parser.add_argument("--iterations", type=int, default=20, help="of guidance and images together; default: 20")
    flags = parser.parse_args()
    sharding.start()
    radius = flags.radius or (5.0 if flags.structures else 10.0)
    print("|", " | ".join(TITLES), "|\n|", " | ".join(["---"] + ["---:"] * (len(TITLES) - 1)), "|")
    for fixed, moving in pairs(flags.data, flags.split, flags.pairs):
        print("|", " | ".join(map(str, row(fixed, moving, radius, flags.iterations, flags.structures))), "|",
              flush=True)


def row(fixed, moving, radius, iterations, structures=None):
    """The row of a pair of subjects with voxels of 1 mm."""
    f, m = (jnp.asarray(subject.image)[..., None] for subject in (fixed, moving))
    u = demons.registered(f, m)

    def dice(u):
        moved = metrics.warp_labels(moving.labels, np.asarray(u))
        return metrics.dice(fixed.labels, moved, EXCLUDE, moving.labels)

    before = dice(u)
    guided = structures or sorted(before, key=before.get)[:NUMBER]
    led, lacked, left, distance = (by_borders if structures else by_landmarks)(f, m, u, fixed, moving, guided, radius,
                                                                             iterations)
    after = dice(led)
    gain = {label: after[label] - before[label] for label in before}
    others = [gain[label] for label in gain if label not in guided]
    far = np.linalg.norm(led - u, axis=-1)[distance > 3 * radius + 1].max()
    inverse = metrics.inverse_consistency(np.asarray(led), np.asarray(coarse_inverse(led)), (1.0, 1.0, 1.0),
                                          metrics.brain(fixed.image))
    numbers = (np.mean(lacked), np.max(left), *(np.mean([scores[label] for label in guided])
                                                for scores in (before, after)),
               np.mean([gain[label] for label in guided]), np.mean(others), min(others), far,
               jacobian_determinant(led).min(), inverse)
    return [f"{fixed.id}, {moving.id}", len(lacked), *(f"{x:.4f}" for x in numbers)]


def by_landmarks(f, m, u, fixed, moving, labels, radius, iterations):
    """(the guided displacement, what each landmark lacked, what it lacks now, the distance of voxels from them)."""
    points, targets = (centres(subject.labels, labels) for subject in (fixed, moving))
    lacked, radii = demons.remaining(u, points, targets), np.full(len(labels), radius)
    out = demons.out_of_reach(u, points, targets, radii)
    out[list(demons.contradictory(points, targets, lacked, 0.5))] = True
    points, targets, radii = (x[~out] for x in (points, targets, radii))
    led = demons.guided(f, m, u, points, targets, radii, iterations=iterations)
    return led, lacked[~out], demons.remaining(led, points, targets), ndimage.distance_transform_edt(
        ~_marked(fixed.image.shape, points))


def by_borders(f, m, u, fixed, moving, labels, radius, iterations):
    """The same for borders; what a border lacks is the mean over its voxels."""
    borders = [np.stack([demons.signed_distance(subject.labels == label) for label in labels], -1)
               for subject in (fixed, moving)]
    led = demons.guided(f, m, u, *np.zeros((2, 0, 3)), np.zeros(0), iterations=iterations, borders=borders,
                        border_radius=radius)

    def lacking(u):
        moved = np.asarray(warp(jnp.asarray(borders[1]), u))
        return [np.abs(b - a)[np.abs(a) < 1].mean() for a, b in zip(np.moveaxis(borders[0], -1, 0),
                                                                    np.moveaxis(moved, -1, 0), strict=True)]

    return led, lacking(u), lacking(led), np.abs(borders[0]).min(-1)


def _marked(shape, points):
    marked = np.zeros(shape, bool)
    marked[tuple(np.rint(points).astype(int).T)] = True
    return marked


if __name__ == "__main__":
    main()
