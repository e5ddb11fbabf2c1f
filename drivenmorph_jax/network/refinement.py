"""The refinement of the network's result: `refined`, a list of steps.

Each step is a function that takes and returns a `State`. Each step is compiled as a program of its own, so the network
is compiled once for all its passes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp

from drivenmorph_jax import demons
from drivenmorph_jax.fields.inverse import coarse_inverse
from drivenmorph_jax.fields.smooth import gaussian_smooth
from drivenmorph_jax.fields.unfold import unfolded
from drivenmorph_jax.fields.warp import compose, warp
from drivenmorph_jax.runtime.memory import trim_memory
from drivenmorph_jax.runtime.stored import stored

SIGMA = 0.5  # voxels
INVERSE_STEPS = 8  # of `coarse_inverse`; a field of Demons needs 4, the refined field is rougher


@dataclass(frozen=True, eq=False)
class State:
    """Images (B, D, H, W), their weights (B, D, H, W, 2) or None, and the displacement u (B, D, H, W, 3) so far."""

    fixed: chex.Array
    moving: chex.Array
    weights: chex.Array | None
    extra: tuple[chex.Array, chex.Array] | None = None  # (B, D, H, W, C), further channels of both images
    u: chex.Array | None = None
    u_inverse: chex.Array | None = None
    found: tuple[Any, ...] = ()  # what the first pass of the network returned besides u and u_inverse


def refined(network, fixed, moving, steps, weights=None, extra=None):
    """Register a batch of pairs and refine the result: phi = G * (psi o D o psi_1), then unfolded.

      psi: forward and backward registration, averaged. The network registers M to F and F to M. psi is the mean of
        the forward displacement u(F, M) and of the inverse that comes with the backward registration u(M, F).
      D: at most `steps` iterations of classical Demons by local correlation, from psi.
      psi_1: a pass on the residual. The network registers the warped moving image to F.
      G: a Gaussian of `SIGMA` voxels.

    After Demons, a pass of the network improves the result more than further iterations of Demons would. The numbers
    are in docs/notes/decisions.md.

    Args:
      network: function (fixed, moving, weights) -> (u, u_inverse, further results), u (B, D, H, W, 3) in voxels.
      fixed, moving: (B, D, H, W).
      steps: iterations of `demons.refine`.
      weights: (B, D, H, W, 2), 0 at voxels of the fixed or of the moving image to ignore; or None.
      extra: further channels (B, D, H, W, C) of the fixed and of the moving image, which D sees as well; or None.

    Returns:
      u and u_inverse, with J > 0 everywhere, and the further results of the network's first forward pass.
    """
    state = State(fixed, moving, weights, extra)
    for step in pipeline(network, steps):
        trim_memory()
        state = step(state)
    return state.u, state.u_inverse, *state.found


def pipeline(network, iterations) -> list[Callable[[State], State]]:
    """The steps of `refined`, in the order in which they run."""
    return [partial(forward_and_backward, network=network),
            partial(by_demons, iterations=iterations),
            partial(residual_pass, network=network),
            smoothed, without_folds, with_inverse]


def forward_and_backward(state, network):
    """u <- (u(F, M) + u_inverse(M, F)) / 2: forward and backward registration, averaged."""
    # One after the other: XLA would run both passes at once, in twice the memory.
    u, *found = jax.block_until_ready(network(state.fixed, state.moving, state.weights))
    del found[0]  # the inverse, whose memory the next pass takes
    weights = None if state.weights is None else state.weights[..., ::-1]
    trim_memory()
    back = jax.block_until_ready(network(state.moving, state.fixed, weights)[1])
    return replace(state, u=_mean(u, back), found=tuple(found))


def by_demons(state, iterations):
    """u <- the result of at most `iterations` iterations of Demons by local correlation from u, see `demons.refine`."""
    def one(fixed, moving, u, weights):
        weights = None if weights is None else (weights[..., :1], weights[..., 1:])
        return demons.refine(fixed, moving, u, iterations, weights)

    images = state.fixed[..., None], state.moving[..., None]
    if state.extra is not None:
        images = (jnp.concatenate(both, -1) for both in zip(images, state.extra, strict=True))
    return replace(state, u=_each(one, *images, state.u, state.weights))


def residual_pass(state, network):
    """u <- compose(u, r): the network registers M o phi to F, and its displacement r is composed with u."""
    there = jax.block_until_ready(network(state.fixed, *_warped(state.moving, state.weights, state.u))[0])
    return replace(state, u=_composed(state.u, there))


def smoothed(state):
    """u <- G * u, a Gaussian of `SIGMA` voxels."""
    return replace(state, u=_smooth(state.u))


def without_folds(state):
    """u <- u, smoothed locally until J > 0 everywhere, see `fields.unfold`."""
    return replace(state, u=_each(unfolded, state.u))


def with_inverse(state):
    """u_inverse <- the inverse of u, see `fields.inverse.coarse_inverse`."""
    return replace(state, u_inverse=_each(partial(coarse_inverse, steps=INVERSE_STEPS), state.u))


@stored
def _mean(a, b):
    return 0.5 * (a + b)


@stored
def _warped(moving, weights, u):
    """The warped moving image; and the weights, of which those of the moving image are warped too."""
    if weights is not None:
        weights = jnp.concatenate([weights[..., :1], warp(weights[..., 1:], u)], -1)
    return warp(moving[..., None], u)[..., 0], weights


@stored
def _composed(u, s):
    return compose(u, s)


@stored
def _smooth(u):
    return gaussian_smooth(u, SIGMA)


def _each(function, *arrays):
    """`function` of every pair of the batch.

    Under vmap, a loop that has a stopping rule computes its state once more. So a batch of one pair does not use vmap.
    """
    if len(arrays[0]) > 1:
        return jax.vmap(function)(*arrays)
    return function(*(None if x is None else x[0] for x in arrays))[None]
