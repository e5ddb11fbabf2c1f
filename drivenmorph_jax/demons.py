"""The Demons algorithm as plain functions: force -> smooth -> exponentiate -> update, coarse to fine.

Every force solves the same damped Gauss-Newton step per voxel,

  (sum_k w_k J_k J_k^T + lambda^2 I) p = sum_k w_k d_k J_k,   lambda^2 = sum_k w_k d_k^2 / (4 L^2),

with d = fixed - moving the difference, J its gradient. Written with A = sqrt(w) J and b = sqrt(w) d, the step is
(A^T A + lambda^2 I)^-1 A^T b, whose operator norm is max s / (s^2 + lambda^2) <= 1 / (2 lambda) over singular values s
of A. As |b| = 2 L lambda, |p| <= L for every input: one update never moves a voxel further than L.

References: Thirion, "Image matching as a diffusion process", 1998; Vercauteren et al., "Diffeomorphic demons", 2009;
"Symmetric log-domain diffeomorphic registration", 2008.
"""

from functools import partial

import jax
import jax.numpy as jnp

from drivenmorph_jax.grid import along_axes, average_pool, difference, resize_field
from drivenmorph_jax.integrate import exponential
from drivenmorph_jax.warp import compose, warp


def feature_force(d, slope, max_step, weights=None, floor=1e-6):
    """The multichannel Demons force: the damped step above, by a closed-form 3x3 symmetric solve per voxel.

    Args:
      d: (..., D, H, W, C) differences fixed - moving.
      slope: (..., D, H, W, C), what the gradients J_k are taken of, by central differences.
      max_step: the bound L, in voxels.
      weights: (..., D, H, W, C), non-negative; one where left out.
      floor: added to lambda^2, keeps the solve and its derivative tame in flat regions; it only shortens the step.

    Returns:
      p (..., D, H, W, 3) in voxels, |p| <= L; zero where d or the gradients are.
    """
    weights = jnp.ones_like(d) if weights is None else weights

    # One channel at a time: ten sums over a short trailing axis do not vectorise, and all gradients at once are three
    # more feature maps to write and read. Floor: read d, slope and weights once.
    @jax.checkpoint
    def add(sums, channel):
        d, slope, w = channel
        x, y, z = (difference(slope[..., None], axis)[..., 0] for axis in range(3))
        products = (x, x), (y, y), (z, z), (y, z), (x, z), (x, y), (x, d), (y, d), (z, d), (d, d)
        return tuple(total + w * p * q for total, (p, q) in zip(sums, products, strict=True)), None

    channels = tuple(jnp.moveaxis(x, -1, 0) for x in (d, slope, weights))
    sums, _ = jax.lax.scan(add, (jnp.zeros(d.shape[:-1], d.dtype),) * 10, channels)
    damping = sums[9] / (4 * max_step**2) + floor
    a, b, c = (diagonal + damping for diagonal in sums[:3])
    # Unit trace, so that no product of three entries leaves float32's range.
    scale = 1 / (a + b + c)
    a, b, c, f, e, g, r, s, t, damping = (scale * entry for entry in (a, b, c, *sums[3:9], damping))
    # L D L^T, not the adjugate: on a single strong gradient that would lose lambda^4, this only lambda^2. No pivot is
    # below lambda^2 but by rounding.
    ba, ca = g / a, e / a
    b, f = jnp.maximum(b - g * ba, damping), f - e * ba
    cb = f / b
    c = jnp.maximum(c - e * ca - f * cb, damping)
    s = s - ba * r
    z = (t - ca * r - cb * s) / c
    y = s / b - cb * z
    x = r / a - ba * y - ca * z
    return clip_length(jnp.stack([x, y, z], -1), max_step)


def clip_length(p, max_step):
    """p min(1, L / |p|): vectors (..., 3) no longer than L; only rounding makes this act on a Demons force."""
    square = (p * p).sum(-1, keepdims=True)
    return p * jnp.minimum(1, max_step * jax.lax.rsqrt(jnp.maximum(square, 1e-12)))


def squash(p, max_step):
    """p / sqrt(1 + |p|^2 / L^2): the same direction, shorter than L, and smooth."""
    return p * jax.lax.rsqrt(1 + (p * p).sum(-1, keepdims=True) / max_step**2)


def thirion_force(fixed, moving, max_step):
    """Thirion's force: the gradient is the fixed image's. Images (..., D, H, W, C) -> (..., D, H, W, 3) voxels."""
    return feature_force(fixed - moving, fixed, max_step)


def symmetric_force(fixed, moving, max_step, weights=None, floor=1e-6):
    """The symmetric (ESM) force: the gradient is the mean of both images'. Any channel count, as `feature_force`."""
    return feature_force(fixed - moving, 0.5 * (fixed + moving), max_step, weights, floor)


def gaussian_smooth(x, sigma):
    """Separable Gaussian of standard deviation `sigma` voxels (a number or traced) over (..., D, H, W, C).

    The weights are renormalised at the border, so every output is a weighted mean of inputs and no bound on |x| is
    lost. sigma = 0 is the identity.
    """
    def matrix(n):
        distance = jnp.arange(n)[:, None] - jnp.arange(n)[None, :]
        kernel = jnp.exp(-0.5 * (distance / jnp.maximum(sigma, 1e-3)) ** 2)
        return kernel / kernel.sum(1, keepdims=True)

    return along_axes([matrix(n) for n in x.shape[-4:-1]], x)


def lie_bracket(v, u):
    """[v, u] = Dv u - Du v of velocities (..., D, H, W, 3), in voxels."""
    return sum(difference(v, axis) * u[..., axis, None] - difference(u, axis) * v[..., axis, None]
               for axis in range(3))


def bch(v, u):
    """Velocity Z of exp(v) o exp(u) to third order: v + u + [v, u]/2 + [v, [v, u]]/12 (Baker-Campbell-Hausdorff)."""
    bracket = lie_bracket(v, u)
    return v + u + bracket / 2 + lie_bracket(v, bracket) / 12


def compositional_update(u, delta, steps=4):
    """phi <- phi o exp(delta): displacements and velocity (..., D, H, W, 3) in voxels."""
    return compose(u, exponential(delta, steps))


def inverse_update(u_inverse, delta, steps=4):
    """phi^-1 <- exp(-delta) o phi^-1, the inverse of `compositional_update` at the same cost."""
    return compose(exponential(-delta, steps), u_inverse)


def log_update(v, delta, sigma):
    """v <- K_diff * Z(v, delta): the log-domain update, whose transform is exp(v) and inverse exp(-v)."""
    return gaussian_smooth(bch(v, delta), sigma)


@partial(jax.jit, static_argnames=("force", "iterations", "update", "max_step"))
def demons_level(fixed, moving, field, *, force, iterations, max_step, sigma_fluid, sigma_diffusion, update):
    """`iterations` of Demons at one resolution, from `field` (a displacement, or a velocity for update="log")."""
    def step(_, field):
        u = exponential(field) if update == "log" else field
        delta = gaussian_smooth(force(fixed, warp(moving, u), max_step), sigma_fluid)
        if update == "log":
            return log_update(field, delta, sigma_diffusion)
        return gaussian_smooth(compositional_update(field, delta), sigma_diffusion)

    return jax.lax.fori_loop(0, iterations, step, field)


def demons(fixed, moving, *, force=symmetric_force, iterations=(100, 60, 30), max_step=1.0, sigma_fluid=1.0,
           sigma_diffusion=1.0, update="compositional", initial=None):
    """Register two images by multi-resolution Demons, with no network.

    Args:
      fixed, moving: (..., D, H, W, C) on one grid, comparable intensities; sides multiples of 2^(levels - 1).
      force: function (fixed, warped moving, max_step) -> (..., D, H, W, 3).
      iterations: coarse to fine, one entry a level; each level has twice the resolution of the one before.
      max_step: bound L on one update, in voxels of its level.
      sigma_fluid, sigma_diffusion: Gaussian smoothing of the update and of the total, in voxels of the level.
      update: "compositional" (phi <- phi o exp(delta)) or "log" (v <- Z(v, delta)).
      initial: displacement (or velocity) to start from, at full resolution.

    Returns:
      Displacement (..., D, H, W, 3) in voxels; for update="log" the velocity, whose exponential it is.
    """
    levels = len(iterations)
    field = jnp.zeros((*fixed.shape[:-1], 3), jnp.float32) if initial is None else initial
    for level, count in enumerate(iterations):
        factor = 2 ** (levels - 1 - level)
        small_fixed, small_moving = average_pool(fixed, factor), average_pool(moving, factor)
        field = resize_field(field, small_fixed.shape[-4:-1])
        field = demons_level(small_fixed, small_moving, field, force=force, iterations=count, max_step=max_step,
                             sigma_fluid=sigma_fluid, sigma_diffusion=sigma_diffusion, update=update)
    return field
