"""Ways to compute a convolution.

| name        | for                      |                                                        |
|-------------|--------------------------|--------------------------------------------------------|
| `direct`    | all                      | XLA's convolution                                      |
| `matmul`    | no dilation              | the pixels under a kernel in a row, times the kernel   |
| `winograd2` | 3x3 at stride 1, float32 | F(2x2, 3x3), as exact as `direct`                      |
| `winograd4` | 3x3 at stride 1, float32 | F(4x4, 3x3), with twice the rounding error             |

What was tried and is not here, since it was slower or no faster where it could be used: the stem's
input as blocks of 2x2 pixels in the place of channels (space to depth), and a sum of nine matrix
products. `benchmarks/convolutions.py` times all of them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from repjax.deploy import winograd

_MOST_SEEN = 2**27
"""Numbers in all rows of pixels, 512 MiB in float32: with more `matmul` needs too much memory."""


class Convolution(NamedTuple):
  """What is to be computed.

  Attributes:
    images: shape (N, H, W, C).
    kernel: shape (h, w, C / groups, O).
    strides: (vertical, horizontal), as `dilation`.
    padding: of zeros, ((above, below), (left, right)).
    dilation: of the kernel.
    groups: of channels.
    dtype: of all.
  """

  images: tuple[int, ...]
  kernel: tuple[int, ...]
  strides: tuple[int, int]
  padding: tuple[tuple[int, int], tuple[int, int]]
  dilation: tuple[int, int]
  groups: int
  dtype: str


class Algorithm(NamedTuple):
  """A way to compute.

  Attributes:
    suits: whether it can compute a Convolution.
    prepare: makes what `compute` takes of a kernel, once.
    compute: of images (N, H, W, C) and a prepared kernel: (N, H', W', O), without bias.
  """

  suits: Callable[[Convolution], bool]
  prepare: Callable[[np.ndarray, Convolution], np.ndarray]
  compute: Callable[[jax.Array, jax.Array, Convolution], jax.Array]


def _direct(x: jax.Array, kernel: jax.Array, wanted: Convolution) -> jax.Array:
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    wanted.strides,
    wanted.padding,
    rhs_dilation=wanted.dilation,
    feature_group_count=wanted.groups,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


def _grouped(kernel: np.ndarray, groups: int) -> np.ndarray:
  """(h, w, C/g, O) as (h, w, g, C/g, O/g)."""
  return np.moveaxis(kernel.reshape(*kernel.shape[:3], groups, -1), 3, 2)


def _apart(x: jax.Array, groups: int) -> jax.Array:
  """(N, H, W, C) as (g, N, H, W, C/g)."""
  return jnp.moveaxis(x.reshape(*x.shape[:3], groups, -1), 3, 0)


def _together(y: jax.Array) -> jax.Array:
  """(g, N, H, W, O/g) as (N, H, W, O)."""
  return jnp.moveaxis(y, 0, 3).reshape(*y.shape[1:4], -1)


def _prepare_matmul(kernel: np.ndarray, wanted: Convolution) -> np.ndarray:
  grouped = np.moveaxis(_grouped(kernel, wanted.groups), 2, 0)
  return grouped.reshape(wanted.groups, -1, grouped.shape[-1])  # (g, h w C/g, O/g)


def _matmul(x: jax.Array, kernel: jax.Array, wanted: Convolution) -> jax.Array:
  height, width = wanted.kernel[:2]
  x = _apart(jnp.pad(x, ((0, 0), *wanted.padding, (0, 0))), wanted.groups)
  down, across = wanted.strides
  rows, columns = x.shape[2] - height + 1, x.shape[3] - width + 1
  seen = [
    x[:, :, i : i + rows : down, j : j + columns : across]
    for i in range(height)
    for j in range(width)
  ]
  x = jnp.concatenate(seen, -1)  # (g, N, H', W', h w C/g)
  y = jnp.matmul(x.reshape(wanted.groups, -1, x.shape[-1]), kernel)
  return _together(y.reshape(*x.shape[:-1], -1))


def _suits_matmul(wanted: Convolution) -> bool:
  pixels = math.prod(wanted.images[:3]) // math.prod(wanted.strides)
  seen = pixels * wanted.images[3] * math.prod(wanted.kernel[:2])
  return wanted.dilation == (1, 1) and seen <= _MOST_SEEN


def _suits_winograd(wanted: Convolution) -> bool:
  plain = wanted.strides == wanted.dilation == (1, 1) and wanted.dtype == "float32"
  return plain and wanted.kernel[:2] == (3, 3) and wanted.kernel[2] >= 8


def _winograd(tile: int) -> Algorithm:
  def prepare(kernel: np.ndarray, wanted: Convolution) -> np.ndarray:
    return _grouped(winograd.transform_kernel(kernel, tile), wanted.groups)

  def compute(x: jax.Array, kernel: jax.Array, wanted: Convolution) -> jax.Array:
    return _together(winograd.convolve(_apart(x, wanted.groups), kernel, wanted.padding, tile))

  return Algorithm(_suits_winograd, prepare, compute)


ALGORITHMS: dict[str, Algorithm] = {
  "direct": Algorithm(lambda wanted: True, lambda kernel, wanted: kernel, _direct),
  "matmul": Algorithm(_suits_matmul, _prepare_matmul, _matmul),
  "winograd2": _winograd(2),
  "winograd4": _winograd(4),
}
"""Name to way to compute, the one that is always right first."""


def suitable(wanted: Convolution) -> list[str]:
  """Names of what can compute a convolution."""
  return [name for name, algorithm in ALGORITHMS.items() if algorithm.suits(wanted)]
