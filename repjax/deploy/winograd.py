"""Winograd's convolution: a 3x3 convolution as matrix products with fewer multiplications.

The output is cut into tiles of m x m pixels. Let d be the a x a input pixels that a tile depends on
(a = m + 2), and k a 3x3 kernel. Then the tile is

  y = A^T [(G k G^T) * (B^T d B)] A

where * multiplies element by element. Summed over input channels, each of the a^2 elements is a
matrix product over all tiles of all images. A tile takes a^2 multiplications for m^2 pixels, where
the definition takes 9 m^2: 2.25 times fewer for m = 2, and 4 times fewer for m = 4. The kernel's
side, G k G^T, is computed once, in float64.

Where the matrices come from. In one dimension, a convolution is a product of two polynomials. A
polynomial of degree n is known from its values at n + 1 points, and the values of a product are
products of values (Toom and Cook). G evaluates the kernel's polynomial at a - 1 points and at
infinity, where the value is the highest coefficient. The other two matrices evaluate and
interpolate. Networks need a correlation, which is the transpose of this algorithm: therefore B^T
holds the interpolation, and A^T holds powers of the points. In two dimensions, each matrix acts on
rows and on columns.

Rounding. Large powers of the points round badly. With the common points 0, +-1, +-2, F(4x4, 3x3)
has twice the error that it has with the points below.

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
"""Side m of the output tile to the m + 1 points of evaluation; infinity is one point more."""

_TAPS = 3  # side of the kernel


class Matrices(NamedTuple):
  """The three transforms of F(m x m, 3x3), in float64; a = m + 2.

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
  """Builds the transforms of F(m, 3) by Toom and Cook's construction, for m = `tile`.

  With points p_0 ... p_n and M_i(x) = prod_{q != p_i} (x - q), Lagrange's interpolation gives

    G[i, j] = p_i^j / M_i(p_i);  B^T[i] = coefficients of M_i;  A^T[i, j] = p_j^i

  and a last row, or column, for the point at infinity. Fractions keep all of this exact; only the
  conversion to float64 at the end rounds.
  """
  points, size = POINTS[tile], tile + _TAPS - 1
  others = [[q for q in points if q != point] for point in points]
  scales = [math.prod(point - q for q in rest) for point, rest in zip(points, others)]  # M_i(p_i)
  kernel = [[point**j / scale for j in range(_TAPS)] for point, scale in zip(points, scales)]
  # M_i has one degree less than the polynomial of all points, hence the zero at the end.
  images = [[*_coefficients(rest), Fraction(0)] for rest in others]
  outputs = [[point**i for point in points] for i in range(tile)]
  infinity = [Fraction(0)] * (_TAPS - 1) + [Fraction(1)]  # picks the highest coefficient
  return Matrices(
    _array([*kernel, infinity]),
    _array([*images, _coefficients(points)]).reshape(size, size),
    np.hstack([_array(outputs), np.eye(tile)[:, -1:]]),
  )


def transform_kernel(kernel: np.ndarray, tile: int) -> np.ndarray:
  """Computes G k G^T for every pair of input and output channels.

  Args:
    kernel: (3, 3, I, O).
    tile: side m of the output tile.

  Returns:
    (a, a, I, O) in float64; the first axis is the horizontal one, as `convolve` needs it.
  """
  g = matrices(tile).kernel
  rows = np.tensordot(g, np.asarray(kernel, np.float64), 1)  # (a, 3, I, O)
  # tensordot puts the axis of its first argument first, which swaps vertical and horizontal.
  return np.tensordot(g, rows, ((1,), (1,)))


def convolve(
  x: jax.Array, kernel: jax.Array, padding: Sequence[tuple[int, int]], tile: int
) -> jax.Array:
  """Computes a 3x3 convolution at stride 1, in groups.

  Args:
    x: (g, N, H, W, C), the maps of each group of channels.
    kernel: (a, a, g, C, O), from `transform_kernel`.
    padding: rows of zeros (above, below) and columns of zeros (left, right).
    tile: side m of the output tile.

  Returns:
    (g, N, H', W', O).
  """
  g, n, height, width, channels = x.shape
  (above, below), (left, right) = padding
  size, features = tile + _TAPS - 1, kernel.shape[-1]
  out_height, out_width = height + above + below - 2, width + left + right - 2
  # The number of tiles, rounded up. More zeros below and to the right fill the last tiles.
  down, across = -(-out_height // tile), -(-out_width // tile)
  pads = [(above, down * tile + 2 - height - above), (left, across * tile + 2 - width - left)]
  x = jnp.pad(x, ((0, 0), (0, 0), *pads, (0, 0)))

  # B^T d B. Matrices of this size are applied fastest as a weighted sum over rows, which XLA makes
  # one loop, and as a matrix product over columns. See benchmarks/convolutions.py.
  # Row i of all tiles is a slice with stride m: neighbouring tiles overlap by 2 pixels.
  images = matrices(tile).images
  rows = _weighted_sums(
    images, [x[:, :, i : i + tile * (down - 1) + 1 : tile] for i in range(size)]
  )
  columns = [rows[..., j : j + tile * (across - 1) + 1 : tile, :] for j in range(size)]
  seen = jnp.tensordot(jnp.asarray(images, x.dtype), jnp.stack(columns), 1)
  seen = seen.reshape(size * size * g, n * down * across, channels)  # (a a g, N H/m W/m, C)
  # The elementwise products, summed over channels: a matrix product at each of the a^2 places.
  products = jnp.matmul(seen, kernel.reshape(-1, channels, features))
  # A^T [...] A. The Kronecker product acts on both axes of a tile in one matrix product.
  outputs = matrices(tile).outputs
  outputs = jnp.asarray(np.kron(outputs, outputs), x.dtype)
  y = jnp.tensordot(outputs, products.reshape(size * size, -1), 1)
  y = y.reshape(tile, tile, g, n, down, across, features)  # the first axis is the horizontal one
  y = y.transpose(2, 3, 4, 1, 5, 0, 6)  # (g, N, H/m, m, W/m, m, O)
  y = y.reshape(g, n, down * tile, across * tile, features)
  return y[:, :, :out_height, :out_width]


def _weighted_sums(weights: np.ndarray, parts: Sequence[jax.Array]) -> jax.Array:
  """Multiplies a matrix and a column of arrays; the rows of the result are a new first axis.

  The barrier keeps XLA from merging this loop with the operations that read its result.
  """
  terms = [
    jnp.asarray(column, part.dtype).reshape(-1, *(1,) * part.ndim) * part[None]
    for column, part in zip(weights.T, parts)
  ]
  return jax.lax.optimization_barrier(sum(terms[1:], terms[0]))


def _coefficients(roots: Sequence[Fraction]) -> list[Fraction]:
  """Returns the coefficients of the polynomial with these roots, the constant first."""
  coefficients = [Fraction(1)]
  for root in roots:
    # Multiplication by (x - root): the shifted coefficients minus root times the old ones.
    shifted, scaled = [Fraction(0), *coefficients], [*coefficients, Fraction(0)]
    coefficients = [a - root * b for a, b in zip(shifted, scaled)]
  return coefficients


def _array(rows: Sequence[Sequence[Fraction]]) -> np.ndarray:
  return np.array([[float(value) for value in row] for row in rows])
