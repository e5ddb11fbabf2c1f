"""The Demons algorithm as plain functions: force -> smooth -> exponentiate -> update, coarse to fine.

The forces are in `forces.py`. Fields are (..., D, H, W, 3) or (..., H, W, 2), in voxels of their own grid.

References: Thirion, "Image matching as a diffusion process", 1998; Vercauteren et al., "Diffeomorphic demons", 2009.
"""

from drivenmorph_jax.fields.grid import difference
from drivenmorph_jax.fields.integrate import exponential
from drivenmorph_jax.fields.smooth import gaussian_smooth
from drivenmorph_jax.fields.warp import compose


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
