"""`network.convolution.convolved` on each device: one 2-D convolution of the three depth slices stacked as channels.

XLA on CPU does that 3 to 30 times faster than the 3-D convolution that it is equal to. The compiler for TPU makes that
one of batches that fill a sixteenth of the memory they take. On GPU it lies in memory as tensor cores want it. Few
channels are, on CPU, a sum of shifted volumes, and on GPU a convolution of blocks of 2x2 voxels.
"""

import itertools
import math
import operator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from drivenmorph_jax.backends.fusion import alone

FEW = 24  # channels in times channels out, up to which sums of shifted volumes are the fastest on CPU
TENSOR_CORE = 8  # channels that a GPU's matrix units take at least
BLOCK = (1, 2, 2)  # voxels that make one of fewer


@jax.custom_vjp
def _sum_of_shifts(x, kernel):
    """Channel by channel: 27 I products a value, in float32, each along the last axis of a volume."""
    (b, *space), channels = x.shape[:4], jnp.moveaxis(x.astype(jnp.float32), -1, 0)
    padded = jnp.pad(channels, ((0, 0), (0, 0), (1, 1), (1, 1), (1, 1)))
    places = list(itertools.product(range(3), range(3), range(3), range(len(padded))))

    def channel(kernel, padded):
        # `slice`, not an index: it is traced in a third of the time.
        near = (jax.lax.slice(padded, (i, 0, *shift), (i + 1, b, *map(operator.add, shift, space)))
                for *shift, i in places)
        return sum(w * x for w, x in zip(kernel.ravel(), near, strict=True))[0]

    # A loop: XLA would compute whatever made x again for every shift, but not within one; and it compiles one channel.
    # Alone, since what is made where the loop keeps it is made on one core.
    out = jax.lax.map(lambda kernel: alone(channel, kernel, padded), jnp.moveaxis(kernel, -1, 0))
    return jnp.moveaxis(out, 0, -1).astype(x.dtype)


def _sum_of_shifts_forward(x, kernel):
    return _sum_of_shifts(x, kernel), (x, kernel)


def _sum_of_shifts_backward(residuals, g):
    x, kernel = residuals
    back = jnp.swapaxes(kernel[::-1, ::-1, ::-1], 3, 4)
    return _sum_of_shifts(g, back), jax.vjp(lambda kernel: _stacked_planes(x, kernel), kernel)[1](g)[0]


_sum_of_shifts.defvjp(_sum_of_shifts_forward, _sum_of_shifts_backward)


def _blocked(x, kernel):
    """The same on blocks of voxels, those of one side by side: four times the products, but of a width that matrix
    units work with."""
    b, *space, c = x.shape
    x = jnp.pad(x, [(0, 0)] + [(0, -n % k) for n, k in zip(space, BLOCK, strict=True)] + [(0, 0)])
    shape = [n // k for n, k in zip(x.shape[1:4], BLOCK, strict=True)]
    x = x.reshape(b, *(n for pair in zip(shape, BLOCK, strict=True) for n in pair), c)
    x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, *shape, -1)
    for axis, k in enumerate(BLOCK):
        # Voxel p of a block sees voxel q of the block s - 1 further through entry q + k (s - 1) - p + 1 of the kernel.
        s, q, p = np.ogrid[:3, :k, :k]
        place = (q + k * (s - 1) - p + 1)[..., None] == np.arange(3)
        kernel = jnp.moveaxis(jnp.tensordot(place.astype(kernel.dtype), kernel, (3, 3 * axis), precision="highest"),
                              (0, 1, 2), (3 * axis, 3 * axis + 1, 3 * axis + 2))
    kernel = kernel.transpose(0, 3, 6, 1, 4, 7, 9, 2, 5, 8, 10).reshape(3, 3, 3, x.shape[-1], -1)
    out = _stacked(x, kernel).reshape(b, *shape, *BLOCK, -1).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    out = out.reshape(b, *(n * k for n, k in zip(shape, BLOCK, strict=True)), -1)
    return out[:, :space[0], :space[1], :space[2]]


def _stacked(x, kernel, stride=1, convolve=None):
    """The 3-D convolution as the 2-D one `convolve` of slices, by default XLA's own."""
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
    # The order of the axes is written out: in a loop XLA on CPU leaves them to the convolution, which is then some
    # forty times slower.
    x, kernel = residuals
    of_kernel = _convolve(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)).transpose(1, 2, 0, 3)
    return _convolve(g, jnp.swapaxes(kernel[::-1, ::-1], 2, 3)), of_kernel


_planewise.defvjp(_planewise_forward, _planewise_backward)
_stacked_planes = partial(_stacked, convolve=_planewise)


def _on_cpu(x, kernel, stride=1):
    if stride > 1:
        return _stacked(x, kernel, stride)
    return _sum_of_shifts(x, kernel) if math.prod(kernel.shape[3:]) <= FEW else _stacked_planes(x, kernel)


def _on_gpu(x, kernel, stride=1):
    few = stride == 1 and min(kernel.shape[3:]) < TENSOR_CORE
    return _blocked(x, kernel) if few else _stacked(x, kernel, stride)


FORMS = {"cpu": _on_cpu, "gpu": _on_gpu, "tpu": _stacked}
