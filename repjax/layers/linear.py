"""Initial values and the fully connected layer, both as the papers' code has them."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import Initializer

from repjax.algebra import wide_dtype
from repjax.layers.activations import activation

kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default, which the papers' code keeps."""


TILE_AXES = 7  # of the kernel of a fully connected layer over tiles, (g, h, w, C/g, h, w, O/g)


def uniform_bound(kernel_shape: Sequence[int]) -> float:
  """1/sqrt(fan_in) of a kernel (..., I/g, O) or over tiles: bounds its values and its bias."""
  inputs = kernel_shape[1:4] if len(kernel_shape) == TILE_AXES else kernel_shape[:-1]
  return 1 / math.sqrt(math.prod(inputs))


def is_orthogonal(kernel_shape: Sequence[int]) -> bool:
  """Whether a kernel starts orthogonal: over tiles, in groups of more than one channel.

  RepMLP's does; RepMLPNet's, whose groups are single channels, is uniform like all others.
  """
  return len(kernel_shape) == TILE_AXES and kernel_shape[3] * kernel_shape[6] > 1


def from_orthogonal(matrix: Any, kernel_shape: Sequence[int]) -> Any:
  """A kernel over tiles from the matrix (g * h*w*O/g, h*w*C/g) that PyTorch makes orthogonal."""
  groups, inputs = kernel_shape[0], math.prod(kernel_shape[1:4])
  return matrix.reshape(groups, -1, inputs).swapaxes(1, 2).reshape(kernel_shape)


def tile_kernel_init(
  key: jax.Array, shape: Sequence[int], dtype: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
  """The law of a kernel over tiles (g, h, w, C/g, h, w, O/g): orthogonal or uniform."""
  inputs, outputs = math.prod(shape[1:4]), shape[0] * math.prod(shape[4:])
  if is_orthogonal(shape):
    # Half precision has no QR.
    matrix = nn.initializers.orthogonal()(key, (outputs, inputs), wide_dtype(dtype))
    return from_orthogonal(matrix.astype(dtype), shape)
  bound = uniform_bound(shape)
  return jax.random.uniform(key, tuple(shape), dtype, -bound, bound)


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
  use_bias: bool = True,
) -> jax.Array:
  """Applies a fully connected layer; for use inside a compact method.

  Args:
    x: (..., I).
    features: outputs O.
    name: the layer's scope, which holds `kernel` (I, O) and `bias` (O,).
    dtype: of the computation and the result.
    param_dtype: of the parameters.
    use_bias: add the bias; without, there is none.

  Returns:
    (..., O).
  """
  return nn.Dense(
    features,
    use_bias=use_bias,
    name=name,
    dtype=dtype,
    param_dtype=param_dtype,
    kernel_init=kernel_init,
    bias_init=bias_init((x.shape[-1], features)),
  )(x)


class TwoLayers(nn.Module):
  """Fully connected over the last axis, activation, fully connected: n -> hidden -> n numbers.

  Attributes:
    hidden: numbers between the two.
    names: scopes of the two.
    act: "relu", "silu" or "gelu".
    dtype: of the computation and the result.
    param_dtype: of the parameters.
  """

  hidden: int
  names: tuple[str, str]
  act: str
  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    first, second = self.names
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    y = activation(self.act)(linear(x, self.hidden, name=first, **dtypes))
    return linear(y, x.shape[-1], name=second, **dtypes)
