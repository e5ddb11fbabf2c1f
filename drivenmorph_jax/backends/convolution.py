"""Implementations of `network.convolution.convolved` for each device.

All devices replace the 3-D convolution by an equal 2-D convolution: its channels are those of three depth slices,
stacked. XLA on CPU runs it 3 to 30 times faster than the 3-D one. On TPU, the compiler turns the 3-D one into batches
that fill a sixteenth of the memory they take. On GPU, the 2-D one has the layout in memory that tensor cores need.

For few channels, a CPU sums shifted volumes instead, if they are large, and a GPU convolves blocks of 2x2 voxels.
"""

import itertools
import math
import operator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from drivenmorph_jax.backends import kernels
from drivenmorph_jax.backends.fusion import alone

FEW = 24  # input channels times output channels, up to which a sum of shifted volumes is fastest on CPU
SMALL = 50_000  # voxels, up to which a CPU takes longer to compile that sum than the sum could ever save
TENSOR_CORE = 8  # the fewest channels that the matrix units of a GPU take
BLOCK = (1, 2, 2)  # with fewer channels, this many voxels become one voxel with the channels of all


@jax.custom_vjp
def _by_kernel(x, kernel):
    return kernels.call("convolution", [(*x.shape[:4], kernel.shape[4])], x, kernel, vmap_method="sequential")[0]


_by_kernel.defvjp(lambda x, kernel: (_by_kernel(x, kernel), (x, kernel)),
                  lambda residuals, g: tuple(kernels.call(
                      "convolution_adjoint", [x.shape for x in residuals], *residuals, g, vmap_method="sequential")))


@jax.custom_vjp
def _sum_of_shifts(x, kernel):
    """The convolution, one output channel after the other, in float32.

    Every value is a sum of 27 I products, each along the last axis of a volume.
    """
    channels = jnp.moveaxis(x.astype(jnp.float32), -1, 0)
    padded = jnp.pad(channels, ((0, 0), (0, 0), (1, 1), (1, 1), (1, 1)))
    # Without a loop, XLA would recompute x for every shift. With a loop it compiles one channel only. `alone`, since
    # XLA uses one core for what it computes directly in the memory of the loop's result.
    out = jax.lax.map(lambda kernel: alone(_channel, kernel, padded), jnp.moveaxis(kernel, -1, 0))
    return jnp.moveaxis(out, 0, -1).astype(x.dtype)


def _channel(kernel, padded):
    """One output channel (B, D, H, W) of a kernel (3, 3, 3, I) and padded channels (I, B, D + 2, H + 2, W + 2)."""
    b, *space = padded.shape[1], *(n - 2 for n in padded.shape[2:])
    places = itertools.product(range(3), range(3), range(3), range(len(padded)))
    # `slice`, not an index: it is traced in a third of the time.
    near = (jax.lax.slice(padded, (i, 0, *shift), (i + 1, b, *map(operator.add, shift, space)))
            for *shift, i in places)
    return sum(w * x for w, x in zip(kernel.ravel(), near, strict=True))[0]


def _sum_of_shifts_forward(x, kernel):
    return _sum_of_shifts(x, kernel), (x, kernel)


def _sum_of_shifts_backward(residuals, g):
    x, kernel = residuals
    back = jnp.swapaxes(kernel[::-1, ::-1, ::-1], 3, 4)
    return _sum_of_shifts(g, back), jax.vjp(lambda kernel: _stacked_planes(x, kernel), kernel)[1](g)[0]


_sum_of_shifts.defvjp(_sum_of_shifts_forward, _sum_of_shifts_backward)


def _blocked(x, kernel):
    """The convolution of blocks of voxels, with the channels of all voxels of a block side by side.

    This takes four times the products, but as many channels as the matrix units of a GPU need.
    """
    b, *space, c = x.shape
    x = jnp.pad(x, [(0, 0)] + [(0, -n % k) for n, k in zip(space, BLOCK, strict=True)] + [(0, 0)])
    shape = [n // k for n, k in zip(x.shape[1:4], BLOCK, strict=True)]
    x = x.reshape(b, *(n for pair in zip(shape, BLOCK, strict=True) for n in pair), c)
    x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, *shape, -1)
    for axis, k in enumerate(BLOCK):
        # Output voxel p of a block takes input voxel q of the block at offset s - 1, weighted by entry
        # q + k (s - 1) - p + 1 of the kernel.
        s, q, p = np.ogrid[:3, :k, :k]
        place = (q + k * (s - 1) - p + 1)[..., None] == np.arange(3)
        kernel = jnp.moveaxis(jnp.tensordot(place.astype(kernel.dtype), kernel, (3, 3 * axis), precision="highest"),
                              (0, 1, 2), (3 * axis, 3 * axis + 1, 3 * axis + 2))
    kernel = kernel.transpose(0, 3, 6, 1, 4, 7, 9, 2, 5, 8, 10).reshape(3, 3, 3, x.shape[-1], -1)
    out = _stacked(x, kernel).reshape(b, *shape, *BLOCK, -1).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    out = out.reshape(b, *(n * k for n, k in zip(shape, BLOCK, strict=True)), -1)
    return out[:, :space[0], :space[1], :space[2]]


def _stacked(x, kernel, stride=1, convolve=None):
    """The 3-D convolution as a 2-D convolution of stacked slices: by `convolve`, by default XLA's."""
    b, d, h, w, c = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    slices = jnp.concatenate([padded[:, i:i + d:stride] for i in range(3)], axis=-1)
    kernel = jnp.moveaxis(kernel, 0, 2).reshape(3, 3, 3 * c, -1)
    out = (convolve or partial(_convolve, stride=stride))(slices.reshape(-1, h, w, 3 * c), kernel)
    return out.reshape(b, -1, *out.shape[1:])


def _convolve(x, kernel, stride=1):
    return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, [(1, 1)] * 2,
                                        dimension_numbers=("NHWC", "HWIO", "NHWC"))


@jax.custom_vjp
def _planewise(x, kernel):
    return _convolve(x, kernel)


def _planewise_forward(x, kernel):
    return _convolve(x, kernel), (x, kernel)


def _planewise_backward(residuals, g):
    # The transposes are written out. Within a loop, XLA on CPU leaves the order of the axes to the convolution, which
    # is then about forty times slower.
    x, kernel = residuals
    of_kernel = _convolve(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)).transpose(1, 2, 0, 3)
    return _convolve(g, jnp.swapaxes(kernel[::-1, ::-1], 2, 3)), of_kernel


_planewise.defvjp(_planewise_forward, _planewise_backward)
_stacked_planes = partial(_stacked, convolve=_planewise)


def _on_cpu(x, kernel, stride=1):
    if stride > 1:
        return _stacked(x, kernel, stride)
    if kernels.usable(x, kernel):
        return _by_kernel(x, kernel)
    few = math.prod(kernel.shape[3:]) <= FEW and math.prod(x.shape[1:4]) > SMALL
    return _sum_of_shifts(x, kernel) if few else _stacked_planes(x, kernel)


def _on_gpu(x, kernel, stride=1):
    few = stride == 1 and min(kernel.shape[3:]) < TENSOR_CORE
    return _blocked(x, kernel) if few else _stacked(x, kernel, stride)


FORMS = {"cpu": _on_cpu, "gpu": _on_gpu, "tpu": _stacked}
