"""RepFFN is its equation, and its three norms fold into its two layers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repjax
from repjax.layers import RepFFN, fold_rep_ffn
from tests import helpers
from tests.helpers import F64, random_input, random_variables, relative_error

EPSILON = 1e-5
IMAGES = jnp.ones((1, 2, 3, 4))
ACTIVATIONS = {
  "relu": lambda x: np.maximum(x, 0),
  "silu": lambda x: x / (1 + np.exp(-x)),
  "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
}


def fold(variables):
  return fold_rep_ffn(variables["params"], variables["batch_stats"], EPSILON)


def normalise(x, params, stats):
  bn, held = (jax.tree.map(np.asarray, tree["bn"]) for tree in (params, stats))
  return (x - held["mean"]) / np.sqrt(held["var"] + EPSILON) * bn["scale"] + bn["bias"]


def by_definition(variables, x, act):
  """The training form in NumPy."""
  params, stats = variables["params"], variables["batch_stats"]
  y = normalise(x, params, stats)
  for name in ("expand", "project"):
    held, own_stats = params[name]["conv1x1"], stats[name]["conv1x1"]
    y = normalise(y @ np.asarray(held["conv"]["kernel"])[0, 0], held, own_stats)
    y = ACTIVATIONS[act](y) if name == "expand" else y
  return y


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  ("size", "features", "expansion", "act"),
  [((3, 5), 6, 4, "gelu"), ((1, 1), 3, 2, "silu"), ((4, 1), 5, 1, "relu")],
  ids=str,
)
def test_both_forms_are_the_equation(size, features, expansion, act):
  x = random_input(2, *size, features)
  layer, deploy = (RepFFN(expansion, act, deploy=form, **F64) for form in (False, True))
  variables = random_variables(layer, x)

  @helpers.quick_jit
  def outputs(variables):
    folded = fold(variables)
    return layer.apply(variables, x), deploy.apply({"params": folded}, x), folded

  trained, deployed, folded = outputs(variables)
  assert helpers.shapes(folded) == helpers.shapes(helpers.init_shapes(deploy, x)["params"])
  assert folded["dense"]["expand"]["kernel"].shape == (features, features * expansion)
  assert relative_error(trained, by_definition(variables, x, act)) <= 1e-12
  assert relative_error(deployed, trained) <= 1e-12


@pytest.mark.usefixtures("x64")
def test_every_part_counts():
  # Otherwise an error in one output could be hidden by a different one.
  x, layer = random_input(2, 3, 2, 4), RepFFN(2, **F64)
  variables = random_variables(layer, x)
  apply = helpers.quick_jit(layer.apply)
  whole, (flat, tree) = apply(variables, x), jax.tree.flatten(variables)
  for index, path in enumerate(helpers.leaves(variables)):
    changed = jax.tree.unflatten(tree, [*flat[:index], 1.5 * flat[index], *flat[index + 1 :]])
    assert relative_error(apply(changed, x), whole) > 1e-3, path


def test_training_updates_the_statistics_of_all_three_norms():
  layer, x = RepFFN(2), random_input(2, 3, 2, 4).astype("float32")
  variables = random_variables(layer, x)
  train = helpers.quick_jit(lambda v: layer.apply(v, x, train=True, mutable=["batch_stats"])[1])
  old, new = (helpers.leaves(tree["batch_stats"]) for tree in (variables, train(variables)))
  assert len(old) == 6
  assert all(np.abs(new[path] - old[path]).max() > 0 for path in old)


@pytest.mark.parametrize("deploy", [False, True])
def test_bfloat16_computation_keeps_float32_variables(deploy):
  layer = RepFFN(dtype=jnp.bfloat16, deploy=deploy)
  variables = helpers.init_shapes(layer, IMAGES)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
  assert jax.eval_shape(layer.apply, variables, IMAGES).dtype == jnp.bfloat16


def test_bfloat16_parameters_fold_to_bfloat16():
  layer = RepFFN(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
  folded = jax.eval_shape(fold, helpers.init_shapes(layer, IMAGES))
  assert {leaf.dtype for leaf in jax.tree.leaves(folded)} == {jnp.dtype(jnp.bfloat16)}


class TestRefusals:
  def test_the_deploy_form_cannot_train(self):
    layer = RepFFN(deploy=True)
    variables = helpers.init_shapes(layer, IMAGES)
    with pytest.raises(ValueError, match="the deploy form cannot train"):
      jax.eval_shape(functools.partial(layer.apply, train=True), variables, IMAGES)

  @pytest.mark.parametrize("half", ["params", "batch_stats"])
  @pytest.mark.parametrize("part", ["bn", "expand", "project"])
  def test_trees_that_do_not_belong_together(self, half, part):
    variables = helpers.init_shapes(RepFFN(), IMAGES)
    cut = {name: value for name, value in variables[half].items() if name != part}
    with pytest.raises(ValueError, match="a RepFFN holds bn, expand, project"):
      fold({**variables, half: cut})

  def test_a_kernel_that_is_not_1x1(self):
    variables = random_variables(RepFFN(), IMAGES)
    params = variables["params"]
    larger = jax.tree.map(lambda leaf: leaf, params["expand"]["conv1x1"])
    larger["conv"] = {"kernel": jnp.ones((3, 3, 4, 16))}
    stats = {**variables["batch_stats"]}
    stats["expand"] = {"conv3x3": stats["expand"]["conv1x1"]}
    with pytest.raises(ValueError, match=r"expand of a RepFFN is 1x1, got .* \(3, 3, 4, 16\)"):
      fold_rep_ffn({**params, "expand": {"conv3x3": larger}}, stats, EPSILON)


def test_the_walk_finds_the_layer_and_knows_its_deploy_form():
  variables = random_variables(RepFFN(), IMAGES)
  trained, stats = ({"RepFFN_0": variables[k]} for k in ("params", "batch_stats"))
  walk = helpers.quick_jit(repjax.reparameterize)
  folded, expected = walk(trained, stats), helpers.quick_jit(fold)(variables)
  jax.tree.map(np.testing.assert_array_equal, folded["RepFFN_0"], expected)
  jax.tree.map(np.testing.assert_array_equal, walk(folded, {}), folded)
  with pytest.raises(ValueError, match="RepFFN_0 is in training form"):
    repjax.reparameterize(trained, {})
