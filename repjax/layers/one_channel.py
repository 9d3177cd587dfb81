"""A convolution of one channel to one channel in float64, without a fault of XLA on CPUs.

In jax 0.10, XLA's code for this convolution reads numbers in front of a padded map, and drops them.
The process dies if no memory is mapped there. Smaller floats are computed by a library, which does
not do so. RepMLP's local convolutions with one share-set are of this kind.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from repjax.layers.linear import kernel_init


def is_one_channel(dtype: Any, inputs: int, outputs: int) -> bool:
  """Returns True if `OneChannelConv` must take the place of a convolution of so many channels."""
  return jnp.dtype(dtype) == jnp.float64 and inputs == outputs == 1


class OneChannelConv(nn.Module):
  """The convolution of `nn.Conv` for one channel; its parameters have the same names and shapes.

  Attributes:
    features: 1.
    kernel_size: height and width.
    strides: stride along both axes.
    padding: pixels added at both ends of both axes; negative ones are removed.
    kernel_dilation: dilation along both axes.
    use_bias: add a bias.
    bias_init: draws the bias.
    dtype: dtype of the computation and of the result.
    param_dtype: dtype of the parameters.
  """

  features: int
  kernel_size: tuple[int, int]
  strides: tuple[int, int]
  padding: Sequence[tuple[int, int]]
  kernel_dilation: tuple[int, int]
  use_bias: bool
  bias_init: Callable[..., jax.Array]
  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (N, H, W, 1) to (N, H', W', 1)."""
    kernel = self.param("kernel", kernel_init, (*self.kernel_size, 1, 1), self.param_dtype)
    y = shifted_sum(
      x.astype(self.dtype),
      kernel.astype(self.dtype)[..., 0, 0],
      self.strides,
      self.padding,
      self.kernel_dilation,
    )
    if self.use_bias:
      bias = self.param("bias", self.bias_init, (1,), self.param_dtype)
      y = y + bias.astype(self.dtype).reshape(1, 1, 1, 1)
    return y


def shifted_sum(
  x: jax.Array,
  taps: jax.Array,
  strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
  dilation: Sequence[int],
) -> jax.Array:
  """Computes a convolution as a sum of shifted maps, one for each tap.

  y[n, i, j] = sum_ab K[a, b] x[n, s i + d a - p, s j + d b - p], with zeros outside the map.

  Args:
    x: (N, H, W, 1).
    taps: K, (A, B).
    strides: s for both axes.
    padding: p for both ends of both axes.
    dilation: d for both axes.

  Returns:
    (N, H', W', 1).
  """
  x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((*p, 0) for p in padding), (0, 0, 0)])
  rows, columns = (
    size - step * (count - 1) for size, step, count in zip(x.shape[1:3], dilation, taps.shape)
  )
  products = [
    taps[a, b] * x[:, top : top + rows : strides[0], left : left + columns : strides[1]]
    for a in range(taps.shape[0])
    for b in range(taps.shape[1])
    for top, left in [(a * dilation[0], b * dilation[1])]
  ]
  return sum(products[1:], products[0])
