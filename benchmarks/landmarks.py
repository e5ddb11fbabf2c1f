"""The effect of landmarks: Dice of the ten worst labels, and of all others, before and after a registration is guided.

python -m benchmarks.landmarks --data FOLDER [--split test] [--pairs 3] [--radius 10] [--iterations 20]

The folder is as for `eval.py --data`. Each pair is registered by Demons with local correlation. Ten landmarks go from
the centres of mass of the ten labels with the lowest Dice in the fixed image to those in the moving image. Landmarks
that contradict others or are out of reach are left out, as `register` does. "Far" is the largest change of the
displacement beyond three radii from all landmarks, "left" the largest distance of a landmark from its target.
"""

import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from benchmarks.demons import EXCLUDE, arguments, pairs
from drivenmorph_jax import demons
from drivenmorph_jax.evaluation import metrics
from drivenmorph_jax.fields.inverse import coarse_inverse
from drivenmorph_jax.fields.jacobian import jacobian_determinant
from drivenmorph_jax.runtime import sharding

NUMBER = 10
TITLES = ("pair", "landmarks", "mm before", "left (mm)", "worst before", "worst after", "gain", "others", "least other",
          "far (mm)", "least J", "inverse (mm)")


def centres(labels, which):
    return np.array(ndimage.center_of_mass(np.ones(labels.shape), labels, which))


def main():
    parser = arguments(__doc__)
    parser.add_argument("--radius", type=float, default=10.0, help="of all landmarks, mm; default: 10")
    parser.add_argument("--iterations", type=int, default=20, help="of landmarks and images together; default: 20")
    flags = parser.parse_args()
    sharding.start()
    print("|", " | ".join(TITLES), "|\n|", " | ".join(["---"] + ["---:"] * (len(TITLES) - 1)), "|")
    for fixed, moving in pairs(flags.data, flags.split, flags.pairs):
        print("|", " | ".join(map(str, row(fixed, moving, flags.radius, flags.iterations))), "|", flush=True)


def row(fixed, moving, radius, iterations):
    """The row of a pair of subjects with voxels of 1 mm."""
    f, m = (jnp.asarray(subject.image)[..., None] for subject in (fixed, moving))
    u = demons.registered(f, m)

    def dice(u):
        moved = metrics.warp_labels(moving.labels, np.asarray(u))
        return metrics.dice(fixed.labels, moved, EXCLUDE, moving.labels)

    before = dice(u)
    worst = sorted(before, key=before.get)[:NUMBER]
    points, targets = (centres(subject.labels, worst) for subject in (fixed, moving))
    lacked, radii = demons.remaining(u, points, targets), np.full(NUMBER, radius)
    out = demons.out_of_reach(u, points, targets, radii)
    out[list(demons.contradictory(points, targets, lacked, 0.5))] = True
    points, targets, radii = (x[~out] for x in (points, targets, radii))
    led = demons.guided(f, m, u, points, targets, radii, iterations=iterations)
    after = dice(led)
    gain = {label: after[label] - before[label] for label in before}
    others = [gain[label] for label in gain if label not in worst]
    away = ndimage.distance_transform_edt(~_marked(fixed.image.shape, points)) > 3 * radius + 1
    far = np.linalg.norm(led - u, axis=-1)[away].max()
    brain = metrics.brain(fixed.image)
    inverse = metrics.inverse_consistency(np.asarray(led), np.asarray(coarse_inverse(led)), (1.0, 1.0, 1.0), brain)
    numbers = (lacked[~out].mean(), demons.remaining(led, points, targets).max(), *(
        np.mean([scores[label] for label in worst]) for scores in (before, after)),
        np.mean([gain[label] for label in worst]), np.mean(others), min(others), far,
        jacobian_determinant(led).min(), inverse)
    return [f"{fixed.id}, {moving.id}", len(points), *(f"{x:.4f}" for x in numbers)]


def _marked(shape, points):
    marked = np.zeros(shape, bool)
    marked[tuple(np.rint(points).astype(int).T)] = True
    return marked


if __name__ == "__main__":
    main()
