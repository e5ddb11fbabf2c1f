"""The convolution of the project, and the feature pyramid that both images share."""

import itertools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from drivenmorph_jax.forces import box_mean
from drivenmorph_jax.fusion import alone
from drivenmorph_jax.grid import average_pool

RADIUS, FLOOR = 2, 1e-3  # of `local_norm`
FEW = 24  # channels in times channels out, up to which sums of shifted volumes are the fastest on CPU
TENSOR_CORE = 8  # channels that a GPU's matrix units take at least
BLOCK = (1, 2, 2)  # voxels that make one of fewer


def conv3d(x, kernel, stride=1):
    """3x3x3 convolution with zero padding: (B, D, H, W, I) * (3, 3, 3, I, O) -> (B, D/s, H/s, W/s, O).

    It is one 2-D convolution of the three depth slices stacked as channels. XLA on CPU does that 3 to 30 times faster
    than the 3-D convolution that it is equal to; the compiler for TPU makes that one of batches that fill a sixteenth
    of the memory they take; on GPU it lies in memory as tensor cores want it. Few channels are, on CPU, a sum of
    shifted volumes, and on GPU a convolution of blocks of 2x2 voxels.
    """
    backend = jax.default_backend()
    if backend == "gpu" and stride == 1 and min(kernel.shape[3:]) < TENSOR_CORE:
        return _blocked(x, kernel)
    if backend == "cpu" and stride == 1 and math.prod(kernel.shape[3:]) <= FEW:
        return _shifted(x, kernel)
    return _stacked(x, kernel, stride)


@jax.custom_vjp
def _shifted(x, kernel):
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


def _shifted_forward(x, kernel):
    return _shifted(x, kernel), (x, kernel)


def _shifted_backward(residuals, g):
    x, kernel = residuals
    back = jnp.swapaxes(kernel[::-1, ::-1, ::-1], 3, 4)
    return _shifted(g, back), jax.vjp(lambda kernel: _stacked(x, kernel, 1), kernel)[1](g)[0]


_shifted.defvjp(_shifted_forward, _shifted_backward)


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
    out = _stacked(x, kernel, 1).reshape(b, *shape, *BLOCK, -1).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    out = out.reshape(b, *(n * k for n, k in zip(shape, BLOCK, strict=True)), -1)
    return out[:, :space[0], :space[1], :space[2]]


def _stacked(x, kernel, stride):
    b, d, h, w, c = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    slices = jnp.concatenate([padded[:, i:i + d:stride] for i in range(3)], axis=-1)
    kernel = jnp.moveaxis(kernel, 0, 2).reshape(3, 3, 3 * c, -1)
    slices = slices.reshape(-1, h, w, 3 * c)
    on_cpu = stride == 1 and jax.default_backend() == "cpu"
    out = _planes(slices, kernel) if on_cpu else _convolve(slices, kernel, stride)
    return out.reshape(b, -1, *out.shape[1:])


def _convolve(x, kernel, stride=1):
    return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, [(1, 1)] * 2,
                                        dimension_numbers=("NHWC", "HWIO", "NHWC"))


@jax.custom_vjp
def _planes(x, kernel):
    return _convolve(x, kernel)


def _planes_forward(x, kernel):
    return _convolve(x, kernel), (x, kernel)


def _planes_backward(residuals, g):
    # The order of the axes is written out: in a loop XLA on CPU leaves them to the convolution, which is then some
    # forty times slower.
    x, kernel = residuals
    of_kernel = _convolve(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)).transpose(1, 2, 0, 3)
    return _convolve(g, jnp.swapaxes(kernel[::-1, ::-1], 2, 3)), of_kernel


_planes.defvjp(_planes_forward, _planes_backward)


class Conv(nn.Module):
    """`conv3d` with a bias; parameters float32, computed in `dtype`; of the features only the first, where `used` says
    how many."""
    features: int
    dtype: jnp.dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.he_normal()
    stride: int = 1
    used: int | None = None

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (3, 3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        kernel, bias = kernel[..., :self.used], bias[:self.used]
        x = _apart(x.astype(self.dtype))
        return _apart(conv3d(x, kernel.astype(self.dtype), self.stride) + bias.astype(self.dtype))


def _apart(x):
    """x, itself and its cotangent written to memory: XLA on GPU would compute what leads to them within the transposes
    of `_blocked`, thrice for its slices, or within the sum for the bias, of which each is fast only alone."""
    return jax.lax.optimization_barrier(x) if jax.default_backend() == "gpu" else x


def instance_norm(x):
    """(x - mean) / std over space, per image and channel: (B, D, H, W, C), in float32."""
    x = x.astype(jnp.float32)
    mean = x.mean((1, 2, 3), keepdims=True)
    variance = ((x - mean) ** 2).mean((1, 2, 3), keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5)


def local_norm(image):
    """(x - mean) / std over the 5^3 voxels around each: (B, D, H, W, 1), float32, contrast and bias removed.

    The squared difference of two such images is, up to the floor of the variance, 2 - 2 times their local correlation.
    """
    mean, square = (jax.vmap(lambda x: box_mean(x, RADIUS))(x[..., 0])[..., None] for x in (image, image * image))
    return (image - mean) * jax.lax.rsqrt(jnp.maximum(square - mean**2, 0) + FLOOR)


class Encoder(nn.Module):
    """Image (B, D, H, W, 1) -> features (B, D/s, H/s, W/s, C), float32 and instance-normalised, finest first.

    The first two channels of every level are the image itself, pooled, and the same locally normalised: a Demons force
    on these is a classical one before anything is learned, and the learned channels add to it. A level of two channels
    learns nothing, and leaves the next coarser one to begin with the image.
    """
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, image):
        x, stride, pyramid = image, 1, []
        for i, (channels, level_stride) in enumerate(zip(self.channels, self.strides, strict=True)):
            x = average_pool(x, level_stride // stride)
            stride = level_stride
            pooled = average_pool(image, stride)
            features = [pooled, local_norm(pooled)]
            if channels > 2:
                # Counted from the coarsest: a level added at the fine end leaves the others their parameters.
                level = len(self.strides) - 1 - i
                x = nn.leaky_relu(Conv(channels - 2, self.dtype, name=f"level{level}_a")(x))
                x = nn.leaky_relu(x + Conv(channels - 2, self.dtype, name=f"level{level}_b")(x))
                features.append(x)
            pyramid.append(instance_norm(jnp.concatenate(features, axis=-1)))
        return pyramid
