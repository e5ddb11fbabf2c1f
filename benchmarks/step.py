"""A training step of DrivenMorph beside one of VoxelMorph's own code, in one run, and the time that its input takes.

python -m benchmarks.step [--config configs/malf.py] [--shape 80 96 80] [--steps 5]

The rival is VxmDense of the package voxelmorph (0.2, PyTorch; `pip install --no-deps voxelmorph==0.2 neurite pystrum`
and `pip install torch scikit-image h5py einops`) with its default 3-D U-Net and 7 squarings. Both networks train by
local correlation of one window and diffusion, with Adam, on one pair of random images. The seconds are those of the
fastest step. Our step is measured with the kernels of `backends/kernels.cpp` and without. FLOPs, bytes and memory are
XLA's estimates for the compiled step, which count the body of a loop once and leave out what kernels compute.
"""

import argparse
import inspect
import os
import time

import jax
import numpy as np

from benchmarks.fields import fastest, torch_device, without_kernels
from drivenmorph_jax import data
from drivenmorph_jax.backends import programs
from drivenmorph_jax.cli.program import run
from drivenmorph_jax.network import networks
from drivenmorph_jax.runtime import configuration, sharding
from drivenmorph_jax.training.step import make_augment, make_optimizer, make_train_step


def ours(config, shape, count):
    """Seconds of a step, seconds of its compilation, its cost by XLA, and its bytes of memory."""
    mesh = sharding.device_mesh(devices=jax.devices()[:1])
    model, optimizer = networks.make_network(config.model), make_optimizer(config)
    batch = {key: jax.random.uniform(jax.random.key(i), (1, *shape, 1)) for i, key in enumerate(("fixed", "moving"))}
    params = jax.jit(lambda: model.init(jax.random.key(0, impl="rbg"), *batch.values())["params"])()
    state = [params, optimizer.init(params)]
    start = time.perf_counter()
    compiled = make_train_step(model, optimizer, config, mesh).lower(*state, batch).compile()
    seconds = time.perf_counter() - start

    def step():
        *state[:], row = compiled(*state, batch)
        jax.block_until_ready(row)

    return fastest(step, count), seconds, compiled.cost_analysis(), programs.device_memory(compiled)


def voxelmorph(window, shape, count):
    """Seconds of a step, or None where the package is missing."""
    os.environ["VXM_BACKEND"] = os.environ["NEURITE_BACKEND"] = "pytorch"
    if not hasattr(inspect, "getargspec"):  # removed in Python 3.11; the package needs it
        inspect.getargspec = lambda f: inspect.getfullargspec(f)[:4]
    try:
        import torch
        import voxelmorph as vxm
    except ImportError as error:
        print(f"VoxelMorph is left out: {error}")
        return None
    torch.manual_seed(0)
    device = torch_device()
    model = vxm.networks.VxmDense(shape, int_steps=7, int_downsize=2).to(device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    fixed, moving = torch.rand(2, 1, 1, *shape, device=device)
    box = torch.ones(1, 1, *(window,) * 3, device=device)

    def box_sum(x):
        return torch.nn.functional.conv3d(x, box, padding=window // 2)

    def lncc(a, b):  # as voxelmorph.losses.NCC, which needs CUDA
        n = window**3
        sa, sb, aa, bb, ab = (box_sum(x) for x in (a, b, a * a, b * b, a * b))
        cross, va, vb = ab - sa * sb / n, aa - sa * sa / n, bb - sb * sb / n
        return (cross * cross / (va * vb + 1e-5)).mean()

    def step():
        optimizer.zero_grad()
        warped, flow = model(moving, fixed)
        loss = -lncc(fixed, warped) + 0.01 * sum((flow.diff(dim=axis) ** 2).mean() for axis in (2, 3, 4))
        loss.backward()
        optimizer.step()
        loss.item()  # waits for a GPU

    return fastest(step, count)


def loading(config):
    """Seconds to read a batch, in the background, and seconds to augment it, on the device of the training."""
    settings, mesh = config.data, sharding.device_mesh(devices=jax.devices()[:1])
    batches = data.training_batches(data.load(settings, ("train",)).train, config.batch_size, 0,
                                    downsample=settings.downsample)
    for _ in range(8):  # the batches that were read ahead
        next(batches)
    start = time.perf_counter()
    for _ in range(20):
        batch = next(batches)
    reading = (time.perf_counter() - start) / 20
    del batch["pair"]
    batch, augment = sharding.global_batch(batch, mesh), make_augment(config, mesh)
    return reading, fastest(lambda: jax.block_until_ready(augment(batch)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/malf.py")
    parser.add_argument("--shape", type=int, nargs=3, default=(80, 96, 80))
    parser.add_argument("--steps", type=int, default=5)
    flags, settings = parser.parse_known_args()
    sharding.start()
    config = configuration.override(configuration.load(flags.config), settings)
    shape = tuple(flags.shape)
    with without_kernels():
        before, *_ = ours(config, shape, flags.steps)
    a, compiling, cost, peak = ours(config, shape, flags.steps)
    b = voxelmorph(config.loss.window, shape, flags.steps)
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {'x'.join(map(str, shape))}, {flags.config}\n")
    print(f"{before / a:.2f} times as fast as without kernels: {a:.2f} s and {before:.2f} s a step")
    if b:
        print(f"{b / a:.2f} times as fast as VoxelMorph: {a:.2f} s and {b:.2f} s a step")
    print(f"ours: {1 / a:.2f} steps/s, {cost['flops'] / 1e9:.0f} GFLOP and {cost['bytes accessed'] / 1e9:.0f} GB with "
          f"loops counted once, peak {peak / 1e9:.2f} GB, {np.ceil(compiling):.0f} s to compile or to find")
    if config.data.name != "folder" or os.path.isdir(config.data.root):
        read, change = loading(config)
        print(f"input: {read:.4f} s to read a batch, in the background, and {change:.4f} s to change it at random, "
              f"{100 * change / a:.1f} % of a step")


if __name__ == "__main__":
    run(main)
