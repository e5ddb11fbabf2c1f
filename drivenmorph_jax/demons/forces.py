"""Forces: functions that compute a step for each voxel from a fixed and a warped moving image.

The images are (*space, C) with any number of axes. They have no batch axis; `jax.vmap` adds one. The forces for
`demons.demons` share one form:

  force(fixed, warped, max_step) -> (p, energy)

The step p (*space, n) is in voxels of the images. Its grid is that of the images or coarser by a whole factor. The
convergence test uses `energy`, the number that the force decreases.

The Demons forces solve the same damped Gauss-Newton step at each voxel:

  (sum_k w_k J_k J_k^T + lambda^2 I) p = sum_k w_k d_k J_k,   lambda^2 = sum_k w_k d_k^2 / (4 L^2)

d = fixed - warped is the difference and J is the image gradient. With A = sqrt(w) J and b = sqrt(w) d, the step is
(A^T A + lambda^2 I)^-1 A^T b. The norm of this operator is max s / (s^2 + lambda^2) <= 1 / (2 lambda), over the
singular values s of A. Because |b| = 2 L lambda, |p| <= L for every input: one update never moves a voxel further than
L.

References: Thirion, "Image matching as a diffusion process", 1998; Vercauteren et al., "Diffeomorphic demons", 2009.
"""

import functools
import itertools
import numbers
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from drivenmorph_jax.backends import channels, chosen, kernels
from drivenmorph_jax.backends.damped_step import FORMS
from drivenmorph_jax.backends.fusion import alone
from drivenmorph_jax.fields.grid import average_pool, difference, difference_adjoint
from drivenmorph_jax.fields.smooth import box_mean

# (fixed, warped moving image (*space, C), largest step L) -> (force (*space, n), energy)
Force = Callable[[chex.Array, chex.Array, float], tuple[jax.Array, jax.Array]]


def feature_force(d: chex.Array, slope: chex.Array, max_step: float, weights: chex.Array | None = None,
                  floor: float = 1e-6) -> jax.Array:
    """The multichannel Demons force, by a closed-form symmetric solve at each voxel.

      (sum_k w_k J_k J_k^T + lambda^2 I) p = sum_k w_k d_k J_k,   lambda^2 = sum_k w_k d_k^2 / (4 L^2)

    Args:
      d: (*space, C) differences d_k, fixed - moving.
      slope: (*space, C). The gradients J_k are the central differences of its channels.
      max_step: the bound L, in voxels.
      weights: (*space, C) non-negative weights w_k; 1 if left out.
      floor: added to lambda^2. It keeps the solution and its derivative bounded in flat regions. It can only shorten
        the step.

    Returns:
      p (*space, n) in voxels, |p| <= L. It is zero where d is zero or all gradients are.
    """
    dims = d.ndim - 1
    if d.shape[-1] == 1:
        # With one channel the solution is p = w d J / (w |J|^2 + lambda^2), which XLA fuses into one pass.
        w = 1 if weights is None else weights
        slopes = [difference(slope, axis, dims) for axis in range(dims)]
        along = w * d / (w * sum(x * x for x in slopes) + w * d * d / (4 * max_step**2) + floor)
        return clip_length(jnp.concatenate([along * x for x in slopes], -1), max_step)
    weights = jnp.ones_like(d) if weights is None else weights
    # A kernel takes its numbers when a program is compiled, so it has no derivative by them.
    constant = all(isinstance(x, numbers.Real) for x in (max_step, floor))
    by_kernel = dims == 3 and constant and kernels.usable(d, slope, weights)
    step = chosen(FORMS, damped_step) if by_kernel else damped_step
    return clip_length(step(d, slope, weights, 1 / (4 * max_step**2), floor), max_step)


# The backward pass is written by hand. It is one more solve with the same matrix, and it reads every channel only once.
@jax.custom_vjp
def damped_step(d, slope, weights, share, floor):
    """The solution p (*space, n) of the damped step.

      (sum_k w_k J_k J_k^T + lambda^2 I) p = sum_k w_k d_k J_k,   lambda^2 = share sum_k w_k d_k^2 + floor
    """
    return _damped_step_forward(d, slope, weights, share, floor)[0]


def _damped_step_forward(d, slope, weights, share, floor):
    dims = d.ndim - 1
    pairs = list(itertools.combinations_with_replacement(range(dims), 2))

    def products(d, slope, w):
        x = [difference(slope, axis, dims) for axis in range(dims)]
        factors = [(x[i], x[j]) for i, j in pairs] + [(x[i], d) for i in range(dims)] + [(d, d)]
        return [w * p * q for p, q in factors]

    sums = channels.summed(products, (d, slope, weights))
    damping = share * sums[-1] + floor
    matrix = {(i, j): total + damping * (i == j) for (i, j), total in zip(pairs, sums, strict=False)}
    # The matrix is scaled to unit trace, so that no product of its entries leaves the range of float32.
    scale = 1 / sum(matrix[i, i] for i in range(dims))
    matrix = {ij: scale * entry for ij, entry in matrix.items()}
    p = _solve(matrix, [scale * entry for entry in sums[len(pairs):-1]], scale * damping)
    return jnp.stack(p, -1), (d, slope, weights, share, floor, p, matrix, scale, damping)


def _damped_step_backward(residuals, g):
    """The cotangents of the arguments of `damped_step`, for the cotangent g of p.

    q solves the same system with g on its right-hand side. The cotangents of every channel are the derivatives, at
    fixed p and q, of

      q . (sum_k w_k J_k (d_k - J_k . p) - lambda^2 p)
    """
    d, slope, weights, share, floor, p, matrix, scale, damping = residuals
    dims = len(p)
    q = _solve(matrix, [scale * x for x in jnp.moveaxis(g, -1, 0)], scale * damping)
    both = sum(x * y for x, y in zip(p, q, strict=True))

    def products(d, slope, w):
        x = [difference(slope, axis, dims) for axis in range(dims)]
        left = d - sum(p[axis][..., None] * x[axis] for axis in range(dims))
        along = sum(q[axis][..., None] * x[axis] for axis in range(dims))
        bend = share * both[..., None] * d
        of_jacobian = [w * (left * q[axis][..., None] - along * p[axis][..., None]) for axis in range(dims)]
        return w * (along - 2 * bend), of_jacobian, along * left - bend * d

    def channel(d, slope, w):
        # `alone`, because XLA on CPU would compute the products again for every neighbour that a difference reads.
        of_d, of_jacobian, of_w = alone(products, d, slope, w)
        return of_d, sum(difference_adjoint(x, axis, dims) for axis, x in enumerate(of_jacobian)), of_w

    of_channels = channels.mapped(channel, (d, slope, weights))
    return *of_channels, -(both * (damping - floor) / share).sum(), -both.sum()


damped_step.defvjp(_damped_step_forward, _damped_step_backward)


def _solve(matrix, right, least):
    """The solution of a symmetric system. Its upper triangle is matrix[i, j], i <= j; its eigenvalues are >= `least`.

    The method is L D L^T. With a single strong gradient, the adjugate would lose a term lambda^4 to rounding, where
    L D L^T loses only lambda^2. Only rounding can make a pivot smaller than `least`, so pivots are raised to it.
    """
    matrix, right, dims = dict(matrix), list(right), len(right)
    for k in range(dims):
        if k:
            matrix[k, k] = jnp.maximum(matrix[k, k], least)
        for i in range(k + 1, dims):
            factor = matrix[k, i] / matrix[k, k]
            right[i] = right[i] - factor * right[k]
            for j in range(i, dims):
                matrix[i, j] = matrix[i, j] - factor * matrix[k, j]
    for k in reversed(range(dims)):
        right[k] = (right[k] - sum(matrix[k, j] * right[j] for j in range(k + 1, dims))) / matrix[k, k]
    return right


def clip_length(p: chex.Array, max_step: float) -> jax.Array:
    """p min(1, L / |p|): vectors (..., n) of length L at most, L = `max_step`.

    A Demons force obeys this bound already, up to rounding.
    """
    return _scaled(p, lambda square: jnp.minimum(1, max_step * jax.lax.rsqrt(jnp.maximum(square, 1e-12))))


def squash(p: chex.Array, max_step: float) -> jax.Array:
    """p / sqrt(1 + |p|^2 / L^2): vectors (..., n) of the same direction and shorter than L = `max_step`.

    It is a smooth function of p.
    """
    return _scaled(p, lambda square: jax.lax.rsqrt(1 + square / max_step**2))


def _scaled(p, factor):
    """p factor(|p|^2), computed one component at a time.

    A sum over such a short axis is slow on CPU, and the derivative of the product would contain another one.
    """
    components = jnp.moveaxis(p, -1, 0)
    scale = factor(sum(x * x for x in components))
    return jnp.stack([x * scale for x in components], -1)


def thirion_force(fixed: chex.Array, warped: chex.Array, max_step: float) -> tuple[jax.Array, jax.Array]:
    """Thirion's force: J is the gradient of the fixed image. The energy is the mean of d^2, d = fixed - warped.

    Args:
      fixed, warped: (*space, C).
      max_step: the bound L, in voxels.

    Returns:
      p (*space, n) in voxels, |p| <= L, and the energy.

    Reference: Thirion, "Image matching as a diffusion process", 1998.
    """
    d = fixed - warped
    return feature_force(d, fixed, max_step), (d * d).mean()


def symmetric_force(fixed: chex.Array, warped: chex.Array, max_step: float) -> tuple[jax.Array, jax.Array]:
    """The symmetric (ESM) force of Vercauteren: J is the mean of the gradients of both images.

    The energy is the mean of d^2, d = fixed - warped. The channels can be intensities, features or MIND descriptors.

    Args:
      fixed, warped: (*space, C).
      max_step: the bound L, in voxels.

    Returns:
      p (*space, n) in voxels, |p| <= L, and the energy.

    Reference: Vercauteren et al., "Diffeomorphic demons", 2009.
    """
    d = fixed - warped
    return feature_force(d, 0.5 * (fixed + warped), max_step), (d * d).mean()


def lncc_force(fixed: chex.Array, warped: chex.Array, max_step: float, radius: int = 2, block: int = 2,
               floor: float = 1e-4, power: float = 0.7) -> tuple[jax.Array, jax.Array]:
    """The force of local correlation: the gradient of the squared local correlation, averaged over channels.

    F and M are a channel of `fixed` and of `warped`. <.> is the mean over the window around y. a and b are the
    deviations of F and M from their means mean_F and mean_M over this window. S is the mean over all y in the window
    around x.

      cc(y) = <a b>^2 / (<a a> <b b>),   A = <a b> / (<a a> <b b>),   B = A <a b> / <b b>,
      g(x) = S A F - S B M - S (A mean_F - B mean_M)  ~  d(mean_y cc) / d M(x)
      q = mean over channels and blocks of g grad M,   p = q / |q| (|q| / max |q|)^power L

    The window around x holds y exactly where the window around y holds x, so no scatter is needed. The statistics are
    computed on blocks of voxels. Each block is summed once, then separable sums run over (2 radius + 1)^n blocks. This
    costs 1 / block^n of sums over single voxels.

    Args:
      fixed, warped: (*space, C), with values of about 0 to 1. The sides are multiples of `block`.
      max_step: L, the length of the longest vector, in voxels.
      radius: radius of the window in blocks. The window is (2 radius + 1) * block voxels wide.
      block: side of a block, in voxels.
      floor: added to both variances, so that noise in flat regions does not count as structure.
      power: with 1, p is proportional to the gradient. With less, the long vectors at strong edges count for less.

    Returns:
      p (*space / block, n) in voxels of the images, and the energy 1 - mean cc.

    Reference: Avants et al., "Symmetric diffeomorphic image registration with cross-correlation", 2008; the exact
      derivative as in Hermosillo, Chefd'hotel, Faugeras, "Variational methods for multimodal image matching", 2002.
    """
    found = [_of_correlation(*pair, radius, block, floor) for pair in zip(_channels(fixed), _channels(warped),
                                                                          strict=True)]
    p, energy = (sum(parts) / len(found) for parts in zip(*found, strict=True))
    p = scale_longest(p, 1)
    # The 1e-8 keeps the derivative of the power finite where p is zero.
    return max_step * p * ((p * p).sum(-1, keepdims=True) + 1e-8) ** ((power - 1) / 2), energy


def _of_correlation(fixed, warped, radius, block, floor):
    """(q, 1 - mean cc) of `lncc_force` for one channel (*space)."""
    dims = fixed.ndim

    def pool(x):
        return average_pool(x[..., None], block, dims)[..., 0]

    mean_f, mean_m = box_mean(pool(fixed), radius), box_mean(pool(warped), radius)
    ff = jnp.maximum(box_mean(pool(fixed * fixed), radius) - mean_f**2, 0) + floor
    mm = jnp.maximum(box_mean(pool(warped * warped), radius) - mean_m**2, 0) + floor
    fm = box_mean(pool(fixed * warped), radius) - mean_f * mean_m
    a = fm / (ff * mm)
    b = a * fm / mm
    of_f, of_m, constant = (box_mean(x, radius) for x in (a, b, a * mean_f - b * mean_m))
    slopes = [difference(warped[..., None], axis, dims)[..., 0] for axis in range(dims)]
    q = jnp.stack([of_f * pool(fixed * x) - of_m * pool(warped * x) - constant * pool(x) for x in slopes], -1)
    return q, 1 - (fm * a).mean()


def _channels(image):
    """The channels (*space) of an image (*space, C)."""
    return [image[..., k] for k in range(image.shape[-1])]


@functools.cache
def masked(force: Force) -> Force:
    """The force `force`, limited to where both images have the weight 1.

    The last channel of each image is its weight: 1 where the image counts and 0 where it does not. It is warped and
    pooled with the other channels. The result is a force (fixed, warped, max_step) -> (p, energy). Its p is zero
    wherever the weight of either image is below 1.
    """
    def masked_force(fixed, warped, max_step):
        p, energy = force(fixed[..., :-1], warped[..., :-1], max_step)
        weight = jnp.minimum(fixed[..., -1:], warped[..., -1:])
        return p * (average_pool(weight, weight.shape[0] // p.shape[0], p.shape[-1]) > 0.999), energy

    return masked_force


def scale_longest(p: chex.Array, max_step: float) -> jax.Array:
    """p L / max |p|: vectors (*space, n), of which the longest has the length L = `max_step`. Zero stays zero."""
    return p * (max_step / jnp.maximum(jnp.sqrt((p * p).sum(-1).max()), 1e-12))


def mind(image: chex.Array, distance: int = 1, radius: int = 1) -> jax.Array:
    """The modality-independent neighbourhood descriptor: (*space, C) -> (*space, 2 n C), values in (0, 1].

      MIND(x, r) = exp(-D(x, r) / V(x)) / max over r    of each channel I

    r is one of the 2 n steps of `distance` voxels along the axes. D(x, r) is the mean of (I(y) - I(y + r))^2 over the
    window of 2 `radius` + 1 voxels a side around x. V(x) is the mean of D(x, r) over r.

    An image and its negative have the same descriptor. V is kept between a thousandth of its mean and a thousand times
    its mean, so that the descriptor of a flat region is 1.

    Reference: Heinrich et al., "MIND: modality independent neighbourhood descriptor for multi-modal deformable
      registration", 2012.
    """
    return jnp.concatenate([_descriptor(x, distance, radius) for x in _channels(image)], -1)


def _descriptor(x, distance, radius):
    """`mind` of one channel (*space)."""
    distances = []
    for axis in range(x.ndim):
        for step in (-distance, distance):
            index = jnp.clip(jnp.arange(x.shape[axis]) + step, 0, x.shape[axis] - 1)
            distances.append(box_mean((x - jnp.take(x, index, axis)) ** 2, radius))
    distances = jnp.stack(distances, -1)
    variance = distances.mean(-1, keepdims=True)
    typical = variance.mean() + 1e-12
    variance = jnp.clip(variance, 1e-3 * typical, 1e3 * typical)
    return jnp.exp((distances.min(-1, keepdims=True) - distances) / variance)
