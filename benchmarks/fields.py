"""Warp and exponential of one 160x192x160 field against `jax.scipy.ndimage.map_coordinates`, as ratios in one run.

python -m benchmarks.fields

The floor of a warp of C channels is one read of the field and of the image and one write: 4 (3 + 2 C) bytes a voxel, at
the rate of a plain copy, which is measured beside it. Gathers read each voxel up to eight times from cache.
"""

import time
from functools import partial

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from drivenmorph_jax.demons import gaussian_smooth
from drivenmorph_jax.grid import identity_grid
from drivenmorph_jax.integrate import exponential
from drivenmorph_jax.warp import warp

SHAPE, SQUARINGS, RUNS = (160, 192, 160), 7, 5


def rival_warp(image, u):
    x = jnp.moveaxis(identity_grid(SHAPE) + u, -1, 0)
    return jnp.stack([map_coordinates(image[..., c], x, 1, "nearest") for c in range(image.shape[-1])], -1)


def rival_exponential(v):
    return jax.lax.fori_loop(0, SQUARINGS, lambda _, s: s + rival_warp(s, s), v / 2**SQUARINGS)


def seconds(f, *arguments):
    """Fastest of several runs, after compilation."""
    f, times = jax.jit(f), []
    jax.block_until_ready(f(*arguments))
    for _ in range(RUNS):
        start = time.perf_counter()
        jax.block_until_ready(f(*arguments))
        times.append(time.perf_counter() - start)
    return min(times)


def gradient(f):
    return jax.grad(lambda *x: (f(*x) ** 2).sum())


def main():
    key = jax.random.key(0)
    v = 40 * gaussian_smooth(jax.random.normal(key, (*SHAPE, 3)), 4.0)
    copied = jax.random.normal(key, (*SHAPE, 16))
    rate = 2 * copied.nbytes / seconds(lambda x: x + 1, copied)
    voxels = v.size // 3
    print(f"{jax.devices()[0].device_kind}; a copy runs at {rate / 1e9:.1f} GB/s; largest |v| "
          f"{float(jnp.linalg.norm(v, axis=-1).max()):.1f} voxels\n")
    print(f"{'':28}{'ours':>9}{'rival':>9}{'times':>8}{'of floor':>10}")

    def compare(name, ours, rival, *arguments, floor):
        a, b = seconds(ours, *arguments), seconds(rival, *arguments)
        print(f"{name:28}{a:8.3f}s{b:8.3f}s{b / a:7.1f}x{a / (floor / rate):9.1f}x", flush=True)

    for channels in (1, 3):
        image = jax.random.normal(key, (*SHAPE, channels))
        floor = 4 * voxels * (3 + 2 * channels)
        compare(f"warp, {channels} channels", warp, rival_warp, image, v, floor=floor)
        compare("  with gradient in u", *(gradient(lambda u, x, f=f: f(x, u)) for f in (warp, rival_warp)), v, image,
                floor=2 * floor)
    floor = SQUARINGS * 4 * voxels * 6
    ours = partial(exponential, steps=SQUARINGS)
    compare(f"exponential, {SQUARINGS} squarings", ours, rival_exponential, v, floor=floor)


if __name__ == "__main__":
    main()
