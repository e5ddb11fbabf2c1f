"""Unfolding: local smoothing of a displacement where its Jacobian determinant is not positive."""

import jax

from drivenmorph_jax.fields.jacobian import jacobian_determinant
from drivenmorph_jax.fields.smooth import gaussian_smooth
from drivenmorph_jax.runtime.stored import stored


@stored(static_argnames="most")
def unfolded(u, most=20):
    """u, smoothed locally around its folds until det(I + grad u) > 0 everywhere.

      u <- u + w (K * u - u)

    K is a Gaussian of 1 voxel. The weight w falls from 1 at a fold to 0 some 4 voxels from it. A field without folds is
    returned unchanged.

    Args:
      u: (*space, n) displacement in voxels.
      most: largest number of smoothing steps. Folds that are left after these stay.

    Returns:
      The displacement (*space, n), in voxels.
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
