"""Gates compute what their equations say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repjax
from repjax.errors import InputError
from repjax.layers import GlobalGate, SkipSqueezeExcite, SqueezeExcite, fold_skip_squeeze_excite
from tests import helpers
from tests.helpers import F64, quick_jit, random_input, random_variables, relative_error

EPSILON = 1e-5
MAPS = jnp.ones((1, 2, 3, 8))


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("size", [(3, 5), (1, 6), (4, 4)], ids=str)
def test_squeeze_excite_is_its_equation_on_oblong_maps_too(size):
  x, layer = random_input(2, *size, 16), SqueezeExcite(4, **F64)
  variables = random_variables(layer, x)
  down, up = (jax.tree.map(np.asarray, variables["params"][name]) for name in ("down", "up"))
  assert down["kernel"].shape == (16, 4)
  hidden = np.maximum(x.mean((1, 2)) @ down["kernel"] + down["bias"], 0)
  gate = sigmoid(hidden @ up["kernel"] + up["bias"])
  assert relative_error(layer.apply(variables, x), x * gate[:, None, None, :]) <= 1e-12


@pytest.mark.usefixtures("x64")
def test_squeeze_excite_may_look_at_another_map_than_it_scales():
  # The Global Perceptron of RepMLPNet.
  x, z, layer = random_input(2, 3, 5, 8), random_input(2, 4, 6, 8, seed=2), SqueezeExcite(4, **F64)
  variables = random_variables(layer, x)
  scaled, gated = layer.apply(variables, x, z), layer.apply(variables, z)
  gate = np.asarray(gated / z)[:, 0, 0]  # (N, C)
  assert relative_error(scaled, x * gate[:, None, None, :]) <= 1e-12


@pytest.mark.parametrize(
  ("features", "reduction", "hidden"), [(16, 16, 1), (20, 16, 1), (40, 16, 2)]
)
def test_hidden_channels_are_rounded_down(features, reduction, hidden):
  variables = helpers.init_shapes(SqueezeExcite(reduction), jnp.ones((1, 2, 2, features)))
  assert variables["params"]["down"]["kernel"].shape == (features, hidden)


def test_no_hidden_channel_is_refused():
  with pytest.raises(ValueError, match="8 channels reduced 16 times"):
    helpers.init_shapes(SqueezeExcite(16), jnp.ones((1, 2, 2, 8)))
  with pytest.raises(InputError, match=r"no hidden channel.*hidden=0"):
    helpers.init_shapes(SqueezeExcite(hidden=0), jnp.ones((1, 2, 2, 8)))


@pytest.mark.parametrize("layer", [SqueezeExcite(4), GlobalGate(6), SkipSqueezeExcite()], ids=repr)
def test_bfloat16_computation_keeps_float32_variables(layer):
  x, layer = MAPS.astype(jnp.bfloat16), layer.clone(dtype=jnp.bfloat16)
  variables = helpers.init_shapes(layer, x)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
  assert jax.eval_shape(layer.apply, variables, x).dtype == jnp.bfloat16


class TestGlobalGate:
  @pytest.mark.usefixtures("x64")
  @pytest.mark.parametrize("groups", [1, 2, 4])
  def test_it_is_its_equation(self, groups):
    x, layer = random_input(2, 3, 5, 8), GlobalGate(12, groups, **F64)
    variables = random_variables(layer, x)
    kernel = np.asarray(variables["params"]["kernel"])
    assert kernel.shape == (8 // groups, 12)
    products = helpers.convolve(x.mean((1, 2), keepdims=True), kernel[None, None], groups=groups)
    assert relative_error(quick_jit(layer.apply)(variables, x), 2 * sigmoid(products)) <= 1e-12

  def test_without_an_opinion_it_changes_nothing(self):
    factors = GlobalGate(6).apply({"params": {"kernel": jnp.zeros((8, 6))}}, MAPS)
    np.testing.assert_array_equal(factors, np.ones((1, 1, 1, 6)))

  @pytest.mark.parametrize(("features", "groups"), [(6, 4), (9, 3)])
  def test_channels_that_do_not_divide_into_groups_are_refused(self, features, groups):
    with pytest.raises(ValueError, match=f"8 input and {features} .* into {groups} groups"):
      helpers.init_shapes(GlobalGate(features, groups), MAPS)

  def test_fresh_kernels_are_uniform_within_one_over_the_root_of_a_groups_inputs(self):
    layer = GlobalGate(400, groups=2)
    kernel = quick_jit(layer.init)(jax.random.key(0), jnp.ones((1, 1, 1, 128)))["params"]["kernel"]
    assert 0.99 / 8 < np.abs(kernel).max() <= 1 / 8


def fold(variables):
  return fold_skip_squeeze_excite(variables["params"], variables["batch_stats"], EPSILON)


class TestSkipSqueezeExcite:
  @pytest.mark.usefixtures("x64")
  @pytest.mark.parametrize("size", [(3, 5), (1, 1), (4, 2)], ids=str)
  def test_both_forms_are_the_equation(self, size):
    x, train = random_input(2, *size, 6), SkipSqueezeExcite(**F64)
    deploy, variables = train.clone(deploy=True), random_variables(train, x)

    @quick_jit
    def outputs(variables):
      folded = fold(variables)
      return train.apply(variables, x), deploy.apply({"params": folded}, x), folded

    trained, deployed, folded = outputs(variables)
    assert helpers.shapes(folded) == helpers.shapes(helpers.init_shapes(deploy, x)["params"])
    params, stats = jax.tree.map(np.asarray, helpers.halves(variables))
    bn, stats = params["bn"], stats["bn"]
    z = (x - stats["mean"]) / np.sqrt(stats["var"] + EPSILON) * bn["scale"] + bn["bias"]
    gate = sigmoid(z.mean((1, 2), keepdims=True) @ params["dense"]["kernel"])
    assert relative_error(trained, z * gate) <= 1e-12
    assert relative_error(deployed, z * gate) <= 1e-12

  def test_in_bfloat16_the_shift_in_the_gates_bias_does_not_cancel(self):
    far = 64.0  # of the input's mean from 0, in standard deviations
    x = (far + random_input(2, 8, 8, 32)).astype("float32")
    variables = random_variables(SkipSqueezeExcite(), x)
    variables["batch_stats"]["bn"]["mean"] += far
    narrow = SkipSqueezeExcite(dtype=jnp.bfloat16)
    expected = quick_jit(SkipSqueezeExcite().apply)(variables, x)
    trained = quick_jit(narrow.apply)(variables, x)
    deployed = quick_jit(narrow.clone(deploy=True).apply)({"params": fold(variables)}, x)
    assert relative_error(trained.astype("float32"), expected) <= 0.02
    assert relative_error(deployed.astype("float32"), expected) <= 0.02

  @pytest.mark.usefixtures("x64")
  def test_the_fold_has_the_gradients_of_the_training_form(self):
    x, train = random_input(2, 3, 2, 4), SkipSqueezeExcite(**F64)
    variables, weights = random_variables(train, x), random_input(2, 3, 2, 4, seed=3)

    def loss(params, deploy):
      held = {**variables, "params": params}
      held = {"params": fold(held)} if deploy else held
      return (train.clone(deploy=deploy).apply(held, x) * weights).sum()

    one, other = (
      helpers.leaves(quick_jit(jax.grad(functools.partial(loss, deploy=form)))(variables["params"]))
      for form in (False, True)
    )
    assert one.keys() == other.keys() == {"bn/scale", "bn/bias", "dense/kernel"}
    assert all(relative_error(other[path], one[path]) <= 1e-12 for path in one)

  def test_training_updates_the_statistics(self):
    layer, x = SkipSqueezeExcite(), random_input(2, 3, 2, 4).astype("float32")
    variables = random_variables(layer, x)
    train = quick_jit(lambda v: layer.apply(v, x, train=True, mutable=["batch_stats"])[1])
    old, new = (helpers.leaves(tree["batch_stats"]) for tree in (variables, train(variables)))
    assert old.keys() == new.keys() == {"bn/mean", "bn/var"}
    assert all(np.abs(new[path] - old[path]).max() > 0 for path in old)

  def test_bfloat16_parameters_fold_to_bfloat16(self):
    layer = SkipSqueezeExcite(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    folded = jax.eval_shape(fold, helpers.init_shapes(layer, MAPS))
    assert {leaf.dtype for leaf in jax.tree.leaves(folded)} == {jnp.dtype(jnp.bfloat16)}

  def test_the_deploy_form_cannot_train(self):
    layer = SkipSqueezeExcite(deploy=True)
    with pytest.raises(ValueError, match="the deploy form cannot train"):
      jax.eval_shape(
        functools.partial(layer.apply, train=True), helpers.init_shapes(layer, MAPS), MAPS
      )

  @pytest.mark.parametrize(
    ("half", "changed"),
    [("params", {"bn": {}}), ("params", {"dense": {}}), ("batch_stats", {"other": {}})],
  )
  def test_trees_that_do_not_belong_together_are_refused(self, half, changed):
    variables = helpers.init_shapes(SkipSqueezeExcite(), MAPS)
    with pytest.raises(ValueError, match="a SkipSqueezeExcite holds bn and dense"):
      fold({**variables, half: changed})

  def test_the_walk_finds_the_layer_and_knows_its_deploy_form(self):
    variables = random_variables(SkipSqueezeExcite(), MAPS)
    trained, stats = ({"SkipSqueezeExcite_0": half} for half in helpers.halves(variables))
    walk = quick_jit(repjax.reparameterize)
    folded, expected = walk(trained, stats), quick_jit(fold)(variables)
    jax.tree.map(np.testing.assert_array_equal, folded["SkipSqueezeExcite_0"], expected)
    jax.tree.map(np.testing.assert_array_equal, walk(folded, {}), folded)
    with pytest.raises(ValueError, match="SkipSqueezeExcite_0 is in training form"):
      repjax.reparameterize(trained, {})
