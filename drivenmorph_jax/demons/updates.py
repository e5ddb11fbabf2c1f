"""Updates of a transform by a velocity: compositional, its inverse, log-domain and symmetric log-domain.

Fields are (..., D, H, W, 3) or (..., H, W, 2), in voxels of their own grid.
"""

import chex
import jax

from drivenmorph_jax.fields.grid import difference
from drivenmorph_jax.fields.integrate import exponential
from drivenmorph_jax.fields.smooth import gaussian_smooth
from drivenmorph_jax.fields.warp import compose


def lie_bracket(v: chex.Array, u: chex.Array) -> jax.Array:
    """The Lie bracket [v, u] = Dv u - Du v of velocities (..., D, H, W, 3), in voxels."""
    dims = v.shape[-1]
    return sum(difference(v, axis, dims) * u[..., axis, None] - difference(u, axis, dims) * v[..., axis, None]
               for axis in range(dims))


def bch(v: chex.Array, u: chex.Array) -> jax.Array:
    """The velocity Z of exp(v) o exp(u), by the Baker-Campbell-Hausdorff formula to third order.

      Z(v, u) = v + u + [v, u] / 2 + [v, [v, u]] / 12

    Velocities are (..., D, H, W, 3), in voxels.
    """
    bracket = lie_bracket(v, u)
    return v + u + bracket / 2 + lie_bracket(v, bracket) / 12


def compositional_update(u: chex.Array, delta: chex.Array, steps: int = 4) -> jax.Array:
    """The compositional update phi <- phi o exp(delta), phi = id + u.

    The displacement u and the velocity delta are (..., D, H, W, 3), in voxels. The exponential takes `steps` squarings.
    """
    return compose(u, exponential(delta, steps))


def inverse_update(u_inverse: chex.Array, delta: chex.Array, steps: int = 4) -> jax.Array:
    """The update of the inverse, phi^-1 <- exp(-delta) o phi^-1.

    The result is the inverse of that of `compositional_update`. The cost is the same.
    """
    return compose(exponential(-delta, steps), u_inverse)


def log_update(v: chex.Array, delta: chex.Array, sigma: chex.Array | float) -> jax.Array:
    """The log-domain update v <- K_diff * Z(v, delta), Z as in `bch`.

    The transform is exp(v) and its inverse exp(-v). K_diff is a Gaussian of `sigma` voxels.
    """
    return gaussian_smooth(bch(v, delta), sigma, v.shape[-1])


def symmetric_log_update(v: chex.Array, delta: chex.Array, delta_back: chex.Array,
                         sigma: chex.Array | float) -> jax.Array:
    """The symmetric log-domain update v <- K_diff * (Z(v, delta) - Z(-v, delta_back)) / 2, Z as in `bch`.

    `delta` is the update of exp(v), from the moving to the fixed image. `delta_back` is the update of exp(-v), with the
    two images swapped. K_diff is a Gaussian of `sigma` voxels. Swapping the images only changes the sign of v, up to
    rounding: the result is then the inverse.

    Reference: Vercauteren et al., "Symmetric log-domain diffeomorphic registration: a demons-based approach", 2008.
    """
    return gaussian_smooth(0.5 * (bch(v, delta) - bch(-v, delta_back)), sigma, v.shape[-1])
