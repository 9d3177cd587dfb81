"""Mistakes of a caller of `repjax.fuse`, answered in one paragraph each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import repjax
from repjax.errors import InputError
from tests.fusion.block import IMAGES, branches, drawn, fused_error, random
from tests.helpers import assert_one_paragraph


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

  def test_the_usual_mistakes_with_a_module_name_the_way_out(self):
    class Network(nn.Module):
      @nn.compact
      def __call__(self, x, train):
        return nn.BatchNorm(not train)(nn.Conv(4, (3, 3))(x))

    network, apply = Network(), functools.partial(Network().apply, train=False)
    images = jnp.ones((1, 8, 9, 3))
    variables = jax.eval_shape(lambda: network.init(jax.random.key(0), images, False))
    first = jax.ShapeDtypeStruct((1, 3, 8, 9), jnp.float32)
    for function, params, argument, said in (
      (network.apply, variables, IMAGES, r"functools\.partial, such as train=False$"),
      (apply, variables["params"], IMAGES, r"model\.init returned, .* params and batch_stats"),
      (apply, variables, first, r"channels first, .*images\.transpose\(0, 2, 3, 1\)$"),
    ):
      with pytest.raises(InputError, match=said) as caught:
        repjax.fuse(function, params, argument)
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

  @pytest.mark.parametrize(
    "leaf",
    [np.array(each) for each in ("a", None)] + [np.ones(3, each) for each in ("M8[D]", "m8[D]")],
  )
  def test_arrays_that_hold_no_numbers(self, leaf):
    with pytest.raises(InputError, match=r"a tree of arrays, but wide is an array of"):
      repjax.fuse(branches, drawn() | {"wide": leaf}, IMAGES)
    with pytest.raises(InputError, match=r"argument 0 is an array of"):
      repjax.fuse(branches, drawn(), leaf)

  @pytest.mark.parametrize(
    ("function", "args", "also", "said"),
    [
      (branches, [(1, 8, 9, 3)], (), r"whole numbers.*ShapeDtypeStruct"),
      (branches, [[1, 8, 9, 3]], (), r"whole numbers.*ShapeDtypeStruct"),
      (branches, [32], (), r"whole numbers.*ShapeDtypeStruct"),
      (lambda p, x: branches(p, x), [IMAGES], [(1, 9, 9, 3)], r"4 arguments.*\(p, x\).*whole num"),
      (lambda p, x, y: x, [IMAGES], (), r"1 argument, .*\(p, x, y\).*'y'.*functools.partial"),
      (lambda p, x: "text", [IMAGES], (), r"must return arrays.*'text', of type str"),
      (
        lambda p, x: p["lost"],
        [IMAGES],
        (),
        r"KeyError: 'lost'.*parameters norm.*float32\[2",
      ),
      (lambda p, x: x @ x, [IMAGES], (), r"raised TypeError: dot_general"),
    ],
  )
  def test_functions_that_cannot_be_called(self, function, args, also, said):
    with pytest.raises(InputError, match=said) as raised:
      repjax.fuse(function, drawn(), *args, also=also)
    assert_one_paragraph(raised.value)

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
    with pytest.raises(
      InputError, match=r"different names.*lacks point, .*in addition bias$|bias\."
    ) as no:
      fused.fold({"wide": drawn()["wide"], "bias": drawn()["wide"]})
    assert_one_paragraph(no.value)
    with pytest.raises(InputError, match=r"wide with shape \(5, 5, 3, 4\)"):
      fused.fold(drawn(wide=(5, 5, 3, 4), point=(1, 1, 3, 4), norm=(4,)))
    with pytest.raises(InputError, match="a tree of arrays, but wide is '3x3'"):
      fused.fold(drawn() | {"wide": "3x3"})

  def test_keys_and_empty_places_among_the_parameters_are_no_mistake(self):
    params, x = {"net": drawn(), "key": jax.random.key(0), "none": None}, random(2, 8, 9, 3)
    error, fused = fused_error(lambda params, x: branches(params["net"], x), params, x)
    assert error <= 1e-5
    assert fused.report.after.products == 1

  def test_folded_parameters_of_a_different_function(self):
    fused = repjax.fuse(branches, drawn(), IMAGES)
    with pytest.raises(InputError, match=r"KeyError.*wide float32.*What `fold` returned"):
      repjax.fuse(branches, fused.fold(drawn()), IMAGES)
    with pytest.raises(InputError, match=r"not from its own fold.*: wide"):
      fused(drawn(dense=(3, 4)), random(2, 8, 9, 3))
    with pytest.raises(InputError, match=r"not from its own fold"):
      fused({"wide": "3x3", "bias": None}, random(2, 8, 9, 3))
