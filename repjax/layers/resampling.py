"""Maps of other sizes: bilinear interpolation with aligned corners, and means over bins.

Two small matrix products interpolate, one over rows and one over columns. R is (H', H), and S is
(W', W).

  y[n, :, :, c] = R x[n, :, :, c] S^T

The matrices follow from sizes alone, and every runtime agrees on what a product means. An operator
for resizing has a dozen conventions instead. A row of a matrix holds at most two weights, so the
products are exact to the rounding of one addition. The translation to ONNX knows these matrices,
and writes one Resize for both products.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from repjax.algebra import wide_dtype

RESIZING = "resize_aligned"
"""Name of the scope of the two products in a traced program."""


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


def resize_aligned(x: jax.Array, size: Sequence[int]) -> jax.Array:
  """Resizes maps by bilinear interpolation with aligned corners.

  The centres of the corner pixels of both maps coincide, as with `align_corners=True` in PyTorch.
  Convolutions with a total stride of 8 make a map of k + 1 pixels from an image of 8 k + 1. Resized
  to the image, each pixel of the map then lies exactly where it was computed. At other sizes the
  map is stretched by less than 8 pixels at the bottom and at the right.

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
  wide = wide_dtype(x.dtype)
  rows, columns = (
    jnp.asarray(aligned_weights(*each), wide) for each in ((height, size[0]), (width, size[1]))
  )
  # GPUs would round the weights of a product to ten bits.
  highest = jax.lax.Precision.HIGHEST
  with jax.named_scope(RESIZING):
    y = jnp.einsum("yh,nhwc->nywc", rows, x.astype(wide), precision=highest)
    return jnp.einsum("xw,nywc->nyxc", columns, y, precision=highest).astype(x.dtype)


def pool_to(x: jax.Array, size: int) -> jax.Array:
  """Averages `size` x `size` windows, which cover a map as evenly as whole pixels allow.

  Window i of an axis of n pixels goes from floor(i n / size) to ceil((i + 1) n / size), as in the
  adaptive average pooling of PyTorch. Windows overlap if `size` does not divide n. A map of this
  size already is returned unchanged.

  Args:
    x: (N, H, W, C), of any size.
    size: number of windows along each axis.

  Returns:
    (N, size, size, C).
  """
  for axis in (1, 2):
    pixels = x.shape[axis]
    if pixels != size:
      windows = [(i * pixels // size, -(-(i + 1) * pixels // size)) for i in range(size)]
      means = [
        jax.lax.slice_in_dim(x, start, stop, axis=axis).mean(axis) for start, stop in windows
      ]
      x = jnp.stack(means, axis)
  return x


def pool_bins(x: jax.Array, bins: int) -> jax.Array:
  """Averages a map over a grid of bins, the windows of `pool_to`.

  Bins that divide the map are pooled as tiles, which other runtimes have an operator for.

  Args:
    x: (N, H, W, C), of any size.
    bins: number of bins along each axis.

  Returns:
    (N, bins, bins, C) in the dtype of `x`, computed in at least float32.
  """
  wide = x.astype(wide_dtype(x.dtype))
  if any(pixels % bins for pixels in x.shape[1:3]):
    return pool_to(wide, bins).astype(x.dtype)
  batch, height, width, channels = x.shape
  tiles = wide.reshape(batch, bins, height // bins, bins, width // bins, channels)
  return tiles.mean((2, 4)).astype(x.dtype)  # (N, bins, bins, C)
