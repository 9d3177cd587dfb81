"""Dtypes that a fused function must keep: of numbers of Python, of casts on purpose, of 8 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repjax
from tests.fusion.nets import convolved

HALF, TINY = jnp.bfloat16, jnp.float8_e4m3fn


def random(*shape, dtype=jnp.float32):
  """Returns random numbers."""
  return jnp.asarray(np.random.default_rng(3).normal(size=shape), dtype)


def assert_same(function, params, *args, tolerance=1e-5):
  """Checks results and dtypes of a fused function, and returns its report."""
  fused = repjax.fuse(function, params, *args)
  mine, wanted = fused(fused.fold(params), *args), function(params, *args)
  assert mine.dtype == wanted.dtype
  mine, wanted = (np.asarray(each, np.float32) for each in (mine, wanted))
  np.testing.assert_allclose(mine, wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())
  return fused.report


@pytest.mark.parametrize("number", [0.5, jnp.asarray(0.5)], ids=["python", "jax"])
def test_weak_numbers_take_the_dtype_of_what_they_meet(number):
  params, x = {"kernel": random(1, 1, 3, 4, dtype=HALF)}, random(2, 4, 4, 3, dtype=HALF)
  assert_same(lambda p, x, a: convolved(x, p["kernel"]) * a, params, x, number)
  assert_same(lambda p, x: convolved(x, p["kernel"]) * p["a"], params | {"a": number}, x)


@pytest.mark.parametrize("narrow", [HALF, jnp.float16, TINY])
@pytest.mark.parametrize("what", ["kernel", "input", "result"])
def test_a_cast_to_fewer_bits_and_back_is_kept(narrow, what):
  def rounded(name, value):
    return value.astype(narrow).astype(jnp.float32) if name == what else value

  def function(p, x):
    y = convolved(rounded("input", x), rounded("kernel", p["kernel"]))
    return jnp.sin(rounded("result", y) * p["scale"])

  params = {"kernel": random(3, 3, 3, 4), "scale": random(1, 1, 1, 4)}
  assert_same(function, params, random(2, 4, 4, 3))


def test_a_number_that_overflows_in_a_narrow_dtype_overflows_still():
  def function(p, x):
    y = convolved(x, p["kernel"]).astype(jnp.float16).astype(jnp.float32)
    return y * p["scale"]

  params = {"kernel": random(1, 1, 3, 4), "scale": random(1, 1, 1, 4)}
  fused = repjax.fuse(function, params, x := 1e6 * random(2, 4, 4, 3))
  np.testing.assert_array_equal(
    jnp.isinf(fused(fused.fold(params), x)), jnp.isinf(function(params, x))
  )


@pytest.mark.parametrize(
  ("first", "second"),
  [(TINY, TINY), ("int8", "int8"), ("bfloat16", "int8")],
)
def test_scales_stay_after_products_of_few_bits(first, second):
  def function(p, x):
    numbers = ((3,), (0,)), ((), ())
    y = jax.lax.dot_general(x, p["kernel"], numbers, preferred_element_type=jnp.float32)
    return jnp.sin(y * p["scale"])

  params = {"kernel": (20 * random(3, 4)).astype(second), "scale": random(1, 1, 1, 4) / 1000}
  report = assert_same(function, params, (20 * random(2, 4, 4, 3)).astype(first))
  assert "a product in" in str(report)
  assert not report.merges
