"""A convolution of one channel in float64: the function of `nn.Conv`, on memory of its own."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import linen as nn

from repjax.layers import RepConv
from repjax.layers.one_channel import shifted_sum
from tests.helpers import (
  F64,
  GOLDENS,
  convolve,
  random_input,
  random_variables,
  relative_error,
  spread,
)

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("size", [(3, 3), (1, 5), (2, 2), (1, 1)])
@pytest.mark.parametrize("strides", spread([(1, 1), (2, 3)], [(2, 3)]))
@pytest.mark.parametrize("dilation", spread([(1, 1), (2, 1)], [(2, 1)]))
@pytest.mark.parametrize("padding", [((1, 1), (2, 2)), ((0, 0), (0, 0)), ((-1, -1), (3, 3))])
def test_it_is_the_convolution(size, strides, dilation, padding):
  x, kernel = random_input(2, 9, 12, 1), random_input(*size, seed=1)
  wanted = jax.lax.conv_general_dilated(
    x,
    kernel[..., None, None],
    strides,
    padding,
    rhs_dilation=dilation,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  assert relative_error(shifted_sum(x, kernel, strides, padding, dilation), wanted) <= 1e-14


@pytest.mark.parametrize("deploy", [False, True])
def test_parameters_are_those_of_a_convolution(deploy):
  layer = RepConv(1, branches=("conv3x3",), deploy=deploy, conv_bias=True, **F64)
  x = random_input(2, 9, 12, 1)
  variables = random_variables(layer, x)
  kernel = variables["params"] if deploy else variables["params"]["conv3x3"]
  usual = nn.Conv(1, (3, 3), padding=1, **F64)
  assert jax.tree.map(np.shape, kernel["conv"]) == jax.tree.map(
    np.shape, usual.init(jax.random.key(0), x)["params"]
  )
  if deploy:
    wanted = convolve(x, kernel["conv"]["kernel"], kernel["conv"]["bias"], padding=(1, 1))
    assert relative_error(layer.apply(variables, x), wanted) <= 1e-14


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages as Linux does")
def test_nothing_outside_of_a_map_is_read():
  done = subprocess.run(
    [sys.executable, "-m", "tests.layers.guarded"],
    cwd=GOLDENS.parents[1],
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert "survived" in done.stdout, done.stderr[-2000:]
