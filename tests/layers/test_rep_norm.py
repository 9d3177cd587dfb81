"""RepNorm: a batch norm, and the scale and bias that it becomes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repjax.errors import InputError
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
  batch = {"mean": x.mean((0, 1, 2)), "var": x.var((0, 1, 2), ddof=1)}
  expected = (x - batch["mean"]) / np.sqrt(x.var((0, 1, 2)) + 1e-5) * bn["scale"] + bn["bias"]
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


class TestRunningVariance:
  """The running variance averages v n / (n - 1) of n values, as in PyTorch."""

  @pytest.mark.usefixtures("x64")
  def test_shared_statistics_count_the_values_of_all_devices(self):
    x, layer = random_input(4, 2, 2, 3, seed=5), RepNorm(axis_name="devices", **F64)
    variables = random_variables(layer, x)

    def step(x):
      return layer.apply(variables, x, train=True, mutable=["batch_stats"])[1]

    updates = jax.vmap(step, axis_name="devices")(jnp.asarray(x).reshape(4, 1, 2, 2, 3))
    old = np.asarray(variables["batch_stats"]["bn"]["var"])
    for found in updates["batch_stats"]["bn"]["var"]:
      assert relative_error(found, 0.9 * old + 0.1 * x.var((0, 1, 2), ddof=1)) <= 1e-12

  @pytest.mark.filterwarnings("ignore:the batch norm bn trains on one value")
  @pytest.mark.parametrize(("kind", "var"), [("unbiased", 2.0), ("biased", 1.8)])
  def test_one_value_has_no_unbiased_variance(self, kind, var):
    x, layer = jnp.full((1, 3), 5.0), RepNorm(running_variance=kind)
    variables = layer.init(jax.random.key(0), x)
    variables = {**variables, "batch_stats": {"bn": {"mean": jnp.ones(3), "var": jnp.full(3, 2.0)}}}
    y, updates = layer.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(y, 0, atol=1e-6)
    found = updates["batch_stats"]["bn"]
    np.testing.assert_allclose(found["mean"], 1.4, rtol=1e-6)
    np.testing.assert_allclose(found["var"], var, rtol=1e-6)

  def test_training_on_one_value_warns(self):
    x, layer = jnp.ones((1, 3)), RepNorm()
    variables = layer.init(jax.random.key(0), x, train=True)  # says nothing
    with pytest.warns(UserWarning, match="one value of each channel"):
      jax.eval_shape(lambda v: layer.apply(v, x, True, mutable=["batch_stats"]), variables)

  def test_unknown_kinds_are_refused(self):
    with pytest.raises(InputError, match=r"running_variance.*'sample'.*biased, unbiased"):
      RepNorm(running_variance="sample")
