"""`fields.warp.trilinear` on TPU.

On TPU, a gather moves a tile of 8 x 128 values for every sample, however few of them the sample needs. A displacement
of at most one voxel needs no gather: it is a sum of shifted slices. Any other displacement gathers one row of a table
for every sample. A row of the table holds all corners of a cell.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from drivenmorph_jax.backends.cell import cell, flat


def warped(image, u, near=False):
    """Samples of image (*space, C) at x + u(x). `near` promises that |u_a| <= 1 voxel along every axis a."""
    if near:
        return _of_slices(image, u)
    at_once = LANES >> u.shape[-1]
    return jnp.concatenate([_rows(image[..., k:k + at_once], u) for k in range(0, image.shape[-1], at_once)], -1)


SHIFTS = -1, 0, 1


@jax.custom_vjp
def _of_slices(image, u):
    """Samples of the image at x + u(x), where |u_a| <= 1 voxel along every axis a.

      out(x) = sum over k in {-1, 0, 1}^n of image(x + k) prod_a max(0, 1 - |u_a(x) - k_a|)

    It takes no gather, and its adjoint takes no scatter.
    """
    padded, weights, space = _edge_padded(image), _hats(u), image.shape[:-1]
    return sum(math.prod(weights[axis][k] for axis, k in enumerate(shift)).astype(image.dtype)[..., None]
               * padded[tuple(slice(1 + k, 1 + k + n) for k, n in zip(shift, space, strict=True))]
               for shift in itertools.product(SHIFTS, repeat=len(space)))


def _edge_padded(image):
    return jnp.pad(image, [(1, 1)] * (image.ndim - 1) + [(0, 0)], mode="edge")


def _hats(u):
    """[{k: weight of the shift k}], one for each axis."""
    return [{k: jnp.maximum(0, 1 - jnp.abs(u[..., axis] - k)) for k in SHIFTS} for axis in range(u.shape[-1])]


def _of_slices_forward(image, u):
    return _of_slices(image, u), (image, u)


def _of_slices_backward(residuals, g):
    """The gradient of the image is a sum of slices as well.

    That of automatic differentiation is a sum of padded arrays, each of which the compiler for TPU writes to memory.
    Its traffic is twice as large.
    """
    image, u = residuals
    space = image.shape[:-1]
    wide = jax.tree.map(lambda x: jnp.pad(x, [(2, 2)] * len(space) + [(0, 0)] * (x.ndim - len(space))), (_hats(u), g))

    def back(shift):
        (weights, g), part = wide, tuple(slice(1 - k, 3 - k + n) for k, n in zip(shift, space, strict=True))
        weight = math.prod(weights[axis][k] for axis, k in enumerate(shift))
        return weight[part].astype(g.dtype)[..., None] * g[part]

    g_padded = sum(map(back, itertools.product(SHIFTS, repeat=len(space))))
    g_image, = jax.linear_transpose(_edge_padded, image)(g_padded)
    return g_image, jax.vjp(lambda u: _of_slices.__wrapped__(image, u), u)[1](g)[0]


_of_slices.defvjp(_of_slices_forward, _of_slices_backward)

# The name of the values that a TPU gathered. Rematerialisation keeps them, since gathering them again costs too much.
SAMPLED = "sampled"
LANES = 128  # values that lie side by side in a TPU's memory: a gather of fewer costs the same


def _table(image):
    """The table of an image: (rows, LANES).

    A row holds both sides of a cell along every axis but the last, and two blocks of voxels along the last axis. A row
    begins at every block, so both corners along the last axis lie in one row. Beyond the edge, the table holds zeros.
    """
    *space, channels = image.shape
    block = _block(image.shape)
    count = -(-space[-1] // block)
    image = jnp.pad(image, [(0, 1)] * (len(space) - 1) + [(0, (count + 1) * block - space[-1]), (0, 0)])
    image = image.reshape(*image.shape[:-2], count + 1, block * channels)
    image = jnp.concatenate([image[..., :-1, :], image[..., 1:, :]], -1)
    rows = jnp.concatenate([image[tuple(slice(side, side + n) for side, n in zip(corner, space[:-1], strict=True))]
                            for corner in itertools.product((0, 1), repeat=len(space) - 1)], -1)
    return jnp.pad(rows.reshape(-1, rows.shape[-1]), [(0, 0), (0, LANES - rows.shape[-1])])


def _block(shape):
    """Voxels of a block along the last axis, for an image (..., C). A row of the table holds two blocks."""
    return (LANES >> len(shape) - 1) // shape[-1]


def _row(shape, u, first):
    """The row of the table that holds the cell of each sample."""
    low, _, _ = cell(shape[:-1], u, first)
    block, (*low, last) = _block(shape), low
    return flat(shape[:-2], low) * -(-shape[-2] // block) + last // block


def _combined(rows, shape, channels, u, first):
    """Gathered rows (..., LANES) -> values of the samples (..., C), where each value is the sum of its `_parts`."""
    block, dims = _block(shape), u.shape[-1]
    low, fraction, inside = cell(shape[:-1], u, first)
    # As in `backends.warp`, the derivative with respect to u is kept wherever the sample is inside the grid. `clip`
    # would halve it at the edge.
    fixed = jax.lax.stop_gradient
    fraction = [fixed(f) + jnp.where(m, x - fixed(x), 0)
                for f, m, x in zip(fraction, inside, jnp.moveaxis(u, -1, 0), strict=True)]
    fraction[-1] += low[-1] % block
    place = np.arange(LANES) // shape[-1]
    places = [*(place // (2 * block) >> bit & 1 for bit in reversed(range(dims - 1))), place % (2 * block)]
    weights = math.prod(jnp.maximum(0, 1 - jnp.abs(f[..., None] - k)) for f, k in zip(fraction, places, strict=True))
    weights *= place < block << dims
    # A product with a 0/1 matrix sums the lanes of each channel.
    mine = np.arange(LANES)[:, None] % shape[-1] % channels == np.arange(channels)
    return jnp.matmul(weights.astype(rows.dtype) * rows, mine.astype(rows.dtype), precision="highest")


def _parts(image):
    """A float32 image as three bfloat16 images that add up to it, side by side (..., 3 C); any other image unchanged.

    A tile of bfloat16 values is half as large. `reduce_precision` rounds the parts, since XLA would remove a conversion
    to bfloat16 and back.
    """
    if image.dtype != jnp.float32 or 3 * image.shape[-1] << image.ndim - 1 > LANES:
        return image
    parts = []
    for _ in range(3):
        parts.append(jax.lax.reduce_precision(image, 8, 7))
        image -= parts[-1]
    return jnp.concatenate(parts, -1).astype(jnp.bfloat16)


# One slice of u is sampled at a time, since every sample gathers LANES values. The slices lie along the second axis:
# the first may be split over devices, and every device would then receive all of u for every slice.
@jax.custom_vjp
def _rows(image, u):
    """Samples of the image at x + u(x): one gather of one row, which holds all corners of the cell, for each sample."""
    return _rows_by(lambda values, u: values(u), image, u)


def _slices(x):
    """(X, Y, ...) -> (Y, X, 1, ...): the slices along the second axis."""
    return jnp.moveaxis(x, 1, 0)[:, :, None]


def _rows_by(f, image, u):
    """f(function from u to the values of the samples, u) for every slice of u, joined along the second axis."""
    parts = _parts(image)
    table = _table(parts)

    def part(x):
        first, u = x
        rows = jnp.take(table, _row(parts.shape, u, first), axis=0, mode="clip").astype(image.dtype)
        return f(lambda u: _combined(rows, parts.shape, image.shape[-1], u, first), u)

    found = jax.lax.map(part, (jnp.arange(u.shape[1]), _slices(u)))
    return jax.tree.map(lambda x: jnp.moveaxis(x[:, :, 0], 0, 1), found)


def _rows_forward(image, u):
    """Also computes the slopes of the samples along every axis, so that the backward pass gathers nothing."""
    def both(values, u):
        value, slope = jax.linearize(values, u)
        return value, [slope(jnp.broadcast_to(axis, u.shape)) for axis in np.eye(u.shape[-1], dtype=u.dtype)]

    out, slopes = checkpoint_name(_rows_by(both, image, u), SAMPLED)
    return out, (image, u, slopes)


def _rows_backward(residuals, g):
    image, u, slopes = residuals
    table = jax.eval_shape(_table, image)

    def part(g_table, x):
        first, u, g = x
        index = _row(image.shape, u, first)
        spread = jax.linear_transpose(lambda rows: _combined(rows, image.shape, image.shape[-1], u, first),
                                      jax.ShapeDtypeStruct((*index.shape, LANES), table.dtype))
        return g_table.at[index].add(spread(g)[0].astype(jnp.float32), mode="drop"), None

    # The sum runs in float32, as on CPU.
    g_table, _ = jax.lax.scan(part, jnp.zeros(table.shape), (jnp.arange(u.shape[1]), _slices(u), _slices(g)))
    g_table = g_table.astype(table.dtype)
    g_u = jnp.stack([(slope * g).sum(-1).astype(u.dtype) for slope in slopes], -1)
    return *jax.linear_transpose(_table, image)(g_table), g_u


_rows.defvjp(_rows_forward, _rows_backward)
