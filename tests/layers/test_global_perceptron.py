"""The Global Perceptron adds what its equation says, and its norm folds into its first layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repjax
from repjax.layers import GlobalPerceptron, fold_global_perceptron
from tests import helpers
from tests.helpers import F64, random_input, random_variables, relative_error

EPSILON = 1e-5


def fold(variables):
  return fold_global_perceptron(variables["params"], variables["batch_stats"], EPSILON)


def by_definition(variables, x, tile):
  """The training form in NumPy, one tile after the other."""
  params, stats = (jax.tree.map(np.asarray, variables[key]) for key in ("params", "batch_stats"))
  windows = [
    (slice(None), slice(top, top + tile[0]), slice(left, left + tile[1]))
    for top in range(0, x.shape[1], tile[0])
    for left in range(0, x.shape[2], tile[1])
  ]
  means = np.stack([x[window].mean((1, 2)) for window in windows], 2)  # (N, C, tiles)
  bn, held = ({k: v[:, None] for k, v in tree["bn"].items()} for tree in (params, stats))
  means = (means - held["mean"]) / np.sqrt(held["var"] + EPSILON) * bn["scale"] + bn["bias"]
  fc1, fc2 = params["dense"]["fc1"], params["dense"]["fc2"]
  hidden = np.maximum(means.reshape(len(x), -1) @ fc1["kernel"] + fc1["bias"], 0)
  added = (hidden @ fc2["kernel"] + fc2["bias"]).reshape(means.shape)
  y = x.copy()
  for index, window in enumerate(windows):
    y[window] += added[:, None, None, :, index]
  return y


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  ("size", "tile", "reduction"),
  [((8, 6), (4, 2), 1), ((4, 9), (2, 3), 4), ((3, 5), (3, 5), 2)],
  ids=str,
)
def test_both_forms_are_the_equation(size, tile, reduction):
  x = random_input(2, *size, 5)
  layer, deploy = (GlobalPerceptron(tile, reduction, deploy=form, **F64) for form in (False, True))
  variables = random_variables(layer, x)

  @helpers.quick_jit
  def outputs(variables):
    folded = fold(variables)
    return layer.apply(variables, x), deploy.apply({"params": folded}, x), folded

  trained, deployed, folded = outputs(variables)
  assert helpers.shapes(folded) == helpers.shapes(helpers.init_shapes(deploy, x)["params"])
  tiles = size[0] * size[1] // (tile[0] * tile[1])
  hidden = tiles * 5 // reduction
  assert folded["dense"]["fc1"]["kernel"].shape == (tiles * 5, hidden)
  assert relative_error(trained, by_definition(variables, x, tile)) <= 1e-12
  assert relative_error(deployed, trained) <= 1e-12
  assert relative_error(trained, x) > 0.01


@pytest.mark.parametrize("deploy", [False, True])
def test_bfloat16_computation_keeps_float32_variables(deploy):
  x, layer = jnp.ones((2, 4, 4, 4)), GlobalPerceptron(2, dtype=jnp.bfloat16, deploy=deploy)
  variables = helpers.init_shapes(layer, x)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
  assert jax.eval_shape(layer.apply, variables, x).dtype == jnp.bfloat16


def test_bfloat16_parameters_fold_to_bfloat16():
  layer = GlobalPerceptron(2, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
  variables = helpers.init_shapes(layer, jnp.ones((1, 4, 4, 4)))
  folded = jax.eval_shape(fold, variables)
  assert {leaf.dtype for leaf in jax.tree.leaves(folded)} == {jnp.dtype(jnp.bfloat16)}


class TestRefusals:
  @pytest.mark.parametrize("size", [(7, 6), (8, 5)], ids=str)
  def test_maps_that_do_not_divide_into_tiles(self, size):
    with pytest.raises(ValueError, match="do not divide into tiles of 2x2"):
      helpers.init_shapes(GlobalPerceptron(2), jnp.ones((1, *size, 4)))

  @pytest.mark.parametrize("reduction", [0, 17])
  def test_a_reduction_that_leaves_no_hidden_unit(self, reduction):
    with pytest.raises(ValueError, match=rf"16 inputs .* reduced {reduction} times"):
      helpers.init_shapes(GlobalPerceptron(2, reduction), jnp.ones((1, 4, 4, 4)))

  def test_maps_of_another_size_than_the_parameters_were_made_for(self):
    layer = GlobalPerceptron(2)
    variables = helpers.init_shapes(layer, jnp.ones((1, 4, 4, 4)))
    with pytest.raises(ValueError, match=r"\(1, 8, 4, 4\) give 32 inputs .* made for 16"):
      jax.eval_shape(layer.apply, variables, jnp.ones((1, 8, 4, 4)))

  def test_the_deploy_form_cannot_train(self):
    layer, x = GlobalPerceptron(2, deploy=True), jnp.ones((1, 4, 4, 4))
    with pytest.raises(ValueError, match="the deploy form cannot train"):
      jax.eval_shape(functools.partial(layer.apply, train=True), helpers.init_shapes(layer, x), x)

  def test_trees_that_do_not_belong_together(self):
    variables = helpers.init_shapes(GlobalPerceptron(2), jnp.ones((1, 4, 4, 4)))
    with pytest.raises(ValueError, match="a GlobalPerceptron holds bn and dense"):
      fold({**variables, "batch_stats": {}})


def test_the_walk_finds_the_layer_and_knows_its_deploy_form():
  variables = random_variables(GlobalPerceptron(2), jnp.ones((1, 4, 4, 4)))
  trained, stats = ({"GlobalPerceptron_0": variables[k]} for k in ("params", "batch_stats"))
  walk = helpers.quick_jit(repjax.reparameterize)
  folded, expected = walk(trained, stats), helpers.quick_jit(fold)(variables)
  jax.tree.map(np.testing.assert_array_equal, folded["GlobalPerceptron_0"], expected)
  jax.tree.map(np.testing.assert_array_equal, walk(folded, {}), folded)
  with pytest.raises(ValueError, match="GlobalPerceptron_0 is in training form"):
    repjax.reparameterize(trained, {})
