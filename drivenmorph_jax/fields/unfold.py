"""The Demons algorithm as plain functions: force -> smooth -> exponentiate -> update, coarse to fine.

The forces are in `forces.py`. Fields are (..., D, H, W, 3) or (..., H, W, 2), in voxels of their own grid.

References: Thirion, "Image matching as a diffusion process", 1998; Vercauteren et al., "Diffeomorphic demons", 2009.
"""

from functools import partial

import jax

from drivenmorph_jax.fields.jacobian import jacobian_determinant
from drivenmorph_jax.fields.smooth import gaussian_smooth


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
