"""What the affine endures: images that are cut, and moving images that are turned, shifted and scaled in their header.

python -m benchmarks.affine FIXED MOVING [--starts 100] [--degrees 45] [--shift 100] [--size 1.25] [--kind affine]

A cut takes slices off one of the images. "Distance" is the mean distance in mm between the affine of the cut images and
that of the whole ones, over the voxels of the fixed brain that are still there in both. "Scale" is the largest change
of a scale of the affine in %. "Turned" headers lead to one place if the affine is right: the distances are those to the
affine of the untouched header, over the fixed brain.
"""

import argparse
import time
from dataclasses import replace

import numpy as np
from nibabel.affines import apply_affine
from scipy.spatial.transform import Rotation

from drivenmorph_jax.cli.program import run
from drivenmorph_jax.images.intensity import anchored, foreground
from drivenmorph_jax.images.reading import load_image
from drivenmorph_jax.images.volume import canonical
from drivenmorph_jax.transforms.affine import KINDS, register_affine

SHARES, SLABS = (0.15, 0.25, 0.35, 0.5), (60, 40)  # of the brain's extent; mm
SIDES = {"below": (2, 0), "above": (2, 1), "left": (0, 0)}  # (axis, end)


def cut(volume, axis, low=0.0, high=0.0):
    """The canonical Volume without these shares of its foreground's extent along an axis."""
    full = np.flatnonzero(foreground(volume.data).any(tuple(a for a in range(3) if a != axis)))
    first, last, extent = full[0], full[-1] + 1, full[-1] + 1 - full[0]
    keep = slice(first + round(low * extent) if low else 0, last - round(high * extent) if high else None)
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, axis] * keep.start
    data = volume.data[tuple(keep if a == axis else slice(None) for a in range(3))]
    return replace(volume, data=np.ascontiguousarray(data), affine=affine)


def cuts(volume):
    """(name, cut Volume) of every cut."""
    for side, (axis, end) in SIDES.items():
        for share in SHARES:
            yield f"{share:.0%} {side}", cut(volume, axis, **{("low", "high")[end]: share})
    full = np.flatnonzero(foreground(volume.data).any((0, 1)))
    for slab in SLABS:
        rest = 1 - slab / np.ptp(full) / volume.spacing[2]
        yield f"slab of {slab} mm", cut(volume, 2, rest / 2, rest / 2)


def inside(volume, points):
    """The points (N, 3) in RAS mm that lie on the grid of a Volume."""
    x = apply_affine(np.linalg.inv(volume.affine), points)
    return ((x >= 0) & (x <= np.array(volume.data.shape) - 1)).all(1)


def turned(volume, rng, degrees, shift, size):
    """(the Volume with a random header, the change (4, 4) of its world)."""
    change, centre = np.eye(4), volume.affine @ [*(np.array(volume.data.shape) / 2), 1]
    axis, way = (x / np.linalg.norm(x) for x in rng.normal(size=(2, 3)))
    change[:3, :3] = Rotation.from_rotvec(axis * np.deg2rad(degrees) * rng.random()).as_matrix()
    change[:3, :3] *= np.exp(np.log(size) * rng.uniform(-1, 1))
    change[:3, 3] = centre[:3] - change[:3, :3] @ centre[:3] + way * shift * rng.random()
    return replace(volume, affine=change @ volume.affine), change


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fixed", metavar="FIXED", help="NIfTI image")
    parser.add_argument("moving", metavar="MOVING", help="NIfTI image")
    parser.add_argument("--kind", default="affine", choices=list(KINDS), help="default: affine")
    parser.add_argument("--starts", type=int, default=100, help="number of turned headers; default: 100")
    parser.add_argument("--degrees", type=float, default=45.0, help="largest turn; default: 45")
    parser.add_argument("--shift", type=float, default=100.0, help="largest shift in mm; default: 100")
    parser.add_argument("--size", type=float, default=1.25, help="largest factor of the size; default: 1.25")
    parser.add_argument("--no-cuts", action="store_true", help="only the turned headers")
    flags = parser.parse_args()
    fixed, moving = (canonical(load_image(path)) for path in (flags.fixed, flags.moving))
    fixed, moving = (replace(x, data=anchored(x.data)) for x in (fixed, moving))
    began = time.perf_counter()
    whole = register_affine(fixed, moving, kind=flags.kind)
    print(f"{time.perf_counter() - began:.2f} s; scales {scales(whole).round(3)}\n")
    brain = apply_affine(fixed.affine, np.argwhere(foreground(fixed.data))[::50])

    def distances(found, points=brain):
        return np.linalg.norm(apply_affine(found, points) - apply_affine(whole, points), axis=1)

    if not flags.no_cuts:
        print("| cut | of moving: distance (mm) | scale (%) | of fixed: distance (mm) | scale (%) |\n"
              "| --- | ---: | ---: | ---: | ---: |")
        for (name, m), (_, f) in zip(cuts(moving), cuts(fixed), strict=True):
            row = []
            for found, there in ((register_affine(fixed, m, kind=flags.kind), inside(m, apply_affine(whole, brain))),
                                 (register_affine(f, moving, kind=flags.kind), inside(f, brain))):
                row += [distances(found, brain[there]).mean(), 100 * np.abs(scales(found) / scales(whole) - 1).max()]
            print(f"| {name} |", " | ".join(f"{x:.2f}" for x in row), "|", flush=True)
        print()
    rng, ends = np.random.default_rng(0), []
    for _ in range(flags.starts):
        other, change = turned(moving, rng, flags.degrees, flags.shift, flags.size)
        found = register_affine(fixed, other, kind=flags.kind)
        ends.append(distances(np.linalg.inv(change) @ found).mean())
    if ends:
        print(f"{np.sum(np.array(ends) < 1)} of {flags.starts} turned headers end within 1 mm; median "
              f"{np.median(ends):.2f} mm, largest {np.max(ends):.2f} mm")


def scales(transform):
    """The scales (3,) of a transform (4, 4)."""
    return np.linalg.svd(transform[:3, :3], compute_uv=False)


if __name__ == "__main__":
    run(main)
