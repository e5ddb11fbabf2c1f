"""3x3x3 convolution: the function `conv3d`, and the Flax module `Conv`."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from drivenmorph_jax.backends import chosen
from drivenmorph_jax.backends.convolution import FORMS
from drivenmorph_jax.backends.fusion import apart


def conv3d(x, kernel, stride=1):
    """3x3x3 convolution with zero padding: (B, D, H, W, I) * (3, 3, 3, I, O) -> (B, D/s, H/s, W/s, O).

      out(p) = sum over the 27 shifts k in {-1, 0, 1}^3 of x(s p + k) kernel(k + 1)    at voxel p, s = `stride`

    `convolved` computes it with XLA's 3-D convolution. `backends.convolution` computes the same values faster on each
    device.
    """
    return chosen(FORMS, convolved)(x, kernel, stride)


def convolved(x, kernel, stride=1):
    """`conv3d`, computed by XLA's 3-D convolution."""
    return jax.lax.conv_general_dilated(x, kernel, (stride,) * 3, [(1, 1)] * 3,
                                        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))


class Conv(nn.Module):
    """`conv3d` with a bias. The parameters are float32; the computation runs in `dtype`.

    Where `used` is given, only the first `used` features are computed. The parameters of all `features` exist all the
    same.
    """
    features: int
    dtype: jnp.dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.he_normal()
    stride: int = 1
    used: int | None = None

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (3, 3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        kernel, bias = kernel[..., :self.used], bias[:self.used]
        x = apart(x.astype(self.dtype))
        return apart(conv3d(x, kernel.astype(self.dtype), self.stride) + bias.astype(self.dtype))
