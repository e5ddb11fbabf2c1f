"""Sampling by a displacement, and the composition of displacements.

Convention, here and everywhere: a field u lives on the fixed grid, in voxels, and pulls back,
x_moving = x + u(x), so the warped moving image is (M o phi)(x) = M(x + u(x)) with phi = id + u.
"""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from drivenmorph_jax.fusion import alone
from drivenmorph_jax.grid import identity_grid


def warp(image, u, reach=None):
    """Trilinear samples of `image` at x + u(x), clamped at the edge; bilinear in 2-D.

    out(x) = sum over the 8 corners q of the cell around x + u(x):  image(q) prod_a (1 - |x_a + u_a(x) - q_a|)

    Each corner is gathered once for all channels, so the floor is 8 reads of C values and one write a voxel. On TPU,
    where a gather moves a tile of memory for every sample, a short displacement is a sum of shifted slices instead, and
    any other gathers whole rows.

    Args:
      image: (..., D, H, W, C), any channel count; every side at least 2.
      u: (..., X, Y, Z, 3) displacement in voxels of the image's grid; (..., X, Y, 2) of an image (..., H, W, C).
      reach: a bound on |u_a| in voxels along every axis, where the caller knows one; u on the image's own grid.

    Returns:
      (..., X, Y, Z, C). Its derivative with respect to u is zero along an axis on which the sample lies outside.
    """
    return _sampled(image, u, jax.default_backend(), reach is not None and reach <= 1)


# Compiled, since a loop outside a compiled function is compiled again at every call, and kept.
@partial(jax.jit, static_argnames=("backend", "near"), inline=True)
def _sampled(image, u, backend, near):
    return _batched(partial(_on_tpu, near=near) if backend == "tpu" else _warp, u)(image, u)


def _batched(f, u):
    """f(image, u) over leading axes: the last axis of `u` says how many others are spatial."""
    image, field = ([f"{name}{axis}" for axis in range(u.shape[-1])] for name in "nm")
    return jnp.vectorize(f, signature=f"({','.join(image)},c),({','.join(field)},k)->({','.join(field)},c)")


def _cell(shape, u, first=0):
    """Lower corner, fraction within the cell, and whether the sample is inside: a triple of (X, Y, Z) each.

    `first` is the coordinate along the second axis at which u begins.
    """
    low, fraction, inside = [], [], []
    for axis, n in enumerate(shape):
        x = jax.lax.broadcasted_iota(jnp.float32, u.shape[:-1], axis) + u[..., axis]
        if axis == 1:
            x += first
        clamped = jnp.clip(x, 0, n - 1)
        corner = jnp.clip(jnp.floor(clamped), 0, n - 2)
        low.append(corner.astype(jnp.int32))
        fraction.append(clamped - corner)
        inside.append((x >= 0) & (x <= n - 1))
    return low, fraction, inside


def _corner(shape, low, fraction, k):
    """Corner k of the cell: its flat index, its weights along the axes, the signs of the weights' derivatives."""
    sides, index = [k >> axis & 1 for axis in reversed(range(len(shape)))], 0
    for n, x, side in zip(shape, low, sides, strict=True):
        index = index * n + x + side
    weights = [jnp.where(side == 1, f, 1 - f) for f, side in zip(fraction, sides, strict=True)]
    return index, weights, [2.0 * side - 1 for side in sides]


# The backward pass is written out since the transposed one scatters for every corner and reads the image again for
# every axis.
@jax.custom_vjp
def _warp(image, u):
    return alone(_gathered_corners, image, u)


def _gathered_corners(image, u):
    flat, out = image.reshape(-1, image.shape[-1]), 0
    if image.shape[-1] == 1 and jax.default_backend() != "gpu":
        flat = flat[:, 0]  # rows of one value are slow to gather
    low, fraction, _ = _cell(image.shape[:-1], u)
    for k in range(2**u.shape[-1]):
        index, weights, _ = _corner(image.shape[:-1], low, fraction, k)
        weight = math.prod(weights).astype(image.dtype)
        out += weight.reshape(*weight.shape, *(1,) * (flat.ndim - 1)) * jnp.take(flat, index, axis=0, mode="clip")
    return out.reshape(*u.shape[:-1], image.shape[-1])


def _warp_forward(image, u):
    return _warp(image, u), (image, u)


def _warp_backward(residuals, g):
    return alone(_scattered_corners, *residuals, g)


def _scattered_corners(image, u, g):
    flat = image.reshape(-1, image.shape[-1])
    low, fraction, inside = _cell(image.shape[:-1], u)

    def add(k, state):
        g_flat, g_u = state
        index, weights, signs = _corner(image.shape[:-1], low, fraction, k)
        along = (jnp.take(flat, index, axis=0, mode="clip") * g).sum(-1).astype(u.dtype)
        g_u = tuple(total + sign * math.prod(weights[:axis] + weights[axis + 1:]) * along
                    for axis, (total, sign) in enumerate(zip(g_u, signs, strict=True)))
        return g_flat.at[index].add(math.prod(weights)[..., None] * g, mode="drop"), g_u

    # Added up in float32: bfloat16 would lose what is small, and GPUs add it at half the rate.
    state = jnp.zeros(flat.shape, jnp.float32), (jnp.zeros(u.shape[:-1], u.dtype),) * u.shape[-1]
    if jax.default_backend() == "cpu":  # in a loop, since what each corner adds is as large as the result
        state = jax.lax.fori_loop(0, 2**u.shape[-1], add, state)
    else:
        for k in range(2**u.shape[-1]):
            state = add(k, state)
    g_flat, g_u = state
    g_u = jnp.stack([jnp.where(m, x, 0) for m, x in zip(inside, g_u, strict=True)], -1)
    return g_flat.reshape(image.shape).astype(image.dtype), g_u


_warp.defvjp(_warp_forward, _warp_backward)


def _on_tpu(image, u, near):
    if near:
        return _shifted(image, u)
    at_once = LANES >> u.shape[-1]
    return jnp.concatenate([_rows(image[..., k:k + at_once], u) for k in range(0, image.shape[-1], at_once)], -1)


SHIFTS = -1, 0, 1


@jax.custom_vjp
def _shifted(image, u):
    """out(x) = sum over k in {-1, 0, 1}^n of image(x + k) prod_a max(0, 1 - |u_a(x) - k_a|), for |u_a| <= 1: no
    gather, and its adjoint is no scatter."""
    padded, weights, space = _edge_padded(image), _hats(u), image.shape[:-1]
    return sum(math.prod(weights[axis][k] for axis, k in enumerate(shift)).astype(image.dtype)[..., None]
               * padded[tuple(slice(1 + k, 1 + k + n) for k, n in zip(shift, space, strict=True))]
               for shift in itertools.product(SHIFTS, repeat=len(space)))


def _edge_padded(image):
    return jnp.pad(image, [(1, 1)] * (image.ndim - 1) + [(0, 0)], mode="edge")


def _hats(u):
    """[{k: weight of the shift k}] of each axis."""
    return [{k: jnp.maximum(0, 1 - jnp.abs(u[..., axis] - k)) for k in SHIFTS} for axis in range(u.shape[-1])]


def _shifted_forward(image, u):
    return _shifted(image, u), (image, u)


def _shifted_backward(residuals, g):
    """The image gets a sum of slices as well. Autodiff's would be one of padded arrays, each of which the compiler for
    TPU writes to memory, at twice the traffic."""
    image, u = residuals
    space = image.shape[:-1]
    wide = jax.tree.map(lambda x: jnp.pad(x, [(2, 2)] * len(space) + [(0, 0)] * (x.ndim - len(space))), (_hats(u), g))

    def back(shift):
        (weights, g), part = wide, tuple(slice(1 - k, 3 - k + n) for k, n in zip(shift, space, strict=True))
        weight = math.prod(weights[axis][k] for axis, k in enumerate(shift))
        return weight[part].astype(g.dtype)[..., None] * g[part]

    g_padded = sum(map(back, itertools.product(SHIFTS, repeat=len(space))))
    g_image, = jax.linear_transpose(_edge_padded, image)(g_padded)
    return g_image, jax.vjp(lambda u: _shifted.__wrapped__(image, u), u)[1](g)[0]


_shifted.defvjp(_shifted_forward, _shifted_backward)


SAMPLED = "sampled"  # the name of what a TPU gathered: too dear to gather again where activations are computed again
LANES = 128  # values that lie side by side in a TPU's memory: up to here one gather costs the same


def _table(image):
    """(rows, LANES): a row holds both sides of a cell along every axis but the last, and two blocks along that.

    Rows begin with every block, so both corners along the last axis lie in one. Beyond the edge are zeros.
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
    """Voxels of a block along the last axis, of which a row of the table of an image (..., C) holds two."""
    return (LANES >> len(shape) - 1) // shape[-1]


def _row(shape, u, first):
    """The row of the table in which each sample finds its cell."""
    low, _, _ = _cell(shape[:-1], u, first)
    *low, last = low
    index = 0
    for n, x in zip(shape[:-2], low, strict=True):
        index = index * n + x
    block = _block(shape)
    return index * -(-shape[-2] // block) + last // block


def _combined(rows, shape, channels, u, first):
    """Rows (..., LANES) that the samples gathered -> their values (..., C), each the sum of its parts."""
    block, dims = _block(shape), u.shape[-1]
    low, fraction, inside = _cell(shape[:-1], u, first)
    # As in `_warp`: the derivative is that of u wherever the sample is inside, where `clip` halves it at the edge.
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
    """A float32 image as three of bfloat16 that add up to it, side by side (..., 3 C), since a tile of those is half as
    large; any other as it is. `reduce_precision`, since XLA would take a conversion back and forth for none."""
    if image.dtype != jnp.float32 or 3 * image.shape[-1] << image.ndim - 1 > LANES:
        return image
    parts = []
    for _ in range(3):
        parts.append(jax.lax.reduce_precision(image, 8, 7))
        image -= parts[-1]
    return jnp.concatenate(parts, -1).astype(jnp.bfloat16)


# A slice of u at a time: what its samples gather is LANES values for each. Along the second axis, since the first may
# be split over devices, and each of them would be sent all of u for every slice.
@jax.custom_vjp
def _rows(image, u):
    """As `_warp`, with all corners of a cell in one row, so that a sample is one gather of one row."""
    return _rows_by(lambda values, u: values(u), image, u)


def _slices(x):
    """(X, Y, ...) -> (Y, X, 1, ...)."""
    return jnp.moveaxis(x, 1, 0)[:, :, None]


def _rows_by(f, image, u):
    """f(values of the samples as a function of u, u) for each slice of u, put together again."""
    parts = _parts(image)
    table = _table(parts)

    def part(x):
        first, u = x
        rows = jnp.take(table, _row(parts.shape, u, first), axis=0, mode="clip").astype(image.dtype)
        return f(lambda u: _combined(rows, parts.shape, image.shape[-1], u, first), u)

    found = jax.lax.map(part, (jnp.arange(u.shape[1]), _slices(u)))
    return jax.tree.map(lambda x: jnp.moveaxis(x[:, :, 0], 0, 1), found)


def _rows_forward(image, u):
    """With the slopes of the samples along every axis, so that the backward pass has nothing to gather."""
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

    # Added up in float32, as in `_warp_backward`.
    g_table, _ = jax.lax.scan(part, jnp.zeros(table.shape), (jnp.arange(u.shape[1]), _slices(u), _slices(g)))
    g_table = g_table.astype(table.dtype)
    g_u = jnp.stack([(slope * g).sum(-1).astype(u.dtype) for slope in slopes], -1)
    return *jax.linear_transpose(_table, image)(g_table), g_u


_rows.defvjp(_rows_forward, _rows_backward)


def warp_nearest(labels, u):
    """The value of the nearest voxel at x + u(x), clamped at the edge: the one interpolation label maps may have.

    Args and shapes as `warp`; the labels keep their type.
    """
    def nearest(labels, u):
        index, space = 0, labels.shape[:-1]
        for axis, n in enumerate(space):
            x = identity_grid(u.shape[:-1])[..., axis] + u[..., axis]
            index = index * n + jnp.clip(jnp.round(x), 0, n - 1).astype(jnp.int32)
        return jnp.take(labels.reshape(-1, labels.shape[-1]), index, axis=0, mode="clip")

    return _batched(nearest, u)(labels, u)


def compose(u, s, reach=None):
    """The displacement of phi_u o phi_s: w(x) = s(x) + u(x + s(x)), all (..., D, H, W, 3) or (..., H, W, 2).

    `reach` is a bound on |s_a|, as in `warp`.
    """
    return s + warp(u, s, reach)
