"""Algorithms that compute a convolution.

| name        | usable for               |                                                        |
|-------------|--------------------------|--------------------------------------------------------|
| `direct`    | every convolution        | XLA's convolution                                      |
| `matmul`    | no dilation              | the pixels under a kernel in a row, times the kernel   |
| `shifts`    | depthwise, small kernel  | a sum of shifted maps, each times its tap              |
| `winograd2` | 3x3 at stride 1, float32 | F(2x2, 3x3), as exact as `direct`                      |
| `winograd4` | 3x3 at stride 1, float32 | F(4x4, 3x3), with twice the rounding error             |

Two more algorithms were tried and were never faster: blocks of 2x2 pixels as channels of the stem
(space to depth), and a sum of nine matrix products. `benchmarks/convolutions.py` times all of them.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from repjax.deploy import winograd

_IN_ORDER = (0, 1, 2, 3)
_MOST_ROW_NUMBERS = 2**27
"""The most numbers that `matmul` may gather, 512 MiB in float32: more need too much memory."""

_MOST_TAPS = 81
"""The most taps that `shifts` adds, a 9x9 kernel. XLA splits a much longer sum, which is slow."""


class Convolution(NamedTuple):
  """The shapes and options of one convolution, without its numbers.

  Attributes:
    images: sizes (N, H, W, C) of the input, in this order for any layout.
    kernel: sizes (h, w, C / groups, O) of the kernel, in this order for any layout.
    strides: (vertical, horizontal).
    padding: rows and columns of zeros, ((above, below), (left, right)).
    dilation: dilation of the kernel, (vertical, horizontal).
    groups: number of channel groups.
    dtype: dtype of the input, the kernel and the result.
    image_axes: places of N, H, W and C in the input and in the result.
    kernel_axes: places of h, w, C / groups and O in the kernel.
  """

  images: tuple[int, ...]
  kernel: tuple[int, ...]
  strides: tuple[int, int]
  padding: tuple[tuple[int, int], tuple[int, int]]
  dilation: tuple[int, int]
  groups: int
  dtype: str
  image_axes: tuple[int, ...] = _IN_ORDER
  kernel_axes: tuple[int, ...] = _IN_ORDER

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the input."""
    return tuple(self.images[place] for place in np.argsort(self.image_axes))

  @property
  def kernel_shape(self) -> tuple[int, ...]:
    """The shape of the kernel."""
    return tuple(self.kernel[place] for place in np.argsort(self.kernel_axes))


class Algorithm(NamedTuple):
  """A way to compute a convolution.

  Attributes:
    suits: tells whether the algorithm can compute a Convolution.
    prepare: turns a kernel into the form that `compute` takes; done once, ahead of time.
    compute: maps images and a prepared kernel to the result, without the bias. Images, kernel and
      result have the layout of the Convolution.
  """

  suits: Callable[[Convolution], bool]
  prepare: Callable[[np.ndarray, Convolution], np.ndarray]
  compute: Callable[[jax.Array, jax.Array, Convolution], jax.Array]


def _direct(x: jax.Array, kernel: jax.Array, conv: Convolution) -> jax.Array:
  n, h, w, c = conv.image_axes
  first, second, i, o = conv.kernel_axes
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    conv.strides,
    conv.padding,
    rhs_dilation=conv.dilation,
    feature_group_count=conv.groups,
    dimension_numbers=jax.lax.ConvDimensionNumbers(
      (n, c, h, w), (o, i, first, second), (n, c, h, w)
    ),
  )


def _channels_last(algorithm: Algorithm) -> Algorithm:
  """Returns an algorithm for every layout, made from one for (N, H, W, C) and (h, w, I, O)."""

  def prepare(kernel: np.ndarray, conv: Convolution) -> np.ndarray:
    return algorithm.prepare(kernel.transpose(conv.kernel_axes), conv)

  def compute(x: jax.Array, kernel: jax.Array, conv: Convolution) -> jax.Array:
    if conv.image_axes == _IN_ORDER:
      return algorithm.compute(x, kernel, conv)
    y = algorithm.compute(x.transpose(conv.image_axes), kernel, conv)
    return y.transpose(np.argsort(conv.image_axes))

  return Algorithm(algorithm.suits, prepare, compute)


def _group_kernel(kernel: np.ndarray, groups: int) -> np.ndarray:
  """Reshapes a kernel (h, w, C/g, O) to (h, w, g, C/g, O/g)."""
  return np.moveaxis(kernel.reshape(*kernel.shape[:3], groups, -1), 3, 2)


def _split_channels(x: jax.Array, groups: int) -> jax.Array:
  """Splits the channels of maps (N, H, W, C) into groups: (g, N, H, W, C/g)."""
  return jnp.moveaxis(x.reshape(*x.shape[:3], groups, -1), 3, 0)


def _join_channels(y: jax.Array) -> jax.Array:
  """Joins the channels of grouped maps (g, N, H, W, O/g): (N, H, W, O)."""
  return jnp.moveaxis(y, 0, 3).reshape(*y.shape[1:4], -1)


def _padded(x: jax.Array, conv: Convolution) -> jax.Array:
  """Pads images (N, H, W, C) with zeros as a convolution does."""
  return jnp.pad(x, ((0, 0), *conv.padding, (0, 0)))


def _slices(x: jax.Array, conv: Convolution) -> list[jax.Array]:
  """Returns the pixels that each tap of the kernel meets, one pixel for every output.

  Args:
    x: padded maps (..., H, W, C).
    conv: the convolution.

  Returns:
    Maps (..., H', W', C) of the output's size, in the order of the kernel's taps.
  """
  height, width = conv.kernel[:2]
  (down, across), (below, beside) = conv.strides, conv.dilation
  rows = x.shape[-3] - below * (height - 1)
  columns = x.shape[-2] - beside * (width - 1)
  return [
    x[..., i : i + rows : down, j : j + columns : across, :]
    for i in range(0, below * height, below)
    for j in range(0, beside * width, beside)
  ]


def _prepare_matmul(kernel: np.ndarray, conv: Convolution) -> np.ndarray:
  grouped = np.moveaxis(_group_kernel(kernel, conv.groups), 2, 0)
  return grouped.reshape(conv.groups, -1, grouped.shape[-1])  # (g, h w C/g, O/g)


def _matmul(x: jax.Array, kernel: jax.Array, conv: Convolution) -> jax.Array:
  """Computes a convolution as one matrix product for each group (im2col)."""
  x = _split_channels(_padded(x, conv), conv.groups)
  # Side by side in the last axis, the slices hold the whole window of an output in one row.
  x = jnp.concatenate(_slices(x, conv), -1)  # (g, N, H', W', h w C/g)
  y = jnp.matmul(x.reshape(conv.groups, -1, x.shape[-1]), kernel)
  return _join_channels(y.reshape(*x.shape[:-1], -1))


def _suits_matmul(conv: Convolution) -> bool:
  outputs = math.prod(conv.images[:3]) // math.prod(conv.strides)
  gathered = outputs * conv.images[3] * math.prod(conv.kernel[:2])
  # A product with a single row of numbers for each group was never faster than `shifts`.
  depthwise = conv.groups > 1 and suits_shifts(conv)
  return conv.dilation == (1, 1) and gathered <= _MOST_ROW_NUMBERS and not depthwise


def _shifts(x: jax.Array, kernel: jax.Array, conv: Convolution) -> jax.Array:
  """Computes a depthwise convolution as a sum over the taps of the kernel, on a CPU."""
  # The barrier keeps the padding out of the loop, which would else ask for the border at each tap.
  return _sum_of_taps(jax.lax.optimization_barrier(_padded(x, conv)), kernel, conv)


def depthwise_sum(x: jax.Array, kernel: jax.Array, conv: Convolution) -> jax.Array:
  """Computes a depthwise convolution as a sum over the taps of the kernel, in one kernel of a GPU.

  Args:
    x: images or maps (N, H, W, C).
    kernel: the convolution's kernel, as the program has it.
    conv: the convolution, which suits "shifts".
  """
  taps = kernel.transpose(conv.kernel_axes).reshape(-1, 1, 1, 1, conv.kernel[3])
  return _sum_of_taps(_padded(x, conv), taps, conv)


def _sum_of_taps(x: jax.Array, taps: jax.Array, conv: Convolution) -> jax.Array:
  """Returns y = sum_t x_t tap_t, where x_t is the padded map shifted by tap t.

  XLA computes this sum in one loop over the outputs, with vectors of channels, together with the
  bias and the activation.

  Args:
    x: padded maps (N, H, W, C).
    taps: (taps, 1, 1, 1, O).
    conv: the convolution.
  """
  x = jnp.repeat(x, conv.kernel[3] // conv.groups, -1)  # a map for each output channel
  # In half precision the sum would lose a digit or two.
  x = x.astype(np.promote_types(x.dtype, np.float32))
  terms = [shifted * tap for shifted, tap in zip(_slices(x, conv), taps.astype(x.dtype))]
  return functools.reduce(jnp.add, terms).astype(taps.dtype)


def suits_shifts(conv: Convolution) -> bool:
  """Returns True for a depthwise convolution: one input channel for each group."""
  return conv.kernel[2] == 1 and math.prod(conv.kernel[:2]) <= _MOST_TAPS


def _suits_winograd(conv: Convolution) -> bool:
  """Returns True for a float32 3x3 convolution at stride 1 with enough input channels.

  With half precision the transforms would lose too many digits. With fewer than 8 input channels
  the transforms cost more than the multiplications that they save.
  """
  plain = conv.strides == conv.dilation == (1, 1) and conv.dtype == "float32"
  return plain and conv.kernel[:2] == (3, 3) and conv.kernel[2] >= 8


def _winograd(tile: int) -> Algorithm:
  """Returns Winograd's algorithm F(tile x tile, 3x3)."""

  def prepare(kernel: np.ndarray, conv: Convolution) -> np.ndarray:
    return _group_kernel(winograd.transform_kernel(kernel, tile), conv.groups)

  def compute(x: jax.Array, kernel: jax.Array, conv: Convolution) -> jax.Array:
    groups = _split_channels(x, conv.groups)
    return _join_channels(winograd.convolve(groups, kernel, conv.padding, tile))

  return _channels_last(Algorithm(_suits_winograd, prepare, compute))


ALGORITHMS: dict[str, Algorithm] = {
  "direct": Algorithm(lambda conv: True, lambda kernel, conv: kernel, _direct),
  "matmul": _channels_last(Algorithm(_suits_matmul, _prepare_matmul, _matmul)),
  "shifts": _channels_last(
    Algorithm(
      suits_shifts,
      lambda kernel, conv: kernel.reshape(-1, 1, 1, 1, kernel.shape[-1]),  # (taps, 1, 1, 1, O)
      _shifts,
    )
  ),
  "winograd2": _winograd(2),
  "winograd4": _winograd(4),
}
"""Algorithm by name; "direct" comes first, since it can compute every convolution."""


def suitable(conv: Convolution) -> list[str]:
  """Returns the names of the algorithms that can compute a convolution."""
  return [name for name, algorithm in ALGORITHMS.items() if algorithm.suits(conv)]
