"""RepHead is its equation, and its norm folds into its fully connected layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repjax
from repjax.layers import RepHead, fold_rep_head
from tests import helpers
from tests.helpers import F64, random_input, random_variables, relative_error

EPSILON = 1e-5
MAPS = jnp.ones((2, 3, 2, 4))


def fold(variables):
  return fold_rep_head(variables["params"], variables["batch_stats"], EPSILON)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("size", [(3, 5), (1, 1), (4, 2)], ids=str)
def test_both_forms_are_the_equation(size):
  x = random_input(3, *size, 6)
  layer, deploy = (RepHead(7, deploy=form, **F64) for form in (False, True))
  variables = random_variables(layer, x)

  @helpers.quick_jit
  def outputs(variables):
    folded = fold(variables)
    return layer.apply(variables, x), deploy.apply({"params": folded}, x), folded

  trained, deployed, folded = outputs(variables)
  assert helpers.shapes(folded) == helpers.shapes(helpers.init_shapes(deploy, x)["params"])
  params, stats = (jax.tree.map(np.asarray, variables[k]) for k in ("params", "batch_stats"))
  bn, held, dense = params["bn"], stats["bn"], params["dense"]
  normed = (x - held["mean"]) / np.sqrt(held["var"] + EPSILON) * bn["scale"] + bn["bias"]
  expected = normed.mean((1, 2)) @ dense["kernel"] + dense["bias"]
  assert relative_error(trained, expected) <= 1e-12
  assert relative_error(deployed, trained) <= 1e-12


@pytest.mark.usefixtures("x64")
def test_in_training_the_norm_sees_every_pixel():
  # The variance of the means would be smaller, and is not what the authors' norm keeps.
  x, layer = random_input(4, 3, 5, 6), RepHead(7, **F64)
  variables = random_variables(layer, x)
  train = helpers.quick_jit(lambda v: layer.apply(v, x, train=True, mutable=["batch_stats"])[1])
  old, new = variables["batch_stats"]["bn"], train(variables)["batch_stats"]["bn"]
  for name, expected in (("mean", x.mean((0, 1, 2))), ("var", x.var((0, 1, 2), ddof=1))):
    assert relative_error(new[name], 0.9 * old[name] + 0.1 * expected) <= 1e-12


def test_dropout_drops_channels_in_training_only():
  x, layer = random_input(2, 3, 2, 16).astype("float32"), RepHead(5, dropout=0.5)
  variables = random_variables(layer, x)

  @helpers.quick_jit
  def outputs(key):
    def run(layer):
      return layer.apply(variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": key})

    return (
      run(layer)[0],
      run(RepHead(5))[0],
      layer.apply(variables, x),
      RepHead(5).apply(variables, x),
    )

  dropped, whole, evaluated, plainly = outputs(jax.random.key(0))
  assert relative_error(dropped, whole) > 0.01
  assert relative_error(outputs(jax.random.key(1))[0], dropped) > 0.01
  np.testing.assert_array_equal(evaluated, plainly)


@pytest.mark.parametrize("deploy", [False, True])
def test_bfloat16_computation_keeps_float32_variables(deploy):
  layer = RepHead(5, dtype=jnp.bfloat16, deploy=deploy)
  variables = helpers.init_shapes(layer, MAPS)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
  assert jax.eval_shape(layer.apply, variables, MAPS).dtype == jnp.bfloat16


def test_bfloat16_parameters_fold_to_bfloat16():
  layer = RepHead(5, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
  folded = jax.eval_shape(fold, helpers.init_shapes(layer, MAPS))
  assert {leaf.dtype for leaf in jax.tree.leaves(folded)} == {jnp.dtype(jnp.bfloat16)}


class TestRefusals:
  def test_the_deploy_form_cannot_train(self):
    layer = RepHead(5, deploy=True)
    variables = helpers.init_shapes(layer, MAPS)
    with pytest.raises(ValueError, match="the deploy form cannot train"):
      jax.eval_shape(functools.partial(layer.apply, train=True), variables, MAPS)

  @pytest.mark.parametrize(("half", "part"), [("params", "dense"), ("batch_stats", "bn")])
  def test_trees_that_do_not_belong_together(self, half, part):
    variables = helpers.init_shapes(RepHead(5), MAPS)
    cut = {name: value for name, value in variables[half].items() if name != part}
    with pytest.raises(ValueError, match="a RepHead holds bn and dense"):
      fold({**variables, half: cut})


def test_the_walk_finds_the_layer_and_knows_its_deploy_form():
  variables = random_variables(RepHead(5), MAPS)
  trained, stats = ({"head": {"RepHead_0": variables[k]}} for k in ("params", "batch_stats"))
  walk = helpers.quick_jit(repjax.reparameterize)
  folded, expected = walk(trained, stats), helpers.quick_jit(fold)(variables)
  jax.tree.map(np.testing.assert_array_equal, folded["head"]["RepHead_0"], expected)
  jax.tree.map(np.testing.assert_array_equal, walk(folded, {}), folded)
  with pytest.raises(ValueError, match="head/RepHead_0 is in training form"):
    repjax.reparameterize(trained, {})
