"""Maps of other sizes: bilinear interpolation with aligned corners, and means over bins.

Both are linear in rows and in columns apart, so that both are two small matrix products:

  y[n, :, :, c] = R x[n, :, :, c] S^T,  R (H', H) for rows and S (W', W) for columns.

The matrices follow from sizes alone. A traced program and an exported file hold no other operation
than these products, and every runtime agrees on what they mean. An operator for resizing has a
dozen conventions instead. A row of a matrix for interpolation holds at most two weights, so the
products are exact to the rounding of one addition.
"""

import jax
import jax.numpy as jnp
import numpy as np

from repjax.algebra import wide_dtype


def aligned_weights(inputs: int, outputs: int) -> np.ndarray:
  """Returns the matrix (outputs, inputs) of linear interpolation with aligned corners.

  Output o lies at position o (inputs - 1) / (outputs - 1) of the inputs: the first and the last
  points of both coincide. A single output lies at the first input.
  """
  steps = max(outputs - 1, 1)
  # Whole numbers tell the neighbours exactly, where a quotient could round to the wrong one.
  below, rest = np.divmod(np.arange(outputs) * (inputs - 1), steps)
  above, share = np.minimum(below + 1, inputs - 1), rest / steps
  weights, rows = np.zeros((outputs, inputs)), np.arange(outputs)
  np.add.at(weights, (rows, below), 1 - share)
  np.add.at(weights, (rows, above), share)
  return weights


def bin_weights(inputs: int, bins: int) -> np.ndarray:
  """Returns the matrix (bins, inputs) of means over bins.

  Bin b covers the inputs from floor(b inputs / bins) to ceil((b + 1) inputs / bins), exclusive.
  These are the bins of PyTorch's adaptive average pooling. They overlap where `inputs` is no
  multiple of `bins`.
  """
  places, weights = np.arange(inputs), np.zeros((bins, inputs))
  for each in range(bins):
    first, end = each * inputs // bins, -(-(each + 1) * inputs // bins)
    weights[each, (first <= places) & (places < end)] = 1 / (end - first)
  return weights


def resize_aligned(x: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Resizes maps by bilinear interpolation with aligned corners.

  The centres of the corner pixels of both maps coincide, as with `align_corners=True` in PyTorch.
  A map of k + 1 pixels for an image of 8 k + 1, which convolutions with total stride 8 make, then
  has its pixels exactly where they were computed. At other sizes the map is stretched by less than
  8 pixels at the bottom and at the right.

  Args:
    x: (N, H, W, C).
    size: (H', W') in pixels.

  Returns:
    (N, H', W', C) in the dtype of `x`, computed in at least float32.

  References:
    Zhao et al., Pyramid Scene Parsing Network, CVPR 2017, section 3.
      https://arxiv.org/abs/1612.01105
  """
  height, width = x.shape[1:3]
  if (height, width) == tuple(size):
    return x
  return _products(x, aligned_weights(height, size[0]), aligned_weights(width, size[1]))


def pool_bins(x: jax.Array, bins: int) -> jax.Array:
  """Averages maps over a grid of bins, as PyTorch's adaptive average pooling does.

  Args:
    x: (N, H, W, C) of any size, also smaller than the grid.
    bins: number of rows and of columns of the grid.

  Returns:
    (N, bins, bins, C) in the dtype of `x`, computed in at least float32.
  """
  return _products(x, bin_weights(x.shape[1], bins), bin_weights(x.shape[2], bins))


def _products(x: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
  """Multiplies maps (N, H, W, C) by a matrix (H', H) for rows and by one (W', W) for columns."""
  wide = wide_dtype(x.dtype)
  # GPUs would round the weights of a product to ten bits.
  highest = jax.lax.Precision.HIGHEST
  y = jnp.einsum("yh,nhwc->nywc", jnp.asarray(rows, wide), x.astype(wide), precision=highest)
  y = jnp.einsum("xw,nywc->nyxc", jnp.asarray(columns, wide), y, precision=highest)
  return y.astype(x.dtype)
