"""The report of a fused function, strict mode, and warnings about training mode."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import repjax
from repjax.errors import InputError
from tests.fusion.block import IMAGES, branches, drawn, fused_error, random
from tests.fusion.nets import convolved, normalised
from tests.helpers import relative_error


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

  def test_constants_that_scale_and_shift_are_no_parameters(self):
    report = repjax.fuse(lambda _, x: jnp.sin((x - 1) / 2 + 3), {}, IMAGES).report
    (merge,) = report.merges
    assert (merge.place, merge.parts) == ("constants", ("scale and shift",))
    assert merge.after == (0, 0, 0)

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
    with pytest.raises(InputError, match=r"1 norm stays.*first, norm/.* and 2 more, follows sin"):
      repjax.fuse(function, params, IMAGES, strict=True)
    with pytest.raises(InputError, match=r"1 norm stays.*first, in the scope block, follows sin"):
      repjax.fuse(jax.named_scope("block")(function), params, IMAGES, strict=True)
    repjax.fuse(branches, drawn(), IMAGES, strict=True)

  @pytest.mark.parametrize("scanned", [False, True])
  def test_a_norm_that_stays_is_known_by_its_parameters_and_the_function_before_it(self, scanned):
    def function(params, x):
      return jnp.sin(normalised(jax.nn.relu(x), params["norm"]))

    def repeated(params, x):
      return lax.scan(lambda y, own: (function(own, y), 0), x, params)[0]

    params = drawn(norm=(3,))
    if scanned:
      params = jax.tree.map(lambda leaf: leaf[None], params)
    report = repjax.fuse(repeated if scanned else function, params, IMAGES).report
    (norm,) = report.norms
    assert norm.reason.startswith("follows relu, ")
    assert set(norm.names) == {f"norm/{name}" for name in params["norm"]}
    assert "\nnorm/" in str(report).split("left alone")[1]

  @pytest.mark.parametrize("added", ["identity", "shortcut"])
  def test_a_shortcut_of_a_different_source_is_no_identity_of_the_kernel(self, added):
    def function(params, x):
      y = jnp.sin(x)
      wide, point = convolved(y, params["wide"]), convolved(y, params["point"])
      return wide + point + (y if added == "identity" else x)

    params = drawn(wide=(3, 3, 3, 3), point=(1, 1, 3, 3))
    (merge,) = repjax.fuse(function, params, IMAGES).report.merges
    assert merge.parts == ("conv3x3", "conv1x1", added)

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
      report = repjax.fuse(function, drawn(), IMAGES).report
    assert "deviation" in report.to_json()["training"]

  def test_each_sign_of_training_is_named_and_strict_refuses_it(self):
    def function(params, x):
      y = convolved(x, params["wide"])
      deviation = jnp.sqrt((y * y).mean((0, 1, 2), keepdims=True))
      return y / deviation * jax.random.uniform(jax.random.key(0), y.shape)

    with (
      pytest.warns(UserWarning, match="random numbers, .*, and divides by the deviation"),
      pytest.raises(InputError, match=r"strict=True .*random numbers.*deviation.*model\.eval\(\)"),
    ):
      repjax.fuse(function, drawn(wide=(3, 3, 3, 4)), IMAGES, strict=True)

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
