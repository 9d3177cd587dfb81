"""The convolution of DiracNet, whose kernel is an identity and a normalised kernel."""

from typing import Any

import jax
from flax import linen as nn
from jax import lax

from repjax.algebra import dirac_kernel
from repjax.layers.composition import Conv
from repjax.layers.linear import bias_init, kernel_init

DIRAC_GAIN = 0.1
"""First scale of the normalised kernel; that of the identity is 1."""


class DiracConv(nn.Module):
  """A convolution with the kernel of `dirac_kernel`, of a kernel and two scales by channel.

  Attributes:
    conv: sizes of the convolution.
    dtype: dtype of the computation and of the result.
    param_dtype: dtype of the parameters.

  References:
    Zagoruyko and Komodakis, DiracNets, 2017, section 3. https://arxiv.org/abs/1706.00388
  """

  conv: Conv
  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (N, H, W, I) to (N, H', W', O)."""
    conv, vector = self.conv, (self.conv.features,)
    shape = (*conv.size, conv.inputs, conv.features)
    kernel = self.param("kernel", kernel_init, shape, self.param_dtype)
    diagonal = self.param("diagonal", nn.initializers.ones, vector, self.param_dtype)
    gain = self.param("gain", nn.initializers.constant(DIRAC_GAIN), vector, self.param_dtype)
    y = lax.conv_general_dilated(
      x.astype(self.dtype),
      dirac_kernel(kernel, diagonal, gain).astype(self.dtype),
      conv.strides,
      [(pad, pad) for pad in conv.padding],
      rhs_dilation=conv.dilation,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    if not conv.use_bias:
      return y
    bias = self.param("bias", bias_init(shape), vector, self.param_dtype)
    return y + bias.astype(self.dtype)[None, None, None, :]
