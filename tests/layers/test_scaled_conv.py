"""ScaledConv: both forms compute the norm of the scaled branches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repjax.errors import InputError
from repjax.layers import ScaledConv, fold_scaled_conv
from tests import helpers
from tests.helpers import F64, convolve, random_input, random_variables, relative_error

EPSILON = 1e-3  # not the default, so that a forgotten epsilon shows


def both_forms(x, **attributes):
  """Returns the outputs of both forms and the variables of the training form."""
  layer = ScaledConv(epsilon=EPSILON, **attributes, **F64)
  deploy, variables = layer.clone(deploy=True), random_variables(layer, x)

  def outputs(variables):
    folded = fold_scaled_conv(variables["params"], variables["batch_stats"], EPSILON)
    return layer.apply(variables, x), deploy.apply({"params": folded}, x), folded

  trained, deployed, folded = helpers.quick_jit(outputs)(variables)
  assert helpers.shapes(folded) == helpers.shapes(helpers.init_shapes(deploy, x)["params"])
  return trained, deployed, variables


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  ("inputs", "attributes"),
  [
    (4, {"features": 4}),
    (4, {"features": 4, "identity": False}),
    (6, {"features": 6, "groups": 3}),
    (4, {"features": 6, "identity": False, "strides": 2, "groups": 2}),
    (4, {"features": 4, "dilation": 2}),
    (1, {"features": 1}),
  ],
  ids=str,
)
def test_both_forms_are_the_norm_of_the_scaled_branches(inputs, attributes):
  x = random_input(2, 7, 6, inputs)
  trained, deployed, variables = both_forms(x, **attributes)
  params, stats = jax.tree.map(np.asarray, helpers.halves(variables))
  strides, dilation = (attributes.get(name, 1) for name in ("strides", "dilation"))
  shared = {"strides": (strides, strides), "groups": attributes.get("groups", 1)}
  padding, spread = (dilation, dilation), (dilation, dilation)
  k3, k1 = (params[name]["conv"]["kernel"] for name in ("conv3x3", "conv1x1"))
  y = params["conv3x3"]["scale"] * convolve(x, k3, padding=padding, dilation=spread, **shared)
  y = y + params["conv1x1"]["scale"] * convolve(x, k1, **shared)
  if attributes.get("identity", True):
    y = y + params["identity"]["scale"] * x
  bn, running = params["bn"], stats["bn"]
  y = (y - running["mean"]) / np.sqrt(running["var"] + EPSILON) * bn["scale"] + bn["bias"]
  assert relative_error(trained, y) <= 1e-12
  assert relative_error(deployed, y) <= 1e-12


def test_scales_begin_at_the_value_that_is_asked_for_and_that_of_the_identity_at_one():
  x = random_input(1, 4, 4, 2).astype("float32")
  params = ScaledConv(2, first_scale=0.5).init(jax.random.key(0), x)["params"]
  begin = {name: params[name]["scale"].tolist() for name in ("conv3x3", "conv1x1", "identity")}
  assert begin == {"conv3x3": [0.5] * 2, "conv1x1": [0.5] * 2, "identity": [1.0] * 2}


def test_bfloat16_computation_keeps_parameters_in_float32():
  x, layer = jnp.ones((2, 4, 4, 4), jnp.bfloat16), ScaledConv(4, dtype=jnp.bfloat16)
  variables = helpers.init_shapes(layer, x)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
  assert jax.eval_shape(layer.apply, variables, x).dtype == jnp.bfloat16


@pytest.mark.parametrize("attributes", [{"features": 4, "strides": 2}, {"features": 6}], ids=str)
def test_an_identity_that_does_not_fit_is_refused(attributes):
  with pytest.raises(InputError, match=r"identity branch needs stride 1 .*identity=False"):
    helpers.init_shapes(ScaledConv(**attributes), jnp.ones((1, 4, 4, 4)))


def test_deploy_form_cannot_train():
  layer, x = ScaledConv(4, deploy=True), jnp.ones((1, 4, 4, 4))
  with pytest.raises(ValueError, match="the deploy form cannot train"):
    jax.eval_shape(lambda v: layer.apply(v, x, train=True), helpers.init_shapes(layer, x))


@pytest.mark.parametrize("missing", ["conv1x1", "bn"])
def test_a_fold_without_a_part_names_it(missing):
  variables = random_variables(ScaledConv(4), jnp.ones((1, 4, 4, 4)))
  params = {name: value for name, value in variables["params"].items() if name != missing}
  with pytest.raises(ValueError, match=f"missing: {missing}; unexpected: none"):
    fold_scaled_conv(params, variables["batch_stats"], EPSILON)


def test_a_fold_with_a_branch_of_an_unknown_kind_names_it():
  variables = random_variables(ScaledConv(4), jnp.ones((1, 4, 4, 4)))
  params = {**variables["params"], "conv5x5": variables["params"]["conv3x3"]}
  with pytest.raises(ValueError, match="missing: none; unexpected: conv5x5"):
    fold_scaled_conv(params, variables["batch_stats"], EPSILON)
