"""Initial values and the fully connected layer, both as the papers' code has them."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import Initializer

kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default, which the papers' code keeps."""


def uniform_bound(kernel_shape: Sequence[int]) -> float:
  """1/sqrt(fan_in) of a kernel (..., I/g, O): bounds its values and its bias."""
  return 1 / math.sqrt(math.prod(kernel_shape[:-1]))


def bias_init(kernel_shape: Sequence[int]) -> Initializer:
  """The law of the bias beside a kernel: uniform within the same bound as the kernel's values."""
  bound = uniform_bound(kernel_shape)

  def init(key, shape, dtype=jnp.float32, out_sharding=None):
    return jax.random.uniform(key, shape, dtype, -bound, bound, out_sharding=out_sharding)

  return init


def linear(
  x: jax.Array,
  features: int,
  *,
  name: str,
  dtype: jax.typing.DTypeLike,
  param_dtype: jax.typing.DTypeLike,
) -> jax.Array:
  """Applies a fully connected layer with bias; for use inside a compact method.

  Args:
    x: (..., I).
    features: outputs O.
    name: the layer's scope, which holds `kernel` (I, O) and `bias` (O,).
    dtype: of the computation and the result.
    param_dtype: of the parameters.

  Returns:
    (..., O).
  """
  return nn.Dense(
    features,
    name=name,
    dtype=dtype,
    param_dtype=param_dtype,
    kernel_init=kernel_init,
    bias_init=bias_init((x.shape[-1], features)),
  )(x)
