"""LayerScale: a trained factor for each channel at the end of a branch."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from repjax.algebra import wide_dtype
from repjax.layers.base import holds_arrays

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


def holds_layer_scale(scope: Any) -> bool:
  """Tells if a scope holds the factors of a `LayerScale`, and nothing else."""
  return holds_arrays(scope) and scope.keys() == {"gamma"}


def ones_like_scale(shapes: Mapping[str, Any]) -> dict[str, jax.Array]:
  """Returns the parameters of a `LayerScale` that changes nothing, by their shapes."""
  return {"gamma": jnp.ones(shapes["gamma"].shape, shapes["gamma"].dtype)}


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
