"""Initial values are PyTorch's; the linear layer is a matrix product."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from repjax.layers import linear
from repjax.layers.linear import bias_init, kernel_init, tile_kernel_init, uniform_bound
from tests import helpers
from tests.helpers import random_input, random_variables, relative_error


class Classifier(nn.Module):
  """`linear` in a scope of its own."""

  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    return linear(x, 3, name="head", dtype=self.dtype, param_dtype=self.param_dtype)


@pytest.mark.usefixtures("x64")
def test_linear_is_a_matrix_product_with_bias():
  x, layer = random_input(5, 7), Classifier(**helpers.F64)
  variables = random_variables(layer, x)
  held = jax.tree.map(np.asarray, variables["params"]["head"])
  expected = x @ held["kernel"] + held["bias"]
  assert relative_error(layer.apply(variables, x), expected) <= 1e-12


def test_linear_computes_in_dtype_and_keeps_parameters_in_param_dtype():
  layer = Classifier(dtype=jnp.bfloat16)
  variables = helpers.init_shapes(layer, jnp.ones((2, 7)))
  assert helpers.shapes(variables["params"]["head"]) == {
    "kernel": ((7, 3), jnp.float32),
    "bias": ((3,), jnp.float32),
  }
  assert jax.eval_shape(layer.apply, variables, jnp.ones((2, 7))).dtype == jnp.bfloat16


@pytest.mark.parametrize(("shape", "fan_in"), [((3, 3, 8, 40), 72), ((600, 10), 600)])
def test_kernels_and_biases_are_uniform_within_one_over_the_root_of_fan_in(shape, fan_in):
  bound = 1 / np.sqrt(fan_in)
  assert uniform_bound(shape) == pytest.approx(bound)
  laws = {shape: kernel_init, (2000,): bias_init(shape)}
  for drawn, init in laws.items():
    draw = helpers.quick_jit(functools.partial(init, shape=drawn, dtype=jnp.float32))
    values = np.asarray(draw(jax.random.key(0)))
    assert 0.99 * bound < np.abs(values).max() <= bound
    assert abs(np.mean(values)) < 0.05 * bound
    assert abs(np.std(values) / bound - 1 / np.sqrt(3)) < 0.02


def test_an_orthogonal_kernel_of_half_precision_is_the_wide_one_rounded():
  shape, dtypes = (1, 2, 2, 2, 2, 2, 2), (jnp.bfloat16, jnp.float32)
  draw = helpers.quick_jit(lambda key: [tile_kernel_init(key, shape, dtype) for dtype in dtypes])
  half, wide = draw(jax.random.key(0))
  assert half.dtype == jnp.bfloat16
  np.testing.assert_array_equal(half, wide.astype(jnp.bfloat16))
  matrix = np.asarray(wide).reshape(8, 8)
  np.testing.assert_allclose(matrix @ matrix.T, np.eye(8), atol=1e-5)
