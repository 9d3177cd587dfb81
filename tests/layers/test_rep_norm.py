"""RepNorm: a batch norm, and the scale and bias that it becomes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repjax.layers import RepNorm, fold_rep_norm
from tests import helpers
from tests.helpers import F64, random_input, random_variables, relative_error


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(2, 5, 4, 6), (7, 6)], ids=str)
@pytest.mark.parametrize("epsilon", [1e-5, 1e-2])
def test_both_forms_normalise_with_the_running_statistics(shape, epsilon):
  x, layer = random_input(*shape), RepNorm(epsilon=epsilon, **F64)
  variables = random_variables(layer, x)
  folded = fold_rep_norm(variables["params"], variables["batch_stats"], epsilon)
  deploy = layer.clone(deploy=True)
  assert helpers.shapes(folded) == helpers.shapes(helpers.init_shapes(deploy, x)["params"])

  bn, stats = (jax.tree.map(np.asarray, variables[key]["bn"]) for key in ("params", "batch_stats"))
  expected = (x - stats["mean"]) / np.sqrt(stats["var"] + epsilon) * bn["scale"] + bn["bias"]
  assert relative_error(layer.apply(variables, x), expected) <= 1e-12
  assert relative_error(deploy.apply({"params": folded}, x), expected) <= 1e-12


@pytest.mark.usefixtures("x64")
def test_training_normalises_with_the_batch_and_moves_the_statistics_a_tenth():
  x, layer = 3 + 2 * random_input(4, 5, 4, 6), RepNorm(**F64)
  variables = random_variables(layer, x)
  y, updates = layer.apply(variables, x, train=True, mutable=["batch_stats"])
  bn, old = (jax.tree.map(np.asarray, variables[key]["bn"]) for key in ("params", "batch_stats"))
  batch = {"mean": x.mean((0, 1, 2)), "var": x.var((0, 1, 2))}
  expected = (x - batch["mean"]) / np.sqrt(batch["var"] + 1e-5) * bn["scale"] + bn["bias"]
  assert relative_error(y, expected) <= 1e-12
  for name, value in batch.items():
    moved = 0.9 * old[name] + 0.1 * value
    assert relative_error(updates["batch_stats"]["bn"][name], moved) <= 1e-12


@pytest.mark.parametrize("deploy", [False, True])
def test_bfloat16_computation_keeps_parameters_and_statistics_in_float32(deploy):
  x, layer = jnp.ones((2, 4, 4, 4), jnp.bfloat16), RepNorm(deploy=deploy, dtype=jnp.bfloat16)
  variables = helpers.init_shapes(layer, x)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
  assert jax.eval_shape(layer.apply, variables, x).dtype == jnp.bfloat16


def test_bfloat16_parameters_fold_to_bfloat16():
  variables = helpers.init_shapes(RepNorm(param_dtype=jnp.bfloat16), jnp.ones((1, 4)))
  folded = jax.eval_shape(lambda v: fold_rep_norm(v["params"], v["batch_stats"], 1e-5), variables)
  assert {leaf.dtype for leaf in jax.tree.leaves(folded)} == {jnp.dtype(jnp.bfloat16)}


def test_deploy_form_cannot_train():
  layer, x = RepNorm(deploy=True), jnp.ones((1, 4))
  with pytest.raises(ValueError, match="the deploy form cannot train"):
    jax.eval_shape(lambda v: layer.apply(v, x, train=True), helpers.init_shapes(layer, x))


@pytest.mark.parametrize("missing", ["params", "batch_stats"])
def test_a_fold_without_its_norm_is_refused(missing):
  variables = dict(random_variables(RepNorm(), jnp.ones((1, 4))))
  variables[missing] = {}
  with pytest.raises(ValueError, match="a batch norm needs scale, bias, mean and var"):
    fold_rep_norm(variables["params"], variables["batch_stats"], 1e-5)


def test_fresh_forms_do_next_to_nothing():
  x = random_input(5, 4).astype("float32")
  norm, affine = RepNorm(), RepNorm(deploy=True)
  np.testing.assert_allclose(norm.apply(norm.init(jax.random.key(0), x), x), x, rtol=1e-5)
  np.testing.assert_array_equal(affine.apply(affine.init(jax.random.key(0), x), x), x)
