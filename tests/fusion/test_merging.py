"""What merges: bodies of loops, means, paddings, concatenations, products over several axes."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax import lax

import repjax
from tests.fusion.block import IMAGES, branches, drawn, fused_error, random
from tests.fusion.nets import convolved, normalised
from tests.helpers import relative_error


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

  @pytest.mark.parametrize(("axis", "products"), [(3, 2), (1, 3)])
  def test_a_scale_merges_across_a_reshape_of_pixels(self, axis, products):
    def function(params, x):  # as attention does: rows of pixels, and a map again
      rows = jnp.sin(x).reshape(2, 30, 3) @ params["dense"] + params["bias"].reshape(1, 1, -1)
      return x + rows.reshape(x.shape) * params["scale"]

    vector = tuple(x if place == axis else 1 for place, x in enumerate((2, 5, 6, 3)))
    params = drawn(dense=(3, 3), bias=(3,), scale=vector)
    error, fused = fused_error(function, params, random(2, 5, 6, 3))
    assert error <= 1e-5
    assert len(fused.fold(params)) == products

  def test_a_product_that_is_read_before_its_reshape_is_not_copied(self):
    def function(params, x):
      rows = jnp.sin(x).reshape(2, 30, 3) @ params["dense"]
      return rows, rows.reshape(x.shape) * params["scale"].reshape(1, 1, 1, 3)

    fused = repjax.fuse(function, drawn(dense=(3, 3), scale=(3,)), random(2, 5, 6, 3))
    assert fused.report.after.products == 1

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
