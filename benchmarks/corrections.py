"""The time of corrections of a finished result, and what they do: a landmark of 10 mm radius each, a region of 60 mm.

python -m benchmarks.corrections RESULT [--number 5] [--shift 4]

RESULT is the folder that was the --out of register. The landmarks lie at random places of the brain, and their partners
so many mm from where the result has them. "Open" reads the folder, "first" is the first correction, which compiles
where JAX's cache does not have it. "Seconds" are those of a correction after it: new displacement, warped image and
Jacobian. "Beyond" is the largest change of the displacement beyond three radii.
"""

import argparse
import time

import numpy as np

from drivenmorph_jax.images.intensity import foreground
from drivenmorph_jax.registration.correct import Correction, Session
from drivenmorph_jax.registration.guide import RADIUS
from drivenmorph_jax.runtime import sharding
from drivenmorph_jax.transforms.points import Landmarks
from drivenmorph_jax.transforms.world import map_points

TITLES = ("place", "seconds", "CPU seconds", "before (mm)", "after (mm)", "beyond (mm)", "least J before", "after",
          "similarity before", "after")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", metavar="RESULT", help="folder of a result")
    parser.add_argument("--number", type=int, default=5, help="of corrections; default: 5")
    parser.add_argument("--shift", type=float, default=4.0, help="mm from where the result has them; default: 4")
    flags = parser.parse_args()
    sharding.start()
    started = time.perf_counter()
    session = Session(flags.result)
    session.first  # noqa: B018 read now
    print(f"open {time.perf_counter() - started:.1f} s", end=", ", flush=True)
    started = time.perf_counter()
    session.warm()
    print(f"first {time.perf_counter() - started:.1f} s\n")
    print("|", " | ".join(TITLES), "|\n|", " | ".join(["---"] + ["---:"] * (len(TITLES) - 1)), "|")
    random = np.random.default_rng(0)
    brain = np.argwhere(foreground(session.pair.fixed.data))
    for voxel in brain[random.integers(len(brain), size=flags.number)]:
        way = random.normal(size=3)
        print("|", " | ".join(row(session, voxel, flags.shift * way / np.linalg.norm(way))), "|", flush=True)


def row(session, voxel, shift):
    """The row of a landmark at a voxel of the fixed image."""
    point = map_points(session.fixed.affine, voxel[None].astype(float))
    there = point + session.first.displacement[tuple(voxel)] + shift
    correction = Correction(Landmarks(("one",), point, there, np.array([np.nan])))
    clocks = time.perf_counter(), time.process_time()
    state = session.corrected(correction)
    seconds = [now() - then for now, then in zip((time.perf_counter, time.process_time), clocks, strict=True)]
    if state.parts is None:
        return [" ".join(f"{x:.0f}" for x in point[0]), *(f"{x:.2f}" for x in seconds), "left out", *[""] * 6]
    index = np.stack(np.meshgrid(*(np.arange(one.start, one.stop) for one in state.region), indexing="ij"), -1)
    away = np.linalg.norm(map_points(session.fixed.affine, index) - point, axis=-1) > 3 * RADIUS / session.scale
    moved = np.linalg.norm(state.parts[0] - session.first.displacement[state.region], axis=-1)
    numbers = (state.told[0]["before_mm"], state.told[0]["after_mm"], moved[away].max(initial=0),
               session.first.jacobian[state.region].min(), state.parts[2].min(), state.numbers["similarity_before"],
               state.numbers["similarity_after"])
    return [" ".join(f"{x:.0f}" for x in point[0]), *(f"{x:.2f}" for x in seconds), *(f"{x:.4f}" for x in numbers)]


if __name__ == "__main__":
    main()
