"""Dtypes that a fused function must keep: of numbers of Python, of casts on purpose, of 8 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import repjax
from repjax.errors import InputError
from repjax.fusion.merges import Merge
from tests.fusion.block import IMAGES, drawn, fused_error, random
from tests.fusion.nets import convolved, normalised
from tests.helpers import relative_error

HALF, TINY = jnp.bfloat16, jnp.float8_e4m3fn


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


def test_weak_parameters_of_32_bits_are_folded_where_numbers_have_64():
  params = {"a": jnp.ones((1, 3)), "n": jax.jit(lambda: 0)(), "f": jax.jit(lambda: 1.0)()}
  x = random(2, 3)
  with jax.enable_x64(True):
    assert_same(lambda p, x: jnp.sin(x * p["a"] + p["n"]) * p["f"], params, x)


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


class TestDtypes:
  def half(self, params, x):
    """Returns a block in bfloat16 whose parameters are float32, as Flax computes it."""
    kernels = {name: params[name].astype(jnp.bfloat16) for name in ("wide", "point")}
    y = convolved(x, kernels["wide"], ((1, 1), (1, 1))) + convolved(x, kernels["point"], "VALID")
    return normalised(y.astype(jnp.float32), params["norm"]).astype(jnp.bfloat16)

  def test_kernels_are_rounded_once(self):
    params, x = drawn(), random(2, 8, 9, 3, dtype=jnp.bfloat16)
    fused = repjax.fuse(self.half, params, x)
    small = fused.fold(params)
    assert fused.report.after.products == 1
    assert small["wide"].dtype == jnp.bfloat16
    scale = params["norm"]["scale"] / jnp.sqrt(params["norm"]["var"] + 1e-3)
    exact = params["wide"].at[1, 1].add(params["point"][0, 0]) * scale.reshape(1, 1, 1, 4)
    np.testing.assert_array_equal(small["wide"], exact.astype(jnp.bfloat16))
    wanted = self.half(params, x.astype(jnp.bfloat16)).astype(jnp.float32)
    assert relative_error(fused(small, x).astype(jnp.float32), wanted) <= 2e-2

  def test_the_tolerance_of_a_check_follows_the_narrowest_dtype_of_each_merge(self, monkeypatch):
    def function(params, x):
      rounded = params["rounded"].astype(jnp.bfloat16).astype(jnp.float32)
      y = jnp.sin(normalised(convolved(x, rounded), params["norm"]))
      return normalised(convolved(y, params["exact"]), params["norm"])

    params = drawn(rounded=(3, 3, 3, 3), exact=(3, 3, 3, 3), norm=(3,))
    assert len(repjax.fuse(function, params, IMAGES).report.merges) == 2
    run = Merge.run
    monkeypatch.setattr(Merge, "run", lambda self, *values: [1.01 * run(self, *values)[0]])
    with pytest.raises(InputError, match="from the parameters exact, bias"):
      repjax.fuse(function, params, IMAGES)

  def test_a_number_of_python_takes_the_dtype_of_its_neighbours(self):
    def function(params, x, factor):
      return convolved(x, params["wide"].astype(x.dtype)) * factor + params["shift"]

    params, x = drawn(wide=(3, 3, 3, 4)) | {"shift": 0.5}, random(2, 8, 9, 3, dtype=jnp.bfloat16)
    fused = repjax.fuse(function, params, x, 2.0)
    small = fused.fold(params)
    for factor in (2.0, jnp.bfloat16(2)):
      with jax.numpy_dtype_promotion("standard"):
        assert fused(small, x, factor).dtype == function(params, x, factor).dtype

  def test_products_of_integers_stay(self):
    def function(params, x):
      kernel = params["dense"].astype(jnp.int8)
      numbers = (((3,), (0,)), ((), ()))
      y = lax.dot_general(x, kernel, numbers, preferred_element_type=jnp.float32)
      return y * params["scale"].reshape(1, 1, 1, 4)

    params = jax.tree.map(lambda leaf: 9 * leaf, drawn(dense=(3, 4), scale=(4,)))
    error, fused = fused_error(function, params, (9 * random(2, 8, 9, 3)).astype(jnp.int8))
    assert error == 0
    assert "a product in int8" in str(fused.report)

  def test_a_product_of_two_dtypes_is_computed_in_the_wider(self):
    def function(params, x):
      numbers = (((3,), (0,)), ((), ()))
      y = lax.dot_general(x, params["dense"], numbers, preferred_element_type=jnp.float32)
      return y * params["scale"].reshape(1, 1, 1, 4)

    x = random(2, 8, 9, 3, dtype=jnp.bfloat16)
    error, fused = fused_error(function, drawn(dense=(3, 4), scale=(4,)), x)
    assert error <= 1e-6
    assert fused.report.merges

  def test_convolutions_of_different_precision_are_not_chained(self):
    def function(params, x):
      y = convolved(x, params["first"], precision="highest")
      return convolved(y, params["second"])

    params = drawn(first=(1, 1, 3, 3), second=(3, 3, 3, 3))
    fused = repjax.fuse(function, params, IMAGES)
    assert fused.report.after.products == 2
    assert "different precision" in str(fused.report)

  def test_a_scale_does_not_make_the_weights_of_float16_too_small(self):
    def function(params, x):
      return convolved((x / 65535).astype(jnp.float16), params["wide"].astype(jnp.float16))

    x = 65535 * jnp.abs(random(2, 8, 9, 3))
    error, fused = fused_error(function, drawn(wide=(3, 3, 3, 4)), x)
    assert error == 0
    assert "whose range is small" in str(fused.report)

  def test_an_identity_in_a_wider_dtype_is_not_rounded(self):
    def function(params, x):
      y = convolved(x.astype(jnp.bfloat16), params["wide"].astype(jnp.bfloat16))
      return normalised(y.astype(jnp.float32) + x, params["norm"])

    params = drawn(wide=(3, 3, 3, 3), norm=(3,))
    error, fused = fused_error(function, params, random(2, 8, 9, 3))
    assert error <= 2e-2
    assert "bfloat16 and float32 would be rounded" in str(fused.report)

  def test_a_shift_in_a_wider_dtype_is_not_rounded(self):
    def function(params, x):
      x = (x - params["mean"].reshape(1, 1, 1, 3)).astype(jnp.bfloat16)
      return jax.nn.relu(convolved(x, params["wide"].astype(jnp.bfloat16)))

    params = drawn(wide=(3, 3, 3, 4), mean=(3,))
    params["mean"] = params["mean"] + 1000
    x = random(2, 8, 9, 3) + 1000
    error, fused = fused_error(function, params, x)
    assert error <= 1e-2
    assert "a shift in float32 before a product in bfloat16" in str(fused.report)
