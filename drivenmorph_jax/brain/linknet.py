"""The LinkNet of deepbet: a residual encoder, and a decoder that adds the encoder's features at every resolution.

Volumes are channels-last. N is instance normalisation without parameters:

  N(x) = (x - mean) / sqrt(variance + 1e-5)    mean and variance over the voxels of each channel

Every convolution is computed as the 2-D convolution of depth slices that are stacked, as in `backends.convolution`.
Convolutions that change the resolution become convolutions of blocks of 2x2x2 voxels, by `prepared`.

Reference: Chaurasia and Culurciello, "LinkNet: Exploiting encoder representations for efficient semantic segmentation",
  VCIP, 2017. The layers are those of deepbet 1.0.2 (https://github.com/wwu-mmll/deepbet).
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from drivenmorph_jax.backends.programs import compiler_options

EPSILON = 1e-5
LEVELS = range(4)


def prepared(params):
    """The parameters as `logit` takes them, from those of `parameters.load`. Kernels are (D, H, W, I, O)."""
    params = dict(params)
    params["stem"] = _of_blocks(params["stem"])
    for name in ("up0", "up1", "up2", "head"):
        params[f"{name}.transposed"] = _to_blocks(params[f"{name}.transposed"])
    # The transpose of a convolution of stride 1 is the convolution with the mirrored kernel.
    params["up3.transposed"] = params["up3.transposed"][::-1, ::-1, ::-1]
    # Of the softmax over two channels only their difference counts. A bias before N does not count.
    for name in ("head.out", "head.out.bias"):
        params[name] = params[name][..., 1] - params[name][..., 0]
    params["head.out"] = params["head.out"].reshape(8, -1).T[None, None, None]
    return params


def _of_blocks(kernel):
    """A 7x7x7 kernel of stride 2 and one channel as a 4x4x4 kernel on blocks of 2x2x2 voxels: (4, 4, 4, 8, O).

    Voxel k - 3 of the kernel, k in 0 ... 6, is voxel (k + 1) % 2 of block (k + 1) // 2 - 2, along each axis.
    """
    kernel = np.pad(kernel[..., 0, :], [(1, 0)] * 3 + [(0, 0)]).reshape(4, 2, 4, 2, 4, 2, -1)
    return kernel.transpose(0, 2, 4, 1, 3, 5, 6).reshape(4, 4, 4, 8, -1)


def _to_blocks(kernel):
    """The transposed 3x3x3 convolution of stride 2 as a 2x2x2 convolution to blocks of 2x2x2 voxels: (2, 2, 2, I, 8 O).

      out(2p)     = x(p) kernel(1)
      out(2p + 1) = x(p) kernel(2) + x(p + 1) kernel(0)    along each axis
    """
    *_, i, o = kernel.shape
    padded = np.pad(kernel, [(0, 1)] * 3 + [(0, 0)] * 2)  # entry 3 is zero
    place = np.array([[1, 2], [3, 0]])  # [shift, voxel of the block]
    blocks = padded[np.ix_(*[place.ravel()] * 3)].reshape(2, 2, 2, 2, 2, 2, i, o)
    return blocks.transpose(0, 2, 4, 6, 1, 3, 5, 7).reshape(2, 2, 2, i, 8 * o)


def logit(params, x):
    """log(p / (1 - p)), p the probability of brain: (D, H, W) -> (D, H, W), float32. Sides are multiples of 32.

    The parts of the network are compiled one by one: this takes less time and less memory than one program.

    Args:
      params: as `prepared` returns them.
      x: an image, as `extraction.standardised` returns it.
    """
    x = _stem(params["stem"], x)
    kept = []
    for level in LEVELS:
        kept.append(x)
        x = _down(_part(params, f"down{level}."), x)
    for level in LEVELS:
        x = _up(_part(params, f"up{level}."), x, kept.pop())
    return _head(_part(params, "head"), x)


def _part(params, name):
    return {key.removeprefix(name): value for key, value in params.items() if key.startswith(name)}


def _compiled(f):
    """f, compiled at its first call, since the options depend on the device."""
    program = cache(lambda: jax.jit(f, compiler_options=compiler_options()))
    return lambda *args: program()(*args)


@_compiled
def _stem(kernel, x):
    """max-pool(relu(N(7x7x7 convolution))): (D, H, W) -> (1, D/4, H/4, W/4, 16). Both strides are 2.

    N and the rectifier are monotone, so they follow the pooling, on an eighth of the voxels.
    """
    d, h, w = (n // 2 for n in x.shape)
    blocks = x.reshape(d, 2, h, 2, w, 2).transpose(0, 2, 4, 1, 3, 5).reshape(1, d, h, w, 8)
    x = _convolved(blocks, kernel, (2, 1))
    moments = _moments(x)
    for axis in range(1, 4):
        x = _pooled(x, axis)
    return jax.nn.relu(_normalised(x, moments))


def _pooled(x, axis):
    """The maximum over voxels 2p - 1, 2p and 2p + 1 along one axis of even length."""
    even, odd = (jax.lax.slice_in_dim(x, k, None, 2, axis) for k in range(2))
    before = (jax.lax.slice_in_dim(even, 0, 1, 1, axis), jax.lax.slice_in_dim(odd, 0, -1, 1, axis))
    return jnp.maximum(jnp.maximum(even, odd), jnp.concatenate(before, axis))


@_compiled
def _down(params, x):
    """Two residual blocks, relu(N(conv(relu(N(conv(x))))) + shortcut(x)): (1, D, H, W, I) -> (1, D/s, H/s, W/s, O)."""
    for block in "ab":
        shortcut, stride = x, 1
        if f"{block}.shortcut" in params:
            shortcut, stride = _normalised(_mixed(x[:, ::2, ::2, ::2], params[f"{block}.shortcut"])), 2
        x = _rectified(_convolved(x, params[f"{block}.0"], stride=stride))
        x = jax.nn.relu(_normalised(_convolved(x, params[f"{block}.1"])) + shortcut)
    return x


@_compiled
def _up(params, x, kept):
    """Fewer channels, more voxels, then the channels of `kept`, which is added: (1, D, H, W, I) -> that of `kept`."""
    x = _rectified(_mixed(x, params["in"]))
    x = _rectified(_upsampled(x, params["transposed"]) if x.shape[1] < kept.shape[1] else
                   _convolved(x, params["transposed"]))
    return _rectified(_mixed(x, params["out"])) + kept


@_compiled
def _head(params, x):
    """(1, D, H, W, 16) -> (4D, 4H, 4W), from the lowest layer of the decoder to the voxels of the image."""
    x = _rectified(_upsampled(x, params[".transposed"]))
    x = _rectified(_convolved(x, params[""]))
    return _interleaved(_mixed(x, params[".out"]))[0, ..., 0] + params[".out.bias"]


def _upsampled(x, kernel):
    return _interleaved(_convolved(x, kernel, (0, 1)))


def _interleaved(x):
    """(B, D, H, W, 8 C), the voxels of blocks of 2x2x2 as channels -> (B, 2D, 2H, 2W, C)."""
    b, d, h, w, c = x.shape
    x = x.reshape(b, d, h, w, 2, 2, 2, c // 8).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(b, 2 * d, 2 * h, 2 * w, c // 8)


def _mixed(x, kernel):
    """The 1x1x1 convolution."""
    return x @ kernel[0, 0, 0]


def _convolved(x, kernel, reach=(1, 1), stride=1):
    """The convolution with a kernel that reaches so many voxels before and after its own, along every axis."""
    *_, d, h, w, c = x.shape
    side = len(kernel)
    padded = jnp.pad(x, ((0, 0), reach, (0, 0), (0, 0), (0, 0)))
    slices = jnp.concatenate([padded[0, k:k + d:stride] for k in range(side)], axis=-1)
    y = jax.lax.conv_general_dilated(slices, kernel.transpose(1, 2, 0, 3, 4).reshape(side, side, side * c, -1),
                                     (stride,) * 2, [reach] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y[None]


def _moments(x):
    return x.mean((1, 2, 3), keepdims=True), x.var((1, 2, 3), keepdims=True)


def _normalised(x, moments=None):
    """N(x), or x with the mean and the variance of another array."""
    mean, variance = moments or _moments(x)
    return (x - mean) * jax.lax.rsqrt(variance + EPSILON)


def _rectified(x):
    return jax.nn.relu(_normalised(x))
