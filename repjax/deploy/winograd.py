"""Winograd's convolution: a 3x3 convolution as matrix products with fewer multiplications.

For a tile of m x m output pixels, d the a x a input pixels that they see (a = m + 2), k a kernel:

  y = A^T [(G k G^T) * (B^T d B)] A

Summed over input channels, the product at each of the a^2 places is a matrix product over all tiles
of all images. It takes a^2 multiplications for m^2 pixels, where the definition takes 9 m^2: 2.25
times fewer for m = 2, 4 times for m = 4. The kernel's side is computed once, in float64.

The matrices evaluate polynomials at points. Small numbers make them round little: with 0, +-1, +-2,
which are common, F(4x4, 3x3) errs twice as much as with those below.

References:
  Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016, section 4.
  https://arxiv.org/abs/1509.09308
  Barabasz et al., Error Analysis and Improving the Accuracy of Winograd Convolution, 2020, for the
  choice of points. https://arxiv.org/abs/1803.10986
"""

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

POINTS = {
  2: (Fraction(0), Fraction(1), Fraction(-1)),
  4: (Fraction(0), *(sign * Fraction(n, 4) for n in (3, 6) for sign in (1, -1))),
}
"""Where polynomials are evaluated, by the side m of the output tile; infinity is one point more."""

_TAPS = 3


class Matrices(NamedTuple):
  """The three transforms, in float64.

  Attributes:
    kernel: G (a, 3).
    images: B^T (a, a).
    outputs: A^T (m, a).
  """

  kernel: np.ndarray
  images: np.ndarray
  outputs: np.ndarray


@functools.cache
def matrices(tile: int) -> Matrices:
  """Those of F(m, 3) for m = `tile`, by Toom and Cook's construction: exact up to rounding."""
  points, size = POINTS[tile], tile + _TAPS - 1
  others = [[q for q in points if q != point] for point in points]
  scales = [math.prod(point - q for q in rest) for point, rest in zip(points, others)]
  kernel = [[point**j / scale for j in range(_TAPS)] for point, scale in zip(points, scales)]
  images = [[*_coefficients(rest), Fraction(0)] for rest in others]
  outputs = [[point**i for point in points] for i in range(tile)]
  infinity = [Fraction(0)] * (_TAPS - 1) + [Fraction(1)]
  return Matrices(
    _array([*kernel, infinity]),
    _array([*images, _coefficients(points)]).reshape(size, size),
    np.hstack([_array(outputs), np.eye(tile)[:, -1:]]),
  )


def transform_kernel(kernel: np.ndarray, tile: int) -> np.ndarray:
  """G k G^T for every pair of channels.

  Args:
    kernel: (3, 3, I, O).
    tile: side of the output tile.

  Returns:
    (a, a, I, O) in float64; the first axis is the horizontal one, as `convolve` needs it.
  """
  g = matrices(tile).kernel
  rows = np.tensordot(g, np.asarray(kernel, np.float64), 1)  # (a, 3, I, O)
  return np.tensordot(g, rows, ((1,), (1,)))


def convolve(
  x: jax.Array, kernel: jax.Array, padding: Sequence[tuple[int, int]], tile: int
) -> jax.Array:
  """A 3x3 convolution at stride 1, in groups.

  Args:
    x: (g, N, H, W, C), a group's images together.
    kernel: (a, a, g, C, O), from `transform_kernel`.
    padding: rows of zeros (above, below) and columns (left, right).
    tile: side of the output tile.

  Returns:
    (g, N, H', W', O).
  """
  g, n, height, width, channels = x.shape
  (above, below), (left, right) = padding
  size, features = tile + _TAPS - 1, kernel.shape[-1]
  out_height, out_width = height + above + below - 2, width + left + right - 2
  down, across = -(-out_height // tile), -(-out_width // tile)
  pads = [(above, down * tile + 2 - height - above), (left, across * tile + 2 - width - left)]
  x = jnp.pad(x, ((0, 0), (0, 0), *pads, (0, 0)))

  # Matrices of this size are applied fastest as a sum to rows and as a product to columns: XLA
  # makes one loop of the first, and calls its matrix product for the second. See
  # benchmarks/convolutions.py.
  images = matrices(tile).images
  rows = _weighted_sums(
    images, [x[:, :, i : i + tile * (down - 1) + 1 : tile] for i in range(size)]
  )
  columns = [rows[..., j : j + tile * (across - 1) + 1 : tile, :] for j in range(size)]
  seen = jnp.tensordot(jnp.asarray(images, x.dtype), jnp.stack(columns), 1)
  seen = seen.reshape(size * size * g, n * down * across, channels)  # (a a g, N H/m W/m, C)
  products = jnp.matmul(seen, kernel.reshape(-1, channels, features))
  outputs = matrices(tile).outputs
  outputs = jnp.asarray(np.kron(outputs, outputs), x.dtype)
  y = jnp.tensordot(outputs, products.reshape(size * size, -1), 1)
  y = y.reshape(tile, tile, g, n, down, across, features)
  y = y.transpose(2, 3, 4, 1, 5, 0, 6)  # (g, N, H/m, m, W/m, m, O)
  y = y.reshape(g, n, down * tile, across * tile, features)
  return y[:, :, :out_height, :out_width]


def _weighted_sums(weights: np.ndarray, parts: Sequence[jax.Array]) -> jax.Array:
  """The matrix times a column of arrays, as a new first axis; in one loop of its own."""
  terms = [
    jnp.asarray(column, part.dtype).reshape(-1, *(1,) * part.ndim) * part[None]
    for column, part in zip(weights.T, parts)
  ]
  return jax.lax.optimization_barrier(sum(terms[1:], terms[0]))


def _coefficients(roots: Sequence[Fraction]) -> list[Fraction]:
  """Of the polynomial with these roots, the constant first."""
  coefficients = [Fraction(1)]
  for root in roots:
    shifted, scaled = [Fraction(0), *coefficients], [*coefficients, Fraction(0)]
    coefficients = [a - root * b for a, b in zip(shifted, scaled)]
  return coefficients


def _array(rows: Sequence[Sequence[Fraction]]) -> np.ndarray:
  return np.array([[float(value) for value in row] for row in rows])
