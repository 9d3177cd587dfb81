"""The promises of `repjax.fuse`: pure folds, exactness, bounds, reports, and errors that help."""

import collections
import concurrent.futures
import functools
import json
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import freeze
from jax import lax

import repjax
from repjax.errors import InputError
from repjax.fusion import checks
from repjax.fusion.merges import Merge
from repjax.fusion.planning import Planner
from tests.fusion.nets import convolved, normalised, randomised, shapes
from tests.helpers import assert_one_paragraph, relative_error

IMAGES = jax.ShapeDtypeStruct((2, 8, 9, 3), jnp.float32)
BRANCHES = {"wide": (3, 3, 3, 4), "point": (1, 1, 3, 4), "norm": (4,)}


def branches(params, x, strides=(1, 1), padding=((1, 1), (1, 1))):
  """Returns a 3x3 and a 1x1 side by side, with a norm after the sum."""
  point = "SAME" if padding == "SAME" else "VALID"
  y = convolved(x, params["wide"], padding, strides=strides)
  y = y + convolved(x, params["point"], point, strides=strides)
  return jax.nn.relu(normalised(y, params["norm"]))


def drawn(dtype=jnp.float32, **kernels):
  """Returns random parameters of shapes, in a dtype."""
  tree = randomised(shapes(**(kernels or BRANCHES)))
  return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def random(*shape, dtype=jnp.float32, seed=3):
  """Returns random numbers."""
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def fused_error(function, params, *args, **settings):
  """Returns the relative error of the fused function, and the fused function."""
  # The caller compares the whole function, so that the check of each merge would add nothing.
  fused = repjax.fuse(function, params, *args, check=False, **settings)
  return relative_error(fused(fused.fold(params), *args), function(params, *args)), fused


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


SPEC = ("NHWC", "HWIO", "NHWC")


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


class TestSizes:
  def test_sizes_that_need_different_kernels_are_refused(self):
    def function(params, x):
      return branches(params, x, (2, 2), "SAME")

    fused, params = repjax.fuse(function, drawn(), IMAGES), drawn()
    with pytest.raises(InputError, match=r"different fused parameters.*wide.*also") as raised:
      fused(fused.fold(params), random(2, 9, 9, 3))
    assert_one_paragraph(raised.value)

  def test_also_merges_what_holds_for_all_sizes(self):
    def function(params, x):
      return branches(params, x, (2, 2), "SAME")

    params = drawn()
    fused = repjax.fuse(function, params, IMAGES, also=[random(2, 9, 9, 3), (random(1, 7, 8, 3),)])
    small = fused.fold(params)
    for height, width in ((8, 9), (9, 9), (7, 8)):
      x = random(2, height, width, 3)
      assert relative_error(fused(small, x), function(params, x)) <= 1e-5
    assert fused.report.after.products == 2

  def test_results_without_numbers(self):
    def function(params, x):
      y = lax.reduce_window(x, np.float32(0), lax.add, (1, 1, 2, 1), (1, 1, 3, 1), "VALID")
      return jnp.sin(convolved(-y, params["wide"]) * params["scale"].reshape(1, 1, 1, -1)), 2.5

    for features, width in ((0, 9), (4, 1), (4, 0)):
      params = drawn(wide=(3, 3, 3, features), scale=(features,))
      x = random(2, 8, width, 3)
      fused = repjax.fuse(function, params, x)
      result, number = fused(fused.fold(params), x)
      assert result.shape == function(params, x)[0].shape
      assert isinstance(number, jax.Array)

  def test_new_sizes_are_planned_while_a_call_is_traced(self):
    fused, params = repjax.fuse(branches, drawn(), IMAGES), drawn()
    x = random(1, 12, 5, 3)
    assert relative_error(jax.jit(fused)(fused.fold(params), x), branches(params, x)) <= 1e-5

  def test_batches_without_an_image_are_planned_as_others_are(self):
    def function(params, x):
      return 2 * jnp.einsum("bhwc,cnd->bnhwd", x, params["dense"]) + branches(params, x)[:, None]

    params = drawn(**BRANCHES, dense=(3, 2, 4))
    fused = repjax.fuse(function, params, IMAGES)
    assert fused(fused.fold(params), random(0, 8, 9, 3)).shape == (0, 2, 8, 9, 4)

  def test_threads_may_plan_new_sizes_at_once(self, monkeypatch):
    planned, inside, found = Planner.planned, [], []

    def slowly(self, *given):
      inside.append(self)
      time.sleep(0.02)
      found.append(len(inside))
      inside.remove(self)
      return planned(self, *given)

    fused, params = repjax.fuse(branches, drawn(), IMAGES), drawn()
    small, count = fused.fold(params), 8
    inputs = [random(1, 5 + place, 6, 3) for place in range(count)]
    start = threading.Barrier(count)
    monkeypatch.setattr(Planner, "planned", slowly)

    def call(x):
      start.wait()
      return fused(small, x)

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
      for x, result in zip(inputs, pool.map(call, inputs), strict=True):
        assert relative_error(result, branches(params, x)) <= 1e-5
    assert found == [1] * count  # all plans share a table, which holds one thread at a time

  def test_plans_follow_the_settings_of_jax(self):
    fused, params, x = repjax.fuse(self.two, drawn(), IMAGES), drawn(), random(2, 8, 9, 3)
    small = fused.fold(params)
    fused(small, x)
    with jax.default_matmul_precision("highest"):
      assert str(jax.make_jaxpr(fused)(small, x)).count("precision=(Precision.HIGHEST") == 2
    with jax.enable_x64(True):
      assert fused(small, x).dtype == self.two(params, x).dtype

  def two(self, params, x):
    """Returns a merge beside a convolution that stays, times a number of the default dtype."""
    y = convolved(jnp.sin(x), params["point"])
    with jax.numpy_dtype_promotion("standard"):
      return (branches(params, x) + jnp.sin(y)) * jnp.arange(2.0)[1]

  def test_sizes_that_are_symbols_cannot_be_checked(self):
    fused, params, x = repjax.fuse(branches, drawn(), IMAGES), drawn(), random(3, 8, 9, 3)
    small, (n,) = fused.fold(params), jax.export.symbolic_shape("n")
    images = jax.ShapeDtypeStruct((n, 8, 9, 3), jnp.float32)
    with pytest.raises(InputError, match=r"sizes are symbols.*without_checks") as raised:
      jax.export.export(jax.jit(fused))(small, images)
    assert_one_paragraph(raised.value)
    exported = jax.export.export(jax.jit(fused.without_checks()))(small, images)
    assert relative_error(exported.call(small, x), branches(params, x)) <= 1e-5


class TestParts:
  def scanned(self, params, x):
    """Returns two blocks as the body of a scan, with a kernel that the blocks share."""

    def block(carry, own):
      y, count = carry
      y = jax.nn.relu(branches(own, y) + y)
      return (convolved(y, params["shared"]) * 0.5, count + 1), y.mean((1, 2))

    blocks = {name: params[name] for name in ("wide", "point", "norm")}
    (y, _), means = lax.scan(block, (x, 0), blocks)
    return y, means

  def test_a_norm_whose_statistics_are_broadcast_to_the_map_first_merges(self):
    def function(params, x):
      norm = params["norm"]

      def one(x):
        y = convolved(x[None], params["wide"])[0]
        mean, var, scale, bias = (
          jnp.broadcast_to(norm[key], y.shape) for key in ("mean", "var", "scale", "bias")
        )
        return jax.nn.relu((y - mean) / jnp.sqrt(var + 1e-3) * scale + bias)

      return jax.vmap(one)(x)

    params = drawn(wide=(3, 3, 3, 4), norm=(4,))
    error, fused = fused_error(function, params, random(2, 8, 9, 3))
    assert error <= 1e-5
    assert not fused.report.norms
    assert not fused.report.left
    assert {name: array.shape for name, array in fused.fold(params).items()} == {
      "wide": (3, 3, 3, 4),
      "bias": (4,),
    }

  def test_the_body_of_a_scan_is_fused(self):
    one = drawn(wide=(3, 3, 3, 3), point=(1, 1, 3, 3), norm=(3,))
    params = jax.tree.map(lambda leaf: jnp.stack([leaf, 1.1 * leaf]), one)
    params["shared"], x = random(1, 1, 3, 3), random(2, 8, 8, 3)
    fused = repjax.fuse(self.scanned, params, x)
    small = fused.fold(params)
    assert small["wide"].shape == (2, 3, 3, 3, 3)
    assert (fused.report.before.products, fused.report.after.products) == (3, 2)
    for mine, wanted in zip(fused(small, x), self.scanned(params, x), strict=True):
      assert relative_error(mine, wanted) <= 1e-5

  def test_a_loop_that_prints_stays_although_nothing_reads_it(self, capsys):
    def function(params, x):
      def step(carry, own):
        jax.debug.print("seen")
        return jax.nn.relu(branches(own, carry)), 0

      lax.scan(step, x, params)
      return x + 1

    one = drawn(wide=(3, 3, 3, 3), point=(1, 1, 3, 3), norm=(3,))
    params, x = jax.tree.map(lambda leaf: leaf[None], one), random(2, 8, 9, 3)
    fused = repjax.fuse(function, params, x, check=False)
    assert fused.report.merges
    capsys.readouterr()
    fused(fused.fold(params), x)
    jax.effects_barrier()
    assert capsys.readouterr().out == "seen\n"

  def test_the_branches_of_a_choice_are_fused(self):
    def function(params, x):
      choice = x.sum() > 0
      return lax.cond(choice, lambda x: branches(params, x), lambda x: branches(params, -x), x)

    for sign in (1, -1):
      x = sign * jnp.abs(random(2, 8, 9, 3))
      error, fused = fused_error(function, drawn(), x)
      assert error <= 1e-5
      assert (fused.report.before.products, fused.report.after.products) == (4, 2)

  def test_the_body_of_a_while_loop_is_fused(self):
    def function(params, x):
      def step(carry):
        y, count = carry
        return jax.nn.relu(branches(params, y) + y), count + 1

      return lax.while_loop(lambda carry: carry[1] < params["count"][0], step, (x, 0))

    params = drawn(wide=(3, 3, 3, 3), point=(1, 1, 3, 3), norm=(3,)) | {"count": jnp.array([2])}
    x = random(2, 8, 9, 3)
    fused = repjax.fuse(function, params, x)
    assert (fused.report.before.products, fused.report.after.products) == (2, 1)
    (y, count), (wanted, _) = fused(fused.fold(params), x), function(params, x)
    assert relative_error(y, wanted) <= 1e-5
    assert count == 2

  def test_a_norm_before_a_mean_merges_into_the_layer_after_the_mean(self):
    def dropped(y):
      return y.mean((1, 2))

    def kept(y):
      return y.mean((1, 2), keepdims=True)

    def pooled(y):
      with jax.numpy_dtype_promotion("standard"):
        return nn.avg_pool(y, y.shape[1:3])[:, 0, 0]

    def function(params, x, mean):
      return jnp.sin(mean(normalised(jnp.sin(x), params["norm"])) @ params["dense"])

    params = drawn(norm=(3,), dense=(3, 4))
    for mean in (dropped, kept, pooled):
      fused = repjax.fuse(functools.partial(function, mean=mean), params, IMAGES)
      assert not fused.report.norms
      small = fused.fold(params)
      x = random(1, 5, 7, 3)
      assert relative_error(fused(small, x), function(params, x, mean)) <= 1e-5

  @pytest.mark.parametrize(("low", "border"), [(0, (1, 3, 4)), (1, (1, 5, 3, 4))])
  def test_a_border_has_no_taps_along_an_axis_that_is_gone(self, low, border):
    def function(params, x):
      scaled = x * params["scale"] + params["shift"]
      return convolved(scaled, params["wide"], ((low, 0), (1, 1)))[:, 0]

    vector = (1, 1, 1, 3)
    params = drawn(wide=(5, 3, 3, 4), scale=vector, shift=vector)
    error, fused = fused_error(function, params, random(2, 5, 6, 3))
    assert error <= 1e-5
    assert fused.fold(params)["border"].shape == border

  @pytest.mark.parametrize("mode", ["reflect", "symmetric"])
  def test_padding_by_reflection_moves_before_a_norm(self, mode):
    def function(params, x):
      y = normalised(convolved(x, params["point"]), params["norm"])
      y, x = (jnp.pad(each, ((0, 0), (1, 1), (1, 1), (0, 0)), mode=mode) for each in (y, x))
      y = convolved(y, params["wide"], "VALID") + convolved(x, params["skip"], "VALID")
      return jax.nn.relu(y)

    params = drawn(point=(1, 1, 3, 4), norm=(4,), wide=(3, 3, 4, 4), skip=(3, 3, 3, 4))
    error, fused = fused_error(function, params, random(2, 8, 9, 3))
    assert error <= 1e-5
    assert fused.report.after.products == 1

  def test_reflection_after_a_scale_that_merges_with_nothing_stays(self):
    def function(params, x):
      scale = params["scale"].reshape(1, 1, 1, 3)
      return jnp.sin(jnp.pad(x * scale, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect"))

    error, fused = fused_error(function, drawn(scale=(3,)), random(2, 8, 9, 3))
    assert error == 0
    assert not fused.report.merges

  def test_a_norm_after_a_concatenation_merges_into_its_parts(self):
    def function(params, x):
      parts = [convolved(x, params["wide"]), convolved(x, params["point"])]
      return jax.nn.relu(normalised(jnp.concatenate(parts, -1), params["norm"])[..., 1:])

    params = drawn(wide=(3, 3, 3, 4), point=(1, 1, 3, 2), norm=(6,))
    error, fused = fused_error(function, params, random(2, 8, 9, 3))
    assert error <= 1e-5
    assert not fused.report.norms

  def test_channels_that_nothing_reads_are_dropped(self):
    def function(params, x):
      return jax.nn.relu(normalised(convolved(x, params["wide"]), params["norm"])[..., 1:3])

    error, fused = fused_error(function, drawn(wide=(3, 3, 3, 4), norm=(4,)), random(2, 8, 9, 3))
    assert error <= 1e-5
    assert fused.fold(drawn(wide=(3, 3, 3, 4), norm=(4,)))["wide"].shape == (3, 3, 3, 2)

  def test_a_norm_merges_into_products_over_several_axes(self):
    def function(params, x):
      x = normalised(x, params["norm"])
      heads = [jnp.einsum("bhwc,cnd->bhwnd", x, params[name]) for name in ("first", "second")]
      return [jnp.sin(head) for head in heads]

    params, x = drawn(first=(3, 2, 4), second=(3, 2, 5), norm=(3,)), random(2, 4, 5, 3)
    fused = repjax.fuse(function, params, x)
    results = fused(fused.fold(params), x)
    for mine, wanted in zip(results, function(params, x), strict=True):
      assert relative_error(mine, wanted) <= 1e-5
    assert not fused.report.norms

  @pytest.mark.parametrize(
    "product",
    [
      "bhwc,cnd->bhwnd",
      "cnd,bhwc->ndbhw",
      "bhwc,cnd->nbhwd",
      "bhwc,hcnd->bhwnd",
      "bhwc,wcnd->bnhd",
    ],
  )
  def test_arithmetic_after_a_product_over_several_axes_merges(self, product):
    operands, result = product.split("->")
    kernel = "dense" if operands.startswith("bhwc") else "first"
    weights = {"c": 3, "n": 2, "d": 4, "h": 5, "w": 6}
    letters = next(each for each in operands.split(",") if each != "bhwc")
    vector = tuple(weights[letter] if letter in "nd" else 1 for letter in result)

    def function(params, x):
      given = (x, params["dense"]) if kernel == "dense" else (params["dense"], x)
      y = jnp.einsum(product, *given)
      return jnp.sin(y * params["scale"] - params["shift"])

    params = drawn(dense=tuple(weights[each] for each in letters), scale=vector, shift=vector)
    x = random(2, 5, 6, 3)
    error, fused = fused_error(function, params, x)
    assert error <= 1e-5
    (merge,) = fused.report.merges
    assert merge.operations == 3
    assert len(fused.fold(params)) == 2

  def test_a_convolution_over_tiles_merges_into_the_product_beside_it(self):
    def function(params, x):
      x = jnp.sin(x)
      groups = x.reshape(2, 4, 4, 2, 3).transpose(3, 0, 1, 2, 4).reshape(2, 2, 48)
      y = jnp.einsum("gni,gio->gno", groups, params["dense"])
      y = y.reshape(2, 2, 4, 4, 3).transpose(1, 2, 3, 0, 4).reshape(x.shape)
      local = convolved(x, params["wide"], feature_group_count=2)
      return jnp.sin(y + normalised(local, params["norm"]))

    params = drawn(dense=(2, 48, 48), wide=(3, 3, 3, 6), norm=(6,))
    error, fused = fused_error(function, params, random(2, 4, 4, 6))
    assert error <= 1e-5
    assert (fused.report.before.products, fused.report.after.products) == (2, 1)


class TestReport:
  def test_the_report_counts_convolutions_multiplications_and_parameters(self):
    report = repjax.fuse(branches, drawn(), IMAGES).report
    (merge,) = report.merges
    assert merge.before == (2, 2 * 72 * 4 * 3 * 10, 108 + 12 + 16)
    assert merge.after == (1, 2 * 72 * 4 * 3 * 9, 112)
    assert merge.parts == ("conv3x3", "conv1x1")
    assert "2 -> 1" in str(report)

  @pytest.mark.parametrize("steps", [0, 2])
  def test_merges_without_a_scope_are_known_by_their_largest_parameters(self, steps):
    def scanned(params, x):
      return lax.scan(lambda x, own: (branches(own, x), 0), x, params)[0]

    params = drawn(wide=(3, 3, 3, 3), point=(1, 1, 3, 3), norm=(3,))
    if steps:
      params = jax.tree.map(lambda leaf: jnp.stack([leaf] * steps), params)
    fused = repjax.fuse(scanned if steps else branches, params, IMAGES)
    assert fused.report.merges[0].names[:2] == ("wide", "point")
    assert "\nwide, point and 4 more  conv3x3" in str(fused.report)
    named = repjax.fuse(jax.named_scope("block")(branches), drawn(), IMAGES).report
    assert "\nblock " in str(named)
    assert "wide" not in str(named)

  def test_the_counts_are_shown_in_short(self):
    assert "2 -> 1 products, 136 -> 112 parameters" in repr(repjax.fuse(branches, drawn(), IMAGES))

  def test_the_report_is_json(self):
    report = repjax.fuse(branches, drawn(), IMAGES).report
    tree = json.loads(json.dumps(report.to_json()))
    assert tree["merges"][0]["after"]["products"] == 1
    assert tree["left"] == []

  def test_strict_raises_if_a_norm_stays(self):
    def function(params, x):
      return jnp.sin(normalised(jnp.sin(x), params["norm"]))

    params = drawn(norm=(3,))
    error, fused = fused_error(function, params, random(2, 8, 9, 3))
    assert error <= 1e-6
    assert len(fused.report.norms) == 1
    with pytest.raises(InputError, match=r"1 norm stays.*first follows sin"):
      repjax.fuse(function, params, IMAGES, strict=True)
    with pytest.raises(InputError, match=r"1 norm stays.*first \(scope 'block'\) follows sin"):
      repjax.fuse(jax.named_scope("block")(function), params, IMAGES, strict=True)
    repjax.fuse(branches, drawn(), IMAGES, strict=True)

  def test_norms_that_stay_in_two_loops_are_counted_apart(self):
    def function(params, x):
      for own in params:
        x, _ = lax.scan(lambda y, own: (jnp.sin(normalised(jnp.sin(y), own["norm"])), 0), x, own)
      return x

    own = jax.tree.map(lambda leaf: leaf[None], drawn(norm=(3,)))
    assert len(repjax.fuse(function, [own, own], IMAGES).report.norms) == 2

  def test_a_norm_that_stays_is_one_multiply_add(self):
    def function(params, x):
      return jnp.sin(normalised(jnp.sin(x), params["norm"]))

    fused = repjax.fuse(function, drawn(norm=(3,)), IMAGES)
    small = fused.fold(drawn(norm=(3,)))
    assert {name: array.shape for name, array in small.items()} == {
      "norm/scale": (3,),
      "norm/bias": (3,),
    }

  @pytest.mark.parametrize("kind", [jax.custom_vjp, jax.custom_jvp])
  def test_a_gradient_rule_around_a_product_is_reported(self, kind):
    @kind
    def product(x, kernel):
      return x @ kernel

    if isinstance(product, jax.custom_vjp):
      product.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), lambda _, y: (y, y))
    if isinstance(product, jax.custom_jvp):
      product.defjvp(lambda values, tangents: (values[0] @ values[1], tangents[0] @ values[1]))
    fused = repjax.fuse(lambda params, x: product(x, params["dense"]), drawn(dense=(3, 4)), IMAGES)
    assert "gradients of the call do not follow its rule" in str(fused.report)

  def test_training_mode_is_noticed(self):
    def function(params, x):
      y = convolved(x, params["wide"])
      mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2))
      return normalised(y, {**params["norm"], "mean": mean, "var": var})

    with pytest.warns(UserWarning, match=r"deviation over its batch.*train=False"):
      repjax.fuse(function, drawn(), IMAGES)

  def test_statistics_over_an_axis_of_vmap_are_noticed(self):
    def one(params, x):
      y = convolved(x[None], params["wide"])[0]
      mean, square = (jax.lax.pmean(each.mean((0, 1)), "batch") for each in (y, y * y))
      return normalised(y, {**params["norm"], "mean": mean, "var": square - mean * mean})

    function = jax.vmap(one, axis_name="batch", in_axes=(None, 0))
    with pytest.warns(UserWarning, match=r"deviation over its batch.*inference_mode"):
      repjax.fuse(function, drawn(), IMAGES)

  def test_random_numbers_of_a_parameter_are_drawn_in_each_call(self):
    def function(params, x):
      key = jax.random.fold_in(params["key"], params["count"])
      return branches(params, jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0))

    params = drawn() | {"key": jax.random.key(0), "count": jnp.uint32(3)}
    with pytest.warns(UserWarning, match=r"draws random numbers.*model\.eval\(\)"):
      fused = repjax.fuse(function, params, IMAGES)
    small, x = fused.fold(params), random(3, 8, 9, 3)
    assert {small["key"].shape, small["count"].shape} == {()}
    with pytest.warns(UserWarning, match="draws random numbers"):
      result = fused(small, x)  # a different batch size, and the same parameters
    assert relative_error(result, function(params, x)) <= 1e-5

  def test_random_numbers_are_noticed(self):
    def function(params, x):
      keep = jax.random.bernoulli(jax.random.key(0), 0.5, x.shape)
      return branches(params, jnp.where(keep, x, jnp.float32(0)))

    with pytest.warns(UserWarning, match="draws random numbers"):
      repjax.fuse(function, drawn(), IMAGES)


class TestMistakes:
  @pytest.mark.parametrize(
    ("model", "said"),
    [
      (nn.Dense(3), "Dense is a module of flax.linen.*model.apply"),
      (nnx.Dropout(0.5), "Dropout is a module of flax.nnx.*nnx.split"),
      ({}, "got dict"),
    ],
  )
  def test_what_is_no_function_of_parameters(self, model, said):
    with pytest.raises(InputError, match=said) as caught:
      repjax.fuse(model, drawn(), IMAGES)
    assert_one_paragraph(caught.value)

  def test_a_module_among_the_parameters(self):
    with pytest.raises(InputError, match=r"a module of flax.linen: pass model.apply"):
      repjax.fuse(branches, (nn.Dense(3), drawn()), IMAGES)

  @pytest.mark.parametrize("shape", [lambda p, x: x[x > 0], lambda p, x: jnp.unique(x)])
  def test_a_shape_that_depends_on_values(self, shape):
    with pytest.raises(InputError, match=r"\. Bind settings.*mask for x\[x > 0\], and size="):
      repjax.fuse(shape, drawn(), IMAGES)

  def test_parameters_that_are_no_arrays(self):
    with pytest.raises(InputError, match=r"name is 'relu'.*functools.partial"):
      repjax.fuse(branches, drawn() | {"name": "relu"}, IMAGES)

  @pytest.mark.parametrize("growth", [0.5, float("nan"), "2"])
  def test_a_growth_that_is_no_number_of_at_least_one(self, growth):
    with pytest.raises(InputError, match=rf"growth is {growth!r}, but must be 1 or more"):
      repjax.fuse(branches, drawn(), IMAGES, growth=growth)

  @pytest.mark.parametrize("also", [IMAGES, random(2, 8, 9, 3)])
  def test_further_arguments_that_are_no_list(self, also):
    with pytest.raises(InputError, match=r"also is .*must be a list.*also=\[images\]"):
      repjax.fuse(branches, drawn(), IMAGES, also=also)

  def test_arguments_that_are_no_arrays(self):
    with pytest.raises(InputError, match=r"argument 1 is 'train'"):
      repjax.fuse(branches, drawn(), IMAGES, "train")
    fused = repjax.fuse(branches, drawn(), IMAGES)
    with pytest.raises(InputError, match=r"argument 1 is 'train'"):
      fused(fused.fold(drawn()), random(2, 8, 9, 3), "train")

  @pytest.mark.parametrize(
    "function",
    [lambda params, x: x if x.sum() > 0 else -x, lambda params, x: x[x > 0]],
    ids=["choice", "shape"],
  )
  def test_functions_whose_program_depends_on_values(self, function):
    with pytest.raises(InputError, match="depends on the values of its arguments") as raised:
      repjax.fuse(function, drawn(), IMAGES)
    assert_one_paragraph(raised.value)

  def test_parameters_of_a_different_tree(self):
    fused = repjax.fuse(branches, drawn(), IMAGES)
    with pytest.raises(InputError, match=r"different names.*such as norm/bias"):
      fused.fold({"wide": drawn()["wide"]})
    with pytest.raises(InputError, match=r"wide with shape \(5, 5, 3, 4\)"):
      fused.fold(drawn(wide=(5, 5, 3, 4), point=(1, 1, 3, 4), norm=(4,)))
    with pytest.raises(InputError, match="wide with shape None"):
      fused.fold(drawn() | {"wide": "3x3"})

  def test_keys_and_empty_places_among_the_parameters_are_no_mistake(self):
    params, x = {"net": drawn(), "key": jax.random.key(0), "none": None}, random(2, 8, 9, 3)
    error, fused = fused_error(lambda params, x: branches(params["net"], x), params, x)
    assert error <= 1e-5
    assert fused.report.after.products == 1

  def test_folded_parameters_of_a_different_function(self):
    fused = repjax.fuse(branches, drawn(), IMAGES)
    with pytest.raises(InputError, match=r"not from its own fold.*: wide"):
      fused(drawn(dense=(3, 4)), random(2, 8, 9, 3))
    with pytest.raises(InputError, match=r"not from its own fold"):
      fused({"wide": "3x3", "bias": None}, random(2, 8, 9, 3))
