"""LayerScale: a trained factor for each channel at the end of a branch."""

from typing import Any

import jax
from flax import linen as nn

from repjax.algebra import wide_dtype

FIRST_GAMMA = 1e-5
"""Initial value of the factors: a new block is nearly the identity."""


class LayerScale(nn.Module):
  """A factor for each channel, y = gamma x, which begins near zero.

  The layer in front of it takes the factors in its deploy form.

  Attributes:
    param_dtype: dtype of the factors. The result has the dtype of x.

  References:
    Touvron et al., Going deeper with Image Transformers (CaiT), ICCV 2021, section 2.
      https://arxiv.org/abs/2103.17239
  """

  param_dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (..., C) to the same shape."""
    first = nn.initializers.constant(FIRST_GAMMA)
    gamma = self.param("gamma", first, (x.shape[-1],), self.param_dtype)
    return x * gamma.astype(x.dtype).reshape((1,) * (x.ndim - 1) + gamma.shape)


def scale_outputs(
  gamma: jax.Array, kernel: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Merges factors after a layer into the layer: gamma (K x + b) = (gamma K) x + gamma b.

  Args:
    gamma: (O,).
    kernel: (..., O), of a convolution or a fully connected layer.
    bias: (O,).

  Returns:
    kernel (..., O), bias (O,), in the widest dtype involved, at least float32.
  """
  gamma, kernel, bias = (
    leaf.astype(wide_dtype(gamma.dtype, kernel.dtype, bias.dtype)) for leaf in (gamma, kernel, bias)
  )
  return kernel * gamma.reshape((1,) * (kernel.ndim - 1) + gamma.shape), bias * gamma
