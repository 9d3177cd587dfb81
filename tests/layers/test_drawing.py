"""Initial values of layers where the key is traced: their distributions, and what decides them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repjax.layers.drawing import draw
from repjax.layers.linear import uniform_bound
from tests import helpers

KEY = jax.random.key(0)


def shapes(kernel=(3, 3, 16, 32), dtype=jnp.float32):
  features = kernel[-1:]
  conv = {
    "kernel": jax.ShapeDtypeStruct(kernel, dtype),
    "bias": jax.ShapeDtypeStruct((512,), dtype),
  }
  norm = {name: jax.ShapeDtypeStruct(features, dtype) for name in ("scale", "bias")}
  return {"conv3x3": {"conv": conv, "bn": norm}}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_are_those_of_init(dtype):
  drawn = draw(shapes(dtype=dtype), KEY)
  assert helpers.shapes(drawn) == helpers.shapes(shapes(dtype=dtype))
  conv, norm = drawn["conv3x3"]["conv"], drawn["conv3x3"]["bn"]
  bound = uniform_bound((3, 3, 16, 32))
  for leaf in conv.values():  # uniform: mean 0, variance bound^2 / 3
    values = np.asarray(leaf, np.float64)
    assert 0.95 * bound < np.abs(values).max() <= 1.01 * bound
    np.testing.assert_allclose(values.std(), bound / np.sqrt(3), rtol=0.1)
  assert (norm["scale"] == 1).all()
  assert (norm["bias"] == 0).all()


def test_kernels_over_tiles_are_orthogonal():
  kernel = draw({"kernel": jax.ShapeDtypeStruct((1, 2, 2, 3, 2, 2, 3), jnp.float32)}, KEY)["kernel"]
  matrix = np.asarray(kernel).reshape(12, 12)
  np.testing.assert_allclose(matrix @ matrix.T, np.eye(12), atol=1e-5)


def test_key_and_path_decide_and_nothing_else():
  whole = draw({**shapes(), "conv1x1": shapes()["conv3x3"]}, KEY)
  alone, other = draw(shapes(), KEY), draw(shapes(), jax.random.key(1))
  traced = jax.jit(lambda key: draw(shapes(), key))(KEY)
  kernel = whole["conv3x3"]["conv"]["kernel"]
  for same in (alone, traced):
    np.testing.assert_allclose(same["conv3x3"]["conv"]["kernel"], kernel, rtol=1e-6)
  for different in (other["conv3x3"], whole["conv1x1"]):
    assert np.abs(different["conv"]["kernel"] - kernel).max() > 0.1 * np.abs(kernel).max()


def test_an_unknown_leaf_is_named():
  with pytest.raises(ValueError, match="how conv/scales is distributed"):
    draw({"conv": {"scales": jax.ShapeDtypeStruct((3,), jnp.float32)}}, KEY)
