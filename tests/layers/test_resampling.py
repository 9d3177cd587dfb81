"""Maps of other sizes: each pixel by its definition, in loops."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from repjax.layers.resampling import pool_bins, resize_aligned
from tests.helpers import assert_close, random_input

pytestmark = pytest.mark.usefixtures("x64")


def interpolated(x, size):
  """Resizes maps with aligned corners, one pixel after the other."""
  y = np.zeros((len(x), *size, x.shape[-1]))
  for row, column in np.ndindex(*size):
    place = [
      index * (before - 1) / (after - 1) if after > 1 else 0.0
      for index, before, after in zip((row, column), x.shape[1:3], size)
    ]
    low = [min(int(each), before - 1) for each, before in zip(place, x.shape[1:3])]
    for corner in np.ndindex(2, 2):
      near = [min(a + b, before - 1) for a, b, before in zip(low, corner, x.shape[1:3])]
      shares = [1 - abs(each - (a + b)) for each, a, b in zip(place, low, corner)]
      y[:, row, column] += math.prod(shares) * x[:, near[0], near[1]]
  return y


@pytest.mark.parametrize(
  ("before", "after"),
  [((3, 5), (7, 9)), ((6, 4), (3, 2)), ((4, 6), (4, 7)), ((1, 2), (4, 5)), ((5, 3), (1, 1))],
  ids=str,
)
def test_corners_coincide_and_the_rest_is_linear(before, after):
  x = random_input(2, *before, 3)
  assert_close(resize_aligned(jnp.asarray(x), after), interpolated(x, after), 1e-14)


def test_a_map_at_stride_8_keeps_its_pixels_in_an_image_of_8_k_and_1():
  x = random_input(1, 3, 12, 2)
  y = resize_aligned(jnp.asarray(x), (17, 89))
  np.testing.assert_array_equal(y[:, ::8, ::8], x)


def test_half_precision_keeps_a_constant():
  x = jnp.full((1, 3, 4, 2), 1.7, jnp.bfloat16)
  y = resize_aligned(x, (13, 11))
  assert y.dtype == jnp.bfloat16
  assert (y == x[0, 0, 0, 0]).all()


@pytest.mark.parametrize(("size", "bins"), [((6, 9), 3), ((7, 5), 3), ((2, 4), 6), ((5, 4), 1)])
def test_a_bin_is_a_mean_of_the_pixels_that_it_touches(size, bins):
  x = random_input(2, *size, 3)
  y = np.zeros((2, bins, bins, 3))
  for row, column in np.ndindex(bins, bins):
    first, end = (
      [int(rounded(each * pixels / bins)) for each, pixels in zip(corner, size)]
      for corner, rounded in (((row, column), np.floor), ((row + 1, column + 1), np.ceil))
    )
    y[:, row, column] = x[:, first[0] : end[0], first[1] : end[1]].mean((1, 2))
  assert_close(pool_bins(jnp.asarray(x), bins), y, 1e-14)
