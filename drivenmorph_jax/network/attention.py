"""Attention over neighbourhoods and over windows, and the Flax modules that use it.

The two functions take the heads as an axis of their own, (B, D, H, W, heads, C / heads), and return the same layout.
They do not scale the logits: the caller scales the queries.
"""

from itertools import product

import jax
import jax.numpy as jnp
from flax import linen as nn

from drivenmorph_jax.backends import chosen
from drivenmorph_jax.backends.attention import FORMS


def neighbourhood_attention(queries, keys, values, radius):
    """Attention of every voxel over the (2r+1)^3 voxels around it.

      alpha(x, delta) = softmax over |delta|_inf <= r of q(x) . k(x + delta)
      a(x) = sum_delta alpha(x, delta) v(x + delta)
      e(x) = sum_delta alpha(x, delta) delta, averaged over the heads

    Beyond the border, the keys and values of the nearest edge voxel are used. `neighbours_attended` computes the
    formula as it stands. `backends.attention` computes the same values faster on each device.

    Args:
      queries, keys: (B, D, H, W, heads, C); values: (B, D, H, W, heads, V).
      radius: r, in voxels.

    Returns:
      The attended values a (B, D, H, W, heads, V), and the expected offset e (B, D, H, W, 3) in voxels.
    """
    attend = chosen(FORMS, neighbours_attended)
    attended, offset = attend(*(x.astype(jnp.float32) for x in (queries, keys, values)), radius)
    return attended.astype(values.dtype), offset


def neighbours_attended(queries, keys, values, radius):
    """`neighbourhood_attention`, computed as its formula: memory holds the keys and values once for every shift."""
    shifts, space = list(product(range(-radius, radius + 1), repeat=3)), queries.shape[1:4]

    def near(x):
        """x at each of the K shifts: (B, D, H, W, heads, K, C)."""
        x = jnp.pad(x, [(0, 0)] + [(radius, radius)] * 3 + [(0, 0)] * 2, mode="edge")
        return jnp.stack([x[:, *(slice(radius + k, radius + k + n) for k, n in zip(shift, space, strict=True))]
                          for shift in shifts], -2)

    alpha = jax.nn.softmax((queries[..., None, :] * near(keys)).sum(-1), axis=-1)
    return (alpha[..., None] * near(values)).sum(-2), alpha.mean(-2) @ jnp.array(shifts, alpha.dtype)


def window_attention(queries, keys, values, window):
    """Attention within disjoint windows of `window`^3 voxels.

    The grid is zero-padded to whole windows. The padding is masked, so it gets no weight.

    Args:
      queries, keys, values: as for `neighbourhood_attention`.
      window: side of a window, in voxels.

    Returns:
      The attended values (B, D, H, W, heads, V).
    """
    b, *space, heads, _ = queries.shape
    counts = [-(-n // window) for n in space]

    def split(x):
        x = jnp.pad(x, [(0, 0)] + [(0, c * window - n) for c, n in zip(counts, space, strict=True)] + [(0, 0)] * 2)
        x = x.reshape(b, counts[0], window, counts[1], window, counts[2], window, *x.shape[4:])
        return x.transpose(0, 1, 3, 5, 2, 4, 6, 7, 8).reshape(-1, window**3, *x.shape[7:])

    q, k, v = split(queries), split(keys), split(values)
    inside = split(jnp.ones((b, *space, 1, 1)))[..., 0, 0]
    logits = jnp.einsum("nqhc,nkhc->nhqk", q, k, preferred_element_type=jnp.float32)
    alpha = jax.nn.softmax(jnp.where(inside[:, None, None] > 0, logits, -1e30), axis=-1)
    out = jnp.einsum("nhqk,nkhc->nqhc", alpha.astype(v.dtype), v)
    out = out.reshape(b, *counts, window, window, window, heads, -1).transpose(0, 1, 4, 2, 5, 3, 6, 7, 8)
    out = out.reshape(b, *(c * window for c in counts), heads, -1)
    return out[:, :space[0], :space[1], :space[2]]


def _cosine_heads(x, heads):
    """(B, D, H, W, C) -> (B, D, H, W, heads, C / heads), every vector scaled to unit length."""
    x = x.reshape(*x.shape[:-1], heads, -1).astype(jnp.float32)
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def _temperature(module, start):
    """A learned factor between 0 and 50 for cosines: it bounds the logits."""
    return 50 * jax.nn.sigmoid(module.param("temperature", nn.initializers.constant(start), ()))


class CrossAttention(nn.Module):
    """Cross-attention: where in the moving image does the structure lie that the fixed image shows at x?

    Queries and keys share one projection, so equal features attend to each other before any training. The values are
    the moving features themselves, so the attended features can be compared with the fixed ones.

    Returns the attended moving features a (B, D, H, W, C) and the expected offset e (B, D, H, W, 3) in voxels.
    """
    radius: int
    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, fixed, moving):
        channels = fixed.shape[-1]
        project = nn.Dense(channels, use_bias=False, dtype=self.dtype, kernel_init=nn.initializers.orthogonal(),
                           name="project")
        queries = _cosine_heads(project(fixed), self.heads) * _temperature(self, -1.4)
        keys = _cosine_heads(project(moving), self.heads)
        values = moving.reshape(*moving.shape[:-1], self.heads, -1)
        attended, offset = neighbourhood_attention(queries, keys, values, self.radius)
        return attended.reshape(moving.shape), offset


class SelfAttention(nn.Module):
    """Residual self-attention over difference tokens (B, D, H, W, C).

    It runs over windows of `window`^3 voxels where `window` > 0, else over neighbourhoods of radius `radius`.
    """
    heads: int
    radius: int = 0
    window: int = 0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens):
        channels = tokens.shape[-1]
        dense = lambda name: nn.Dense(channels, use_bias=False, dtype=self.dtype, name=name)  # noqa: E731
        queries = _cosine_heads(dense("query")(tokens), self.heads) * _temperature(self, -2.2)
        keys = _cosine_heads(dense("key")(tokens), self.heads)
        values = dense("value")(tokens).reshape(*tokens.shape[:-1], self.heads, -1)
        if self.window:
            out = window_attention(queries, keys, values, self.window)
        else:
            out, _ = neighbourhood_attention(queries, keys, values, self.radius)
        return tokens + dense("out")(out.reshape(tokens.shape))
