"""Winograd's convolution is the convolution, for every size, padding and number of groups."""

import jax
import numpy as np
import pytest

from repjax.deploy import winograd
from tests.helpers import assert_close

pytest_plugins = ["tests.training.fixtures", "tests.deploy.fixtures"]


@pytest.mark.parametrize("tile", list(winograd.POINTS))
def test_one_row_of_outputs_is_exact(tile):
  kernel, images, outputs = winograd.matrices(tile)
  rng = np.random.default_rng(0)
  d, k = rng.standard_normal(tile + 2), rng.standard_normal(3)
  y = outputs @ ((kernel @ k) * (images @ d))
  assert_close(y, np.correlate(d, k, "valid"), 1e-14)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("tile", list(winograd.POINTS))
@pytest.mark.parametrize(
  ("size", "padding", "groups"),
  [
    ((8, 8), ((1, 1), (1, 1)), 1),
    ((7, 5), ((1, 1), (1, 1)), 1),
    ((9, 6), ((0, 0), (0, 0)), 2),
    ((3, 11), ((2, 0), (0, 3)), 3),
    ((1, 1), ((1, 1), (1, 1)), 1),
  ],
)
def test_it_is_the_convolution(tile, size, padding, groups):
  rng = np.random.default_rng(1)
  x = rng.standard_normal((groups, 2, *size, 4))
  kernels = rng.standard_normal((groups, 3, 3, 4, 5))
  transformed = np.stack([winograd.transform_kernel(kernel, tile) for kernel in kernels], 2)
  y = winograd.convolve(x, transformed, padding, tile)
  assert y.dtype == np.float64
  for group in range(groups):
    expected = jax.lax.conv_general_dilated(
      x[group], kernels[group], (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert_close(y[group], expected, 1e-13)


@pytest.mark.usefixtures("x64")
def test_our_points_round_less_than_the_common_ones(monkeypatch):
  rng = np.random.default_rng(2)
  x = rng.standard_normal((1, 2, 16, 16, 32), np.float32)
  kernel = rng.standard_normal((3, 3, 32, 16))
  exact = jax.lax.conv_general_dilated(
    x[0].astype(np.float64), kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )

  def error():
    transformed = winograd.transform_kernel(kernel, 4)[:, :, None].astype(np.float32)
    y = winograd.convolve(x, transformed, ((1, 1), (1, 1)), 4)[0]
    return np.linalg.norm(np.asarray(y, np.float64) - exact) / np.linalg.norm(exact)

  ours = error()
  monkeypatch.setitem(winograd.POINTS, 4, (0, 1, -1, 2, -2))
  winograd.matrices.cache_clear()
  try:
    assert ours < 0.7 * error()
  finally:
    winograd.matrices.cache_clear()
