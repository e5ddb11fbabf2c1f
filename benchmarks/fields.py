"""Seconds of warp, exponential and local correlation at 160x192x160, forward and backward, and those of other tools.

python -m benchmarks.fields [--side 160 192 160]

The other tools are `jax.scipy.ndimage.map_coordinates` and PyTorch's `grid_sample` (where installed). Their seconds are
given as multiples of ours. All are measured in one run.

The floor is a lower bound of the seconds: the bytes that must move, at the rate of a plain copy, which is measured in
the same run. A warp of C channels reads the field and the image once and writes once: 4 (3 + 2 C) bytes a voxel.
Gathers read each voxel up to eight times from cache. The floor of the backward pass is twice that. Local correlation
reads two images and writes one value, or two gradients. "Backward" is forward and backward, with respect to all
arguments. "Without kernels" is the form of XLA's own operations, which machines without the kernels of
`backends/kernels.cpp` use.
"""

import argparse
import time
from contextlib import contextmanager
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

from drivenmorph_jax.backends import current, kernels
from drivenmorph_jax.fields.grid import identity_grid
from drivenmorph_jax.fields.integrate import exponential
from drivenmorph_jax.fields.smooth import gaussian_smooth
from drivenmorph_jax.fields.warp import warp
from drivenmorph_jax.network.losses import lncc

SQUARINGS, WINDOW, RUNS = 7, 9, 3


def scipy_warp(image, u):
    x = jnp.moveaxis(identity_grid(u.shape[:3]) + u, -1, 0)
    return jnp.stack([map_coordinates(image[..., c], x, 1, "nearest") for c in range(image.shape[-1])], -1)


def torch_device():
    """PyTorch's name for the kind of device that JAX uses."""
    return {"gpu": "cuda"}.get(current(), "cpu")


class Torch:
    """The same operations in PyTorch, on the kind of device that JAX uses.

    Channels come first: images (1, C, D, H, W) and fields (1, 3, D, H, W).
    """

    def __init__(self, shape):
        import torch
        self.torch, self.device = torch, torch_device()
        self.grid = torch.stack(torch.meshgrid(*(torch.arange(n).float() for n in shape), indexing="ij"))[None]
        self.scale = torch.tensor([2 / (n - 1) for n in shape]).reshape(1, 3, 1, 1, 1)
        self.grid, self.scale = self.grid.to(self.device), self.scale.to(self.device)

    def warp(self, image, u):
        x = ((self.grid + u) * self.scale - 1).flip(1).permute(0, 2, 3, 4, 1)  # grid_sample wants x, y, z in [-1, 1]
        return self.torch.nn.functional.grid_sample(image, x, padding_mode="border", align_corners=True)

    def exponential(self, v):
        v = v / 2**SQUARINGS
        for _ in range(SQUARINGS):
            v = v + self.warp(v, v)
        return v

    def lncc(self, a, b):
        """As VoxelMorph computes it: box sums by a convolution with ones."""
        box, n = self.torch.ones(1, 1, *(WINDOW,) * 3, device=self.device), WINDOW**3
        sa, sb, aa, bb, ab = (self.torch.nn.functional.conv3d(x, box, padding=WINDOW // 2)
                              for x in (a, b, a * a, b * b, a * b))
        cross, va, vb = ab - sa * sb / n, aa - sa * sa / n, bb - sb * sb / n
        return (cross * cross / (va * vb + 1e-5)).mean()

    def seconds(self, f, arrays, backward):
        x = [self.torch.tensor(np.moveaxis(np.asarray(a), -1, 0), device=self.device)[None].requires_grad_(backward)
             for a in arrays]

        def once():
            out = f(*x)
            if backward:
                (out**2).sum().backward()
            if self.device == "cuda":
                self.torch.cuda.synchronize()
        return fastest(once)


def fastest(once, runs=RUNS):
    """Seconds of the fastest run, after one run that is not timed."""
    once()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        once()
        times.append(time.perf_counter() - start)
    return min(times)


def seconds(f, *arguments):
    f = jax.jit(f)
    return fastest(lambda: jax.block_until_ready(f(*arguments)))


@contextmanager
def without_kernels():
    """Within the block, no kernels are taken."""
    jax.clear_caches()
    with mock.patch.object(kernels, "available", lambda: False):
        yield
    jax.clear_caches()


def gradient(f, count):
    return jax.grad(lambda *x: (f(*x) ** 2).sum(), argnums=tuple(range(count)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, nargs=3, default=(160, 192, 160))
    shape = tuple(parser.parse_args().side)
    key = jax.random.key(0)
    v = 40 * gaussian_smooth(jax.random.normal(key, (*shape, 3)), 4.0)
    copied = jax.random.normal(key, (*shape, 16))
    rate = 2 * copied.nbytes / seconds(lambda x: x + 1, copied)
    voxels = v.size // 3
    try:
        torch = Torch(shape)
        with_torch = f"PyTorch {torch.torch.__version__}"
    except ImportError:
        torch, with_torch = None, "PyTorch is not installed"
    print(f"{jax.devices()[0].device_kind}, {'x'.join(map(str, shape))}; a copy runs at {rate / 1e9:.1f} GB/s; "
          f"largest |v| {float(jnp.linalg.norm(v, axis=-1).max()):.1f} voxels; jax {jax.__version__}, {with_torch}\n")
    print("| | times of PyTorch | times of map_coordinates | times without kernels | ours, s | of the floor |\n"
          "| --- | ---: | ---: | ---: | ---: | ---: |")

    def compare(name, floor, ours, scipy, rival, *arguments):
        for backward in (False, True):
            of = partial(gradient, count=len(arguments)) if backward else lambda f: f
            a = seconds(of(ours), *arguments)
            b = f"{seconds(of(scipy), *arguments) / a:.1f}" if scipy else ""
            c = f"{torch.seconds(rival, arguments, backward) / a:.1f}" if torch else ""
            with without_kernels():
                d = f"{seconds(of(ours), *arguments) / a:.1f}"
            print(f"| {name}{', backward' if backward else ''} | {c} | {b} | {d} | {a:.4f} | "
                  f"{a / ((1 + backward) * floor / rate):.1f} |", flush=True)

    for channels in (1, 3, 16):
        image = jax.random.normal(key, (*shape, channels))
        compare(f"warp, {channels} channels", 4 * voxels * (3 + 2 * channels), warp, scipy_warp, torch and torch.warp,
                image, v)
    compare(f"exponential, {SQUARINGS} squarings", SQUARINGS * 4 * voxels * 6, partial(exponential, steps=SQUARINGS),
            None, torch and torch.exponential, v)
    images = [gaussian_smooth(jax.random.uniform(jax.random.key(k), (*shape, 1)), 1.0) for k in (0, 1)]
    compare(f"local correlation, {WINDOW}^3", 4 * voxels * 2, lambda a, b: lncc(a[None], b[None], WINDOW), None,
            torch and torch.lncc, *images)


if __name__ == "__main__":
    main()
