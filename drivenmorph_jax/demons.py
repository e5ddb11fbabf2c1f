"""The Demons algorithm as plain functions: force -> smooth -> exponentiate -> update, coarse to fine.

The forces are in `forces.py`. Fields are (..., D, H, W, 3) or (..., H, W, 2), in voxels of their own grid.

References: Thirion, "Image matching as a diffusion process", 1998; Vercauteren et al., "Diffeomorphic demons", 2009.
"""

from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from drivenmorph_jax.forces import lncc_force, masked, mind, scale_longest, symmetric_force
from drivenmorph_jax.grid import along_axes, average_pool, coarsen_field, difference, resize_field
from drivenmorph_jax.integrate import exponential, inverse
from drivenmorph_jax.jacobian import jacobian_determinant
from drivenmorph_jax.warp import compose, warp


def gaussian_smooth(x, sigma, dims=3):
    """Separable Gaussian of standard deviation `sigma` voxels (a number or traced) over (..., D, H, W, C).

    The weights are renormalised at the border, so every output is a weighted mean of inputs and no bound on |x| is
    lost. sigma = 0 is the identity.
    """
    def matrix(n):
        distance = jnp.arange(n)[:, None] - jnp.arange(n)[None, :]
        kernel = jnp.exp(-0.5 * (distance / jnp.maximum(sigma, 1e-3)) ** 2)
        return kernel / kernel.sum(1, keepdims=True)

    return along_axes([matrix(n) for n in x.shape[-1 - dims:-1]], x)


def lie_bracket(v, u):
    """[v, u] = Dv u - Du v of velocities (..., D, H, W, 3), in voxels."""
    dims = v.shape[-1]
    return sum(difference(v, axis, dims) * u[..., axis, None] - difference(u, axis, dims) * v[..., axis, None]
               for axis in range(dims))


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
    return gaussian_smooth(bch(v, delta), sigma, v.shape[-1])


def symmetric_log_update(v, delta, delta_back, sigma):
    """v <- K_diff * (Z(v, delta) - Z(-v, delta_back)) / 2, with `delta_back` the update that exp(-v) asks for.

    Swapping the two images changes the sign of v, to the last bit but for rounding: the inverse is the same result.

    Reference: Vercauteren et al., "Symmetric log-domain diffeomorphic registration: a demons-based approach", 2008.
    """
    return gaussian_smooth(0.5 * (bch(v, delta) - bch(-v, delta_back)), sigma, v.shape[-1])


# Settings of `demons`: for local correlation of one channel, and for `symmetric_force` and `thirion_force` on
# intensities or any feature stack.
LNCC = {"force": lncc_force, "iterations": (100, 50, 20), "max_step": 1.0, "scale": True, "sigma_fluid": 0.87,
        "sigma_diffusion": 0.35}
INTENSITY = {"force": symmetric_force, "iterations": (100, 80, 8), "max_step": 2.0, "scale": False,
             "sigma_fluid": 0.5, "sigma_diffusion": 0.5}
FORCES = {  # name: what makes the features of an image, and the settings of `demons`
    "lncc": (lambda x: x, LNCC),
    "intensity": (lambda x: x, INTENSITY),
    "mind": (jax.jit(mind), INTENSITY),
}
MULTIPLE = 8  # of sides: three levels halve them twice, and the field is half as fine


class Registered(NamedTuple):
    """What `demons` found: `u` (*space, n) in voxels; `velocity` whose exponential it is, for update="log", else None;
    `energies`, one array a level, coarse to fine, its entries after an early stop nan."""
    u: chex.Array
    velocity: chex.Array | None
    energies: tuple[chex.Array, ...]


# Squarings of the flow of one update: with a step of one voxel of the image, half of one of the field, the first moves
# an eighth of a voxel.
UPDATE_STEPS = 2
# Iterations over which the energy is averaged before it is compared.
PATIENCE = 5
# What 5 more iterations must gain at least for `refine` to have anything to refine: on real brains, what has converged
# gains .1 to .2 % of local correlation's energy, .6 to 1.2 % of a squared difference's, what has not .4 and 20 %.
SETTLED = {"lncc": 3e-3, "intensity": 2e-2, "mind": 2e-2}


@partial(jax.jit, static_argnames=("force", "iterations", "update", "max_step", "scale", "tolerance"))
def demons_level(fixed, moving, field, *, force, iterations, max_step, scale, sigma_fluid, sigma_diffusion, update,
                 tolerance):
    """Up to `iterations` of Demons at one resolution: one program, with nothing but the loop's end decided outside.

    Args:
      fixed, moving: (*space, C).
      field: displacement, or velocity for update="log", on the grid of the images or on one `stride` times coarser, in
        voxels of its own grid. The force is averaged over the images' voxels that a voxel of the field covers.
      The others as in `demons`.

    Returns:
      The new field, and the energy before each iteration (iterations,).
    """
    dims = field.shape[-1]
    space = fixed.shape[:-1]
    stride = space[0] // field.shape[0]

    def delta(fixed, moving, u):
        p, energy = force(fixed, warp(moving, resize_field(u, space) if stride > 1 else u), max_step)
        # One component at a time: XLA then never writes the vectors of a fine force.
        coarser = p.shape[0] // field.shape[0]
        if not coarser:
            raise ValueError(f"the force comes on a grid of {p.shape[:-1]}, coarser than the field's "
                             f"{field.shape[:-1]}: raise stride, or for lncc_force lower block")
        p = jnp.stack([average_pool(x[..., None], coarser, dims)[..., 0] for x in jnp.moveaxis(p, -1, 0)], -1)
        p = gaussian_smooth(p / stride, sigma_fluid, dims)
        return scale_longest(p, max_step / stride) if scale else p, energy

    def step(i, state):
        field, energies = state
        if update == "log":
            there, energy = delta(fixed, moving, exponential(field))
            back, energy_back = delta(moving, fixed, exponential(-field))
            field, energy = symmetric_log_update(field, there, back, sigma_diffusion), 0.5 * (energy + energy_back)
        else:
            there, energy = delta(fixed, moving, field)
            field = gaussian_smooth(compositional_update(field, there, UPDATE_STEPS), sigma_diffusion, dims)
        return field, energies.at[i].set(energy)

    state = field, jnp.full(iterations, jnp.nan)
    if not tolerance or iterations <= 2 * PATIENCE:
        return jax.lax.fori_loop(0, iterations, step, state)

    def going_on(state):
        i, (_, energies) = state
        last = [jax.lax.dynamic_slice_in_dim(energies, i - k * PATIENCE, PATIENCE).mean() for k in (1, 2)]
        return (i < iterations) & ((i < 2 * PATIENCE) | (last[1] - last[0] > tolerance * last[1]))

    return jax.lax.while_loop(going_on, lambda state: (state[0] + 1, step(*state)), (0, state))[1]


def demons(fixed, moving, *, force=LNCC["force"], iterations=LNCC["iterations"], stride=2, max_step=LNCC["max_step"],
           scale=LNCC["scale"], sigma_fluid=LNCC["sigma_fluid"], sigma_diffusion=LNCC["sigma_diffusion"],
           update="compositional", tolerance=5e-4, initial=None):
    """Register two images by multi-resolution Demons, with no network.

    At every level, until the energy stands still:

      delta = K_fluid * force(fixed, moving o phi),   phi <- K_diff * (phi o exp(delta))

    The defaults are `LNCC`, for local correlation; `INTENSITY` holds those for the Demons forces.

    Args:
      fixed, moving: (*space, C) on one grid, of values of about 0 to 1; sides multiples of stride 2^(levels - 1). For
        `lncc_force` one channel, for the others any number: intensities, `mind` descriptors, a network's features.
      force: function (fixed, warped moving, max_step) -> (p, energy), see `forces.py`.
      iterations: largest number at each level, coarse to fine; each has twice the resolution of the one before. 0
        leaves a level out.
      stride: the field's grid is this many times coarser than the images' of its level.
      max_step: L, in voxels of the level's images: what one update moves a voxel at most.
      scale: make the longest vector of every smoothed update L, for forces whose length means nothing, as a gradient's.
      sigma_fluid, sigma_diffusion: Gaussian smoothing of the update and of the total, in voxels of the level's field.
      update: "compositional", or "log" for v <- K_diff * (Z(v, delta) - Z(-v, delta_back)) / 2, phi = exp(v), which is
        symmetric: swapped images give the inverse.
      tolerance: a level ends when the energy's mean over 5 iterations falls by less than this part of it. With 0 the
        loop has a fixed length, which `jax.grad` needs.
      initial: displacement (or velocity) (*space, n) to start from, in voxels of the images.

    Returns:
      A `Registered`, with the displacement on the images' grid.

    Raises:
      ValueError: a side that the levels and the stride do not divide, a force on a coarser grid than the field's, or
        an unknown `update`.
    """
    if update not in ("compositional", "log"):
        raise ValueError(f"update is {update!r}: set it to 'compositional' or 'log'")
    space, levels, dims = fixed.shape[:-1], len(iterations), fixed.ndim - 1
    multiple = stride * 2 ** (levels - 1)
    if any(n % multiple for n in space):
        raise ValueError(f"{levels} levels with stride {stride} need sides that are multiples of {multiple}, "
                         f"got {space}: pad the images or take fewer levels")
    field = jnp.zeros((*space, dims), jnp.float32) if initial is None else initial
    energies = []
    for level, count in enumerate(iterations):
        if not count:
            energies.append(jnp.zeros(0))
            continue
        small = _at_level(fixed, moving, field, 2 ** (levels - 1 - level), stride)
        field, trace = demons_level(*small, force=force, iterations=count, max_step=max_step, scale=scale,
                                    sigma_fluid=sigma_fluid, sigma_diffusion=sigma_diffusion, update=update,
                                    tolerance=tolerance)
        energies.append(trace)
    field, u = _at_end(field, space, update)
    return Registered(u, field if update == "log" else None, tuple(energies))


# Compiled, since every operation outside a compiled function is compiled by itself.
@partial(jax.jit, static_argnames=("factor", "stride"))
def _at_level(fixed, moving, field, factor, stride):
    dims, space = field.shape[-1], [n // (factor * stride) for n in fixed.shape[:-1]]
    field = (coarsen_field if space[0] < field.shape[0] else resize_field)(field, space)
    return average_pool(fixed, factor, dims), average_pool(moving, factor, dims), field


@partial(jax.jit, static_argnames=("space", "update"))
def _at_end(field, space, update):
    field = resize_field(field, space)
    return field, exponential(field) if update == "log" else field


def registered(fixed, moving, force="lncc", weights=None):
    """Register two images from nothing by a name of `FORCES`: `demons` with its settings; for "lncc" more than that.

    Local correlation ends in one optimum or another, by where it starts, and their errors differ. So it goes on from
    each of the `FORCES` at a quarter of the resolution, to half of it, both from F to M and from M to F; the mean of
    these six displacements, of the inverse of those from M to F, is carried on to the end.

    Args:
      fixed, moving: (*space, 1), values of about 0 to 1, sides multiples of `MULTIPLE`.
      weights: as in `refine`.

    Returns:
      The displacement (*space, n), in voxels, `unfolded`.
    """
    if force != "lncc":
        return unfolded(_by(force, fixed, moving, weights).u)

    def start(name, fixed, moving, weights):
        u = _by(name, fixed, moving, weights, iterations=(100, 0, 0)).u
        return _by("lncc", fixed, moving, weights, u, iterations=(50, 0)).u

    swapped = moving, fixed, None if weights is None else weights[::-1]
    there = sum(start(name, fixed, moving, weights) for name in FORCES)
    # They are no finer than that, and nor is the mean.
    back = sum(coarse_inverse(start(name, *swapped), stride=4, steps=0) for name in FORCES)
    u = (there + back) / (2 * len(FORCES))
    return unfolded(_by("lncc", fixed, moving, weights, u, iterations=(20, 20)).u)


def refine(fixed, moving, u, steps, weights=None, force="lncc"):
    """Carry a registration further: up to `steps` iterations of `demons` at full resolution, where they find anything.

    A start that has converged is returned: one from which the mean energy e of iterations 6 to 10 lies less than
    SETTLED[force] min(e, 1 - e) below that of the first five. What is left is then noise, which labels follow to the
    worse as often as to the better. (1 - e is the mean local correlation, to which an empty background adds nothing, as
    it adds nothing to a mean squared difference.) With fewer than 10 steps there is nothing to compare, and they are
    taken.

    Args:
      fixed, moving: (*space, 1), values of about 0 to 1, sides even.
      u: (*space, n) displacement to start from, in voxels.
      weights: (fixed, moving), (*space, 1) each, 0 where an image does not count; None where all of both does.
      force: a name of `FORCES`.

    Returns:
      The displacement (*space, n), `unfolded`.
    """
    found = _by(force, fixed, moving, weights, u, iterations=(steps,))
    if steps >= 2 * PATIENCE:
        first, second = (found.energies[0][k:k + PATIENCE].mean() for k in (0, PATIENCE))
        settled = first - second <= SETTLED[force] * jnp.minimum(first, 1 - first)
        return unfolded(jnp.where(settled, u, found.u))
    return unfolded(found.u)


def _by(name, fixed, moving, weights=None, u=None, **changes):
    features, settings = FORCES[name]
    images, driven = weighted((features(fixed), features(moving)), weights, settings["force"])
    return demons(*images, **settings | {"force": driven} | changes, initial=u)


def weighted(features, weights, force):
    """Features (*space, C) of both images and a force, as `demons` takes them, with weights as `refine` takes them."""
    if weights is None:
        return features, force
    return tuple(jnp.concatenate(pair, -1) for pair in zip(features, weights, strict=True)), masked(force)


@jax.jit
def fill(x, inside):
    """x (*space, C) with what lies in the mask `inside` (*space, 1) interpolated from what lies around it.

    A Gaussian mean of the surroundings, then Gaussians of falling width within the mask, so that the result is
    continuous at its edge. Elsewhere x is unchanged.
    """
    dims, outside = inside.ndim - 1, 1.0 - inside
    around = gaussian_smooth(jnp.concatenate([x * outside, outside], -1), 16.0, dims)
    x = jnp.where(inside, around[..., :-1] / jnp.maximum(around[..., -1:], 1e-6), x)
    for sigma in (8.0, 4.0, 4.0, 2.0, 2.0, 1.0, 1.0):
        x = jnp.where(inside, gaussian_smooth(x, sigma, dims), x)
    return x


@partial(jax.jit, static_argnames="most")
def unfolded(u, most=20):
    """u with det(I + grad u) > 0 everywhere: smoothed around the places where it is not, at most `most` times.

    u <- u + w (K u - u), K a Gaussian of 1 voxel, w from 1 at the fold to 0 some 4 voxels from it. A field that folds
    nowhere is returned as it is.

    Args:
      u: (*space, n) displacement in voxels.
    """
    dims = u.shape[-1]

    def step(state):
        i, u, folded = state
        near = jax.lax.reduce_window(folded.astype(u.dtype), 0.0, jax.lax.max, (5,) * dims, (1,) * dims, "SAME")
        weight = gaussian_smooth(near[..., None], 1.0, dims)
        u = u + weight * (gaussian_smooth(u, 1.0, dims) - u)
        return i + 1, u, jacobian_determinant(u) <= 0

    return jax.lax.while_loop(lambda state: (state[0] < most) & state[2].any(), step,
                              (0, u, jacobian_determinant(u) <= 0))[1]


@partial(jax.jit, static_argnames=("stride", "steps"))
def coarse_inverse(u, stride=2, steps=4):
    """Displacement of the inverse of id + u, found on the coarser grid of `demons`' fields and finished on u's own.

    There it is not made exact at its voxels, which would leave all of the error of linear sampling to the points
    between them, where phi goes: `steps` times, more for a rougher u, w <- w - ((phi^-1 o phi - id) o phi^-1) / 2 takes
    the mean of that error away, until phi^-1 o phi and phi o phi^-1 come back about as well.
    """
    space = u.shape[:-1]
    coarse = inverse(resize_field(u, [n // stride for n in space]))
    return jax.lax.fori_loop(0, steps, lambda _, w: w - 0.5 * warp(compose(w, u), w), resize_field(coarse, space))
