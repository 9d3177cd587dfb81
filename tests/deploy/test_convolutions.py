"""Every algorithm computes the convolution, wherever it says that it suits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repjax.deploy.convolutions import ALGORITHMS, Convolution, suitable
from tests.helpers import assert_close

pytest_plugins = ["tests.training.fixtures", "tests.deploy.fixtures"]

PLAIN = Convolution((2, 9, 8, 16), (3, 3, 16, 12), (1, 1), ((1, 1), (1, 1)), (1, 1), 1, "float32")
CASES = {
  "3x3": PLAIN,
  "groups": PLAIN._replace(kernel=(3, 3, 8, 12), groups=2),
  "strides": PLAIN._replace(strides=(2, 2)),
  "strides in groups": PLAIN._replace(strides=(2, 3), kernel=(3, 3, 4, 12), groups=4),
  "1x1": PLAIN._replace(kernel=(1, 1, 16, 12), padding=((0, 0), (0, 0))),
  "1x1 at stride 2": PLAIN._replace(
    kernel=(1, 1, 16, 12), padding=((0, 0), (0, 0)), strides=(2, 2)
  ),
  "other sides": PLAIN._replace(kernel=(2, 5, 16, 12), padding=((1, 0), (2, 3))),
  "depthwise": PLAIN._replace(kernel=(3, 3, 1, 16), groups=16),
  "depthwise with two kernels for each channel": PLAIN._replace(
    kernel=(3, 2, 1, 32), groups=16, strides=(2, 1), dilation=(1, 3)
  ),
  "large depthwise": PLAIN._replace(kernel=(9, 10, 1, 16), groups=16, padding=((4, 4), (4, 5))),
  "dilation": PLAIN._replace(dilation=(2, 1)),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  ("case", "name"), [(case, name) for case in CASES for name in suitable(CASES[case])]
)
def test_it_is_the_convolution(case, name):
  wanted = CASES[case]
  rng = np.random.default_rng(0)
  x, kernel = rng.standard_normal(wanted.images), rng.standard_normal(wanted.kernel)
  expected = jax.lax.conv_general_dilated(
    x,
    kernel,
    wanted.strides,
    wanted.padding,
    rhs_dilation=wanted.dilation,
    feature_group_count=wanted.groups,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  algorithm = ALGORITHMS[name]
  y = algorithm.compute(x, algorithm.prepare(kernel, wanted), wanted)
  assert_close(y, expected, 1e-13)


def test_half_precision_is_summed_in_float32():
  wanted = CASES["depthwise"]._replace(kernel=(7, 7, 1, 16), padding=((3, 3), (3, 3)))
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.uniform(size=wanted.images), "bfloat16")
  kernel = jnp.asarray(rng.uniform(size=(49, 1, 1, 1, 16)), "bfloat16")
  compute = ALGORITHMS["shifts"].compute
  y, expected = compute(x, kernel, wanted), compute(np.float32(x), np.float32(kernel), wanted)
  assert y.dtype == x.dtype
  assert_close(np.float32(y), expected, 2**-8)


def test_what_suits_what():
  assert {case: suitable(wanted) for case, wanted in CASES.items()} == {
    "3x3": ["direct", "matmul", "winograd2", "winograd4"],
    "groups": ["direct", "matmul", "winograd2", "winograd4"],
    "strides": ["direct", "matmul"],
    "strides in groups": ["direct", "matmul"],
    "1x1": ["direct", "matmul"],
    "1x1 at stride 2": ["direct", "matmul"],
    "other sides": ["direct", "matmul"],
    "depthwise": ["direct", "shifts"],
    "depthwise with two kernels for each channel": ["direct", "shifts"],
    "large depthwise": ["direct", "matmul"],
    "dilation": ["direct"],
  }
  assert suitable(PLAIN._replace(dtype="bfloat16")) == ["direct", "matmul"]
