"""The implementation of `demons.forces.damped_step` for CPU."""

from functools import partial

import jax
import numpy as np

from drivenmorph_jax.backends import kernels


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _by_kernel(d, slope, weights, share, floor):
    return kernels.call("damped_step", [(*d.shape[:-1], 3)], d, slope, weights, **_damping(share, floor))[0]


def _by_kernel_forward(d, slope, weights, share, floor):
    return _by_kernel(d, slope, weights, share, floor), (d, slope, weights)


def _by_kernel_backward(share, floor, arrays, g):
    return tuple(kernels.call("damped_step_adjoint", [x.shape for x in arrays], *arrays, g, **_damping(share, floor)))


_by_kernel.defvjp(_by_kernel_forward, _by_kernel_backward)


def _damping(share, floor):
    return {"share": np.float32(share), "floor": np.float32(floor)}


FORMS = {"cpu": _by_kernel}
