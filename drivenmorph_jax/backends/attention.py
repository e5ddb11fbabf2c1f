"""Implementations of `network.attention.neighbours_attended` for each device."""

from functools import partial, reduce
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np

from drivenmorph_jax.backends import kernels
from drivenmorph_jax.backends.fusion import alone


def _gathered(queries, keys, values, radius):
    """For GPU: all shifts at once. The hundreds of small kernels of a loop take longer to start than to run.

    The gathered values are summed as they are read and never stored in memory. The backward pass is written out so that
    it does the same.
    """
    pad = [(0, 0)] + [(radius, radius)] * 3 + [(0, 0)] * 2
    return _side_by_side(queries, *(jnp.pad(x, pad, mode="edge") for x in (keys, values)))


@jax.custom_vjp
def _side_by_side(queries, keys, values):
    return _side_by_side_forward(queries, keys, values)[0]


def _shifts(queries, keys):
    """(shifts into the padded keys (K, 3), the same shifts relative to the voxel itself (K, 3))."""
    size = keys.shape[1] - queries.shape[1] + 1
    shifts = np.array(list(product(range(size), repeat=3)))
    return shifts, shifts - size // 2


def _near(x, space, shifts, own=False):
    """x (B, D, H, W, ...) at p + shift, for voxels p of a grid of `space`: (B, *space, K, ...), zero outside.

    With `own`, x has its own values for every shift: x (B, D, H, W, K, ...).
    """
    index, inside = 0, True
    for axis, n in enumerate(x.shape[1:4]):
        place = jnp.arange(space[axis]).reshape([-1 if k == axis else 1 for k in range(4)]) + shifts[:, axis]
        index, inside = index * n + place, inside & (place >= 0) & (place < n)
    if own:
        index = index * len(shifts) + jnp.arange(len(shifts))
    flat = x.reshape(len(x), -1, *x.shape[4 + own:])
    return jnp.take(flat, jnp.where(inside, index, flat.shape[1]), axis=1, mode="fill", fill_value=0)


def _side_by_side_forward(queries, keys, values):
    (places, shifts), space = _shifts(queries, keys), queries.shape[1:4]
    alpha = jax.nn.softmax((queries[..., None, :, :] * _near(keys, space, places)).sum(-1), axis=-2)
    attended = (alpha[..., None] * _near(values, space, places)).sum(-3)
    return (attended, (alpha.mean(-1)[..., None] * shifts).sum(-2)), (queries, keys, values, alpha)


def _side_by_side_backward(residuals, cotangents):
    queries, keys, values, alpha = residuals
    (g, g_offset), (places, shifts), space = cotangents, _shifts(queries, keys), queries.shape[1:4]
    g_alpha = (g[..., None, :, :] * _near(values, space, places)).sum(-1)
    g_alpha += (g_offset[..., None, :] * shifts).sum(-1, keepdims=True) / alpha.shape[-1]
    g_logits = alpha * (g_alpha - (alpha * g_alpha).sum(-2, keepdims=True))

    def adjoint(weight, x):
        back = keys.shape[1:4], -places
        return (_near(weight, *back, own=True)[..., None] * _near(x, *back)).sum(-3)

    g_queries = (g_logits[..., None] * _near(keys, space, places)).sum(-3)
    return g_queries, adjoint(g_logits, queries), adjoint(alpha, g)


_side_by_side.defvjp(_side_by_side_forward, _side_by_side_backward)


def _along_planes(queries, keys, values, radius):
    """For CPU and TPU: one plane of shifts after the other. Memory holds (2r+1)^2 maps of weights instead of (2r+1)^3.

    The last axis of the arrays is a padded plane of voxels, within which a shift is a slice. The channels come before
    it: on CPU, sums over a short last axis do not vectorise; a TPU stores the last axis in rows of 128 values, used or
    not.
    """
    space, r = queries.shape[1:4], radius
    wide = [n + 2 * r for n in space[1:]]
    reach = r * wide[1] + r

    def planes(x, first, mode, more):
        """(B, D, H, W, heads, C) -> (B, heads, C, D, voxels of a plane), padded by `first` planes and `more` voxels."""
        x = jnp.pad(jnp.moveaxis(x, (4, 5), (1, 2)), [(0, 0)] * 3 + [(first, first), (r, r), (r, r)], mode=mode)
        return _extended(x.reshape(*x.shape[:4], -1), more)

    def voxels(x):
        return x.reshape(*x.shape[:-1], *wide)[..., r:r + space[1], r:r + space[2]]

    total, attended, moved = _planes(planes(queries, 0, "constant", 0), planes(keys, r, "edge", reach),
                                     planes(values, r, "edge", reach), radius, wide[1])
    moved = jnp.stack([voxels((x / total).mean((1, 2))) for x in moved], -1)
    return jnp.moveaxis(voxels(attended / total), (1, 2), (4, 5)), moved


def _extended(x, voxels):
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(voxels, voxels)])


def _from(x, start, like):
    return jax.lax.slice_in_dim(x, start, start + like.shape[-1], axis=-1)


def _dot(x, y, start):
    """Sum over channels of x (B, heads, C, D, P) times the slice of y from voxel `start`: (B, heads, 1, D, P).

    The sum is written term by term, since XLA on CPU is far slower at a reduction. It takes a `slice` instead of an
    index, since a slice is traced in a third of the time.
    """
    *space, voxels = x.shape[:2] + (1,) + x.shape[3:]
    return sum(jax.lax.slice_in_dim(x, c, c + 1, axis=2)
               * jax.lax.slice(y, (0, 0, c, 0, start), (*space[:2], c + 1, space[3], start + voxels))
               for c in range(x.shape[2]))


def _shifts_in_plane(radius, row):
    """[(start of the slice in a plane padded by the reach, shift y, shift z)], with `row` voxels to a row."""
    return [((radius + y) * row + radius + z, y, z) for y, z in product(range(-radius, radius + 1), repeat=2)]


# The backward pass is written out, so that the gradients of keys and values are sums of slices, too. Those of automatic
# differentiation are sums of padded arrays, each of which a TPU writes to memory. Both passes compute the weights by
# `alone`, so that they are computed once for all channels.
@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _planes(q, k, v, radius, row):
    """The sums over all shifts of w, of w v, and of w times each component of the shift, where w = exp(q . k - m).

    m is the largest logit q . k of the voxel, so no sum can overflow or vanish. m needs no derivative, since it cancels
    in the quotients that the caller takes.
    """
    return _planes_forward(q, k, v, radius, row)[0]


def _planes_forward(q, k, v, radius, row):
    shifts = _shifts_in_plane(radius, row)

    def weigh(q, near_k, highest):
        """The largest logit of every voxel so far, and the weights of this plane's shifts relative to that logit."""
        logits = [_dot(q, near_k, start) for start, *_ in shifts]
        highest = reduce(jnp.maximum, logits, highest)
        return highest, [jnp.exp(x - highest) for x in logits]

    def gather(attended, fade, weights, near_v):
        return sum((w * _from(near_v, start, q) for w, (start, *_) in zip(weights, shifts, strict=True)),
                   fade * attended)

    def visit(carry, shift):
        highest, total, attended, *moved = carry
        near = partial(jax.lax.dynamic_slice_in_dim, start_index=shift + radius, slice_size=q.shape[3], axis=3)
        new, weights = alone(weigh, q, near(k), highest)
        fade = jnp.exp(highest - new)  # sums of the earlier planes are relative to their own largest logit
        here = sum(weights)
        moved = (fade * moved[0] + shift.astype(jnp.float32) * here,
                 fade * moved[1] + sum(y * w for w, (_, y, _) in zip(weights, shifts, strict=True)),
                 fade * moved[2] + sum(z * w for w, (_, _, z) in zip(weights, shifts, strict=True)))
        return (new, fade * total + here, alone(gather, attended, fade, weights, near(v)), *moved), None

    zero = jnp.zeros_like(q[:, :, :1])
    attended = jnp.zeros((*q.shape[:2], v.shape[2], *q.shape[3:]), v.dtype)
    start = jnp.full_like(zero, -jnp.inf), zero, attended, zero, zero, zero
    (highest, total, attended, *moved), _ = jax.lax.scan(visit, start, jnp.arange(-radius, radius + 1))
    return (total, attended, moved), (q, k, v, highest)


def _planes_backward(radius, row, residuals, cotangents):
    (q, k, v, highest), (g_total, g_attended, g_moved) = residuals, cotangents
    shifts = _shifts_in_plane(radius, row)
    more = k.shape[-1] - q.shape[-1]  # twice the reach
    wide_q, wide_g = _extended(q, more), _extended(g_attended, more)

    def weigh(q, near_k, near_v, highest, g_attended, g_total, g_moved, shift):
        """The weights and the cotangents of their logits, padded."""
        weights, of_logits = [], []
        for start, y, z in shifts:
            weight = jnp.exp(_dot(q, near_k, start) - highest)
            of_weight = _dot(g_attended, near_v, start) + g_total
            of_weight += shift.astype(jnp.float32) * g_moved[0] + y * g_moved[1] + z * g_moved[2]
            weights.append(_extended(weight, more))
            of_logits.append(_extended(weight * of_weight, more))
        return weights, of_logits

    def of_queries(g_q, of_logits, near_k):
        return sum((_from(x, more, q) * _from(near_k, start, q)
                    for x, (start, *_) in zip(of_logits, shifts, strict=True)), g_q)

    def back(near_g, maps, wide):
        return sum((_from(x, more - start, k) * _from(wide, more - start, k)
                    for x, (start, *_) in zip(maps, shifts, strict=True)), near_g)

    def visit(carry, shift):
        (g_q, g_k, g_v), at = carry, shift + radius
        near = partial(jax.lax.dynamic_slice_in_dim, start_index=at, slice_size=q.shape[3], axis=3)
        weights, of_logits = alone(weigh, q, near(k), near(v), highest, g_attended, g_total, g_moved, shift)
        g_q = alone(of_queries, g_q, of_logits, near(k))
        g_k, g_v = (jax.lax.dynamic_update_slice_in_dim(x, alone(back, near(x), maps, wide), at, 3)
                    for x, maps, wide in ((g_k, of_logits, wide_q), (g_v, weights, wide_g)))
        return (g_q, g_k, g_v), None

    start = tuple(jnp.zeros_like(x) for x in (q, k, v))
    return jax.lax.scan(visit, start, jnp.arange(-radius, radius + 1))[0]


_planes.defvjp(_planes_forward, _planes_backward)


LARGEST = 3  # radius of a neighbourhood that the kernel takes


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _by_kernel(queries, keys, values, radius):
    shapes = [(*queries.shape[:-1], values.shape[-1]), (*queries.shape[:4], 3)]
    return tuple(kernels.call("attention", shapes, queries, keys, values, vmap_method="sequential", radius=radius))


def _by_kernel_forward(queries, keys, values, radius):
    return _by_kernel(queries, keys, values, radius), (queries, keys, values)


def _by_kernel_backward(radius, arrays, cotangents):
    return tuple(kernels.call("attention_adjoint", [x.shape for x in arrays], *arrays, *cotangents,
                              vmap_method="sequential", radius=radius))


_by_kernel.defvjp(_by_kernel_forward, _by_kernel_backward)


def _on_cpu(queries, keys, values, radius):
    by_kernel = 1 <= radius <= LARGEST and kernels.usable(queries, keys, values)
    return (_by_kernel if by_kernel else _along_planes)(queries, keys, values, radius)


FORMS = {"cpu": _on_cpu, "gpu": _gathered, "tpu": _along_planes}
