"""The fully connected layer, and initial values; both as in the code of the papers."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import Initializer

from repjax.algebra import wide_dtype
from repjax.layers.activations import activation
from repjax.layers.base import dtypes_of

kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""U(-1/sqrt(fan_in), 1/sqrt(fan_in)): the default of PyTorch, and so of the code of the papers."""


# A fully connected layer over tiles has a kernel (g, h, w, C/g, h, w, O/g), and nothing else has
# as many axes. Initial values depend on this, so that a kernel's shape tells its distribution.
TILE_AXES = 7


def uniform_bound(kernel_shape: Sequence[int]) -> float:
  """Returns 1/sqrt(fan_in), which bounds the initial values of a kernel and of its bias.

  Args:
    kernel_shape: (..., I/g, O), or the shape of a kernel over tiles.
  """
  inputs = kernel_shape[1:4] if len(kernel_shape) == TILE_AXES else kernel_shape[:-1]
  return 1 / math.sqrt(math.prod(inputs))


def is_orthogonal(kernel_shape: Sequence[int]) -> bool:
  """Tells if a kernel starts orthogonal: it is over tiles, in groups of more than one channel.

  Kernels of RepMLP start orthogonal. Groups of RepMLPNet are single channels, so its kernels start
  uniform, as all kernels that are not over tiles do.
  """
  return len(kernel_shape) == TILE_AXES and kernel_shape[3] * kernel_shape[6] > 1


def from_orthogonal(matrix: Any, kernel_shape: Sequence[int]) -> Any:
  """Reorders PyTorch's orthogonal matrix (g * h*w*O/g, h*w*C/g) into a kernel over tiles."""
  groups, inputs = kernel_shape[0], math.prod(kernel_shape[1:4])
  return matrix.reshape(groups, -1, inputs).swapaxes(1, 2).reshape(kernel_shape)


def tile_kernel_init(
  key: jax.Array, shape: Sequence[int], dtype: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
  """Draws a kernel over tiles (g, h, w, C/g, h, w, O/g), orthogonal or uniform."""
  inputs, outputs = math.prod(shape[1:4]), shape[0] * math.prod(shape[4:])
  if is_orthogonal(shape):
    # No QR decomposition takes half precision.
    matrix = nn.initializers.orthogonal()(key, (outputs, inputs), wide_dtype(dtype))
    return from_orthogonal(matrix.astype(dtype), shape)
  bound = uniform_bound(shape)
  return jax.random.uniform(key, tuple(shape), dtype, -bound, bound)


def bias_init(kernel_shape: Sequence[int]) -> Initializer:
  """Returns the initializer of the bias beside a kernel: uniform, with the kernel's bound."""
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
    features: number of outputs O.
    name: scope of the layer, which holds `kernel` (I, O) and `bias` (O,).
    dtype: dtype of the computation and of the result.
    param_dtype: dtype of the parameters.
    use_bias: add a bias. Without one, the scope holds `kernel` alone.

  Returns:
    (..., O) in `dtype`.
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
  """Two fully connected layers over the last axis with an activation between: n -> hidden -> n.

  Attributes:
    hidden: width between the two layers.
    names: scopes of the two layers.
    act: name of the activation: "relu", "silu" or "gelu".
    dtype: dtype of the computation and of the result.
    param_dtype: dtype of the parameters.
  """

  hidden: int
  names: tuple[str, str]
  act: str
  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (..., n) to the same shape."""
    first, second = self.names
    dtypes = dtypes_of(self)
    y = activation(self.act)(linear(x, self.hidden, name=first, **dtypes))
    return linear(y, x.shape[-1], name=second, **dtypes)
