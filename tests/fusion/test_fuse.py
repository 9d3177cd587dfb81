"""The promises of `repjax.fuse`: pure folds, and exactness."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze
from jax import lax

import repjax
from repjax.errors import InputError
from repjax.fusion import checks
from repjax.fusion.merges import Merge
from tests.fusion.block import IMAGES, branches, drawn, fused_error, random
from tests.fusion.nets import convolved, normalised
from tests.helpers import assert_one_paragraph, relative_error

SPEC = ("NHWC", "HWIO", "NHWC")


class TestFold:
  def test_folded_parameters_have_the_names_of_the_largest_parameter(self):
    params = {"params": {"block": drawn()}}
    fused = repjax.fuse(lambda params, x: branches(params["params"]["block"], x), params, IMAGES)
    small = fused.fold(params)
    assert {name: array.shape for name, array in small.items()} == {
      "params/block/wide": (3, 3, 3, 4),
      "params/block/bias": (4,),
    }

  def test_one_image_and_mapped_images_merge_as_batches_do(self):
    params, x = drawn(), random(2, 8, 9, 3)
    one = lambda params, x: branches(params, x[None])[0]  # noqa: E731
    for function, images in ((one, x[0]), (jax.vmap(one, (None, 0)), x)):
      error, fused = fused_error(function, params, images)
      assert error <= 1e-5
      assert fused.report.after.products == 1

  def test_fold_is_pure(self):
    fused, params = repjax.fuse(branches, drawn(), IMAGES), drawn()
    plain, compiled = fused.fold(params), jax.jit(fused.fold)(params)
    pairs = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    mapped = jax.vmap(fused.fold)(pairs)
    for name, array in plain.items():
      np.testing.assert_allclose(compiled[name], array, rtol=1e-5, atol=1e-6)
      np.testing.assert_allclose(mapped[name][0], array, rtol=1e-5, atol=1e-6)

  def test_containers_and_the_order_of_keys_do_not_matter(self):
    fused, params = repjax.fuse(branches, drawn(), IMAGES), drawn()
    turned = collections.OrderedDict(reversed(list(params.items())))
    for other in (freeze(params), turned):
      small = fused.fold(other)
      for name, array in fused.fold(params).items():
        np.testing.assert_array_equal(small[name], array)

  def test_names_that_look_like_numbered_ones_do_not_collide(self):
    def function(params, x):
      first, second = params["kernel"], params["kernel~2"]
      return [
        jnp.sin(convolved(x, kernel) * s) for kernel, s in ((first, 2), (first, 3), (second, 4))
      ]

    params, x = drawn(**{"kernel": (3, 3, 3, 4), "kernel~2": (3, 3, 3, 4)}), random(1, 5, 6, 3)
    fused = repjax.fuse(function, params, x)
    small = fused.fold(params)
    assert len(small) == 3
    for mine, wanted in zip(fused(small, x), function(params, x), strict=True):
      assert relative_error(mine, wanted) <= 1e-4

  def test_gradients_pass_through_the_fold(self):
    fused, params, x = repjax.fuse(branches, drawn(), IMAGES), drawn(), random(2, 8, 9, 3)
    ours = jax.grad(lambda params: jnp.sum(fused(fused.fold(params), x) ** 2))(params)
    wanted = jax.grad(lambda params: jnp.sum(branches(params, x) ** 2))(params)
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
      assert relative_error(mine, other) <= 1e-4

  def test_a_kernel_that_is_used_twice_is_stored_once(self):
    params = drawn()
    fused = repjax.fuse(lambda p, x, y: (branches(p, x), branches(p, y)), params, IMAGES, IMAGES)
    assert len(fused.fold(params)) == 2

  def test_constants_that_the_function_holds_are_folded_once(self):
    params = drawn()
    fused = repjax.fuse(lambda _, x: branches(params, x), {}, IMAGES)
    assert fused.fold({}) == {}
    assert relative_error(fused({}, x := random(2, 8, 9, 3)), branches(params, x)) <= 1e-5
    products = [str(each.step) for each in fused._first.instructions if each.merged]
    assert len(products) == 1


class TestExactness:
  def test_what_does_not_merge_is_the_same_to_the_last_bit(self):
    def function(params, x):
      y = lax.conv_general_dilated(x, params["wide"], (1, 1), "SAME", dimension_numbers=SPEC)
      return jnp.sin(y) @ params["dense"] + jnp.float32(2)

    params, x = drawn(wide=(3, 3, 3, 4), dense=(4, 5)), random(2, 8, 9, 3)
    fused = repjax.fuse(function, params, x)
    assert not fused.report.merges
    np.testing.assert_array_equal(
      jax.jit(fused)(fused.fold(params), x), jax.jit(function)(params, x)
    )

  def test_a_value_that_is_read_twice_is_computed_once(self):
    def function(params, x):
      y = normalised(convolved(x, params["wide"]), params["norm"])
      return y * jax.nn.relu6(y + 3) / 6

    _, fused = fused_error(function, drawn(), random(2, 8, 9, 3))
    assert fused.report.after.products == 1

  def test_a_convolution_that_two_norms_read_is_not_copied(self):
    def function(params, x):
      y = convolved(x, params["wide"])
      return normalised(y, params["norm"]), normalised(-y, params["norm"])

    fused = repjax.fuse(function, drawn(), IMAGES)
    assert fused.report.after.products == 1
    assert len(fused.report.norms) == 2
    assert "read 2 times" in fused.report.norms[0].reason

  def test_a_part_that_is_read_twice_does_not_copy_the_convolution_that_it_is_cut_from(self):
    def function(params, x):
      part = convolved(x, params["wide"])[:, ::2, ::2]
      return part @ params["dense"], part

    params = drawn(wide=(3, 3, 3, 4), dense=(4, 4))
    fused = repjax.fuse(function, params, IMAGES)
    assert fused.report.after.multiplications <= fused.report.before.multiplications

  def test_a_value_that_is_repeated_is_computed_once(self):
    def function(params, x):
      y = normalised(convolved(x, params["wide"]), params["norm"])
      return jnp.concatenate([y, y], -1)

    error, fused = fused_error(function, drawn(), random(2, 8, 9, 3))
    assert error <= 1e-5
    assert fused.report.after.products == 1

  def test_the_mean_over_pixels_does_not_enter_a_kernel(self):
    def function(params, x):
      return x.mean((1, 2)) @ params["dense"] * params["scale"].reshape(1, 4)

    params, x = drawn(dense=(3, 4), scale=(4,)), random(2, 8, 9, 3)
    fused = repjax.fuse(function, params, x)
    small, other = fused.fold(params), random(1, 5, 4, 3)
    assert relative_error(fused(small, other), function(params, other)) <= 1e-5

  def test_a_chain_that_would_cost_more_is_left_alone_and_allowed_by_growth(self):
    def function(params, x):
      return convolved(convolved(x, params["first"]), params["second"], "VALID")

    params, x = drawn(first=(1, 1, 4, 2), second=(3, 3, 2, 8)), random(1, 8, 8, 4)
    error, fused = fused_error(function, params, x)
    assert error <= 1e-6
    assert fused.report.after.products == 2
    assert "1.89 times the multiplications" in str(fused.report)
    error, fused = fused_error(function, params, x, growth=2.0)
    assert error <= 1e-5
    assert fused.report.after.products == 1

  def test_every_merge_is_checked(self, monkeypatch):
    run = Merge.run
    monkeypatch.setattr(Merge, "run", lambda self, *values: [1.1 * run(self, *values)[0]])
    with pytest.raises(InputError, match=r"mistake.*from the parameters wide, bias") as raised:
      repjax.fuse(branches, drawn(), IMAGES)
    assert_one_paragraph(raised.value)
    repjax.fuse(branches, drawn(), IMAGES, check=False)

  def test_every_merge_in_a_scan_is_checked(self, monkeypatch):
    def function(params, x):
      return lax.scan(lambda y, own: (jax.nn.relu(branches(own, y)), 0), x, params)[0]

    one = drawn(wide=(3, 3, 3, 3), point=(1, 1, 3, 3), norm=(3,))
    params = jax.tree.map(lambda leaf: jnp.stack(3 * [leaf]), one)
    run = Merge.run
    monkeypatch.setattr(Merge, "run", lambda self, *values: [1.1 * run(self, *values)[0]])
    with pytest.raises(InputError, match="mistake"):
      repjax.fuse(function, params, IMAGES)

  def test_traced_arrays_that_a_function_holds_cannot_be_checked(self):
    def function(params, x, check):
      fused = repjax.fuse(lambda _, x: branches(params, x), {}, x, check=check)
      return fused({}, x)

    params, x = drawn(), random(2, 8, 9, 3)
    with pytest.raises(InputError, match=r"holds traced arrays.*check=False") as raised:
      jax.jit(function, static_argnums=2)(params, x, True)
    assert_one_paragraph(raised.value)
    mine = jax.jit(function, static_argnums=2)(params, x, False)
    assert relative_error(mine, branches(params, x)) <= 1e-5

  def test_random_numbers_of_a_check_are_finite_and_fit_their_dtype(self):
    for dtype in ("float32", "bfloat16", "int32", "uint8", "bool"):
      array = checks.random_array(jax.ShapeDtypeStruct((3, 4), jnp.dtype(dtype)), 0)
      assert array.dtype == dtype
      assert np.isfinite(np.asarray(array, np.float32)).all()
