"""Laws that every family of networks obeys, in both forms, for every shared attribute."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repjax
from repjax.errors import InputError
from repjax.recognition import is_mark
from tests import helpers
from tests.helpers import (
  F64,
  assert_close,
  halves,
  init_shapes,
  quick_jit,
  random_input,
  random_variables,
)
from tests.models.families import EVERY, FAMILIES, THOROUGH, backbone, small

IMAGES = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)

KEY = jax.random.key(0)

every_family = pytest.mark.parametrize("name", EVERY)
both_forms = pytest.mark.parametrize("deploy", [False, True])


def train(model, variables, images, key=0):
  """Runs a forward pass in training: (outputs, updates). The key of dropout may be a seed."""
  rngs = {"dropout": jax.random.key(key) if isinstance(key, int) else key}
  return model.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)


def is_note(path):
  """Tells if a leaf of statistics is a note, which only names something."""
  return is_mark(path.rpartition("/")[2])


def without_head(whole, like):
  """Returns the scopes of a classifier's variables that a different tree has."""
  return {half: {scope: whole[half][scope] for scope in like[half]} for half in like}


@pytest.mark.usefixtures("x64")
@every_family
def test_features_have_their_names_and_shapes_also_from_a_classifiers_variables(name):
  classifier, stages = small(name, **F64), FAMILIES[name].stages
  model, deploy, x = backbone(name), backbone(name, deploy=True), jnp.ones((1, 64, 32, 3))
  variables, whole = init_shapes(model, x), init_shapes(classifier, x)
  assert helpers.shapes(without_head(whole, variables)) == helpers.shapes(variables)
  assert not {"head", "fc1", "fc2"} & variables["params"].keys()
  assert not any("AuxHead" in scope for scope in variables["params"])

  def convert(variables):
    return {"params": repjax.reparameterize(*halves(variables))}

  plain, with_head = (jax.eval_shape(convert, each) for each in (variables, whole))
  assert helpers.shapes(plain) == helpers.shapes(init_shapes(deploy, x))
  assert "head" in with_head["params"]  # nothing reads the head
  assert helpers.shapes(without_head(with_head, plain)) == helpers.shapes(plain)
  expected = {
    stage: (1, 64 // stride, 32 // stride, channels) for stage, (stride, channels) in stages.items()
  }
  for form, held in ((model, variables), (model, whole), (deploy, plain), (deploy, with_head)):
    features = jax.eval_shape(form.apply, held, x)
    assert {stage: feature.shape for stage, feature in features.items()} == expected


@every_family
def test_the_fold_has_the_tree_of_the_deploy_form_without_norms(name):
  variables, deploy = (init_shapes(small(name, deploy=form), IMAGES) for form in (False, True))
  folded = jax.eval_shape(repjax.reparameterize, *halves(variables))
  assert deploy.keys() == {"params"}
  assert helpers.shapes(folded) == helpers.shapes(deploy["params"])
  assert not any("bn" in path.split("/") for path in helpers.leaves(deploy))


@every_family
def test_the_deploy_form_refuses_to_train(name):
  model = small(name, deploy=True)
  with pytest.raises(ValueError, match="the deploy form cannot train"):
    jax.eval_shape(functools.partial(train, model), init_shapes(model, IMAGES), IMAGES)


@both_forms
@pytest.mark.parametrize("name", THOROUGH)
def test_bfloat16_computation_keeps_float32_variables(name, deploy):
  model = small(name, dtype=jnp.bfloat16, deploy=deploy)
  variables, half = init_shapes(model, IMAGES), jnp.dtype(jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
  for dtype in (jnp.float32, jnp.bfloat16):
    images = jax.ShapeDtypeStruct(IMAGES.shape, dtype)
    logits = jax.eval_shape(model.apply, variables, images)
    assert (logits.shape[0], logits.shape[-1], logits.dtype) == (4, 3, half)
  features = jax.eval_shape(model.clone(features_only=True).apply, variables, IMAGES)
  assert {leaf.dtype for leaf in features.values()} == {half}
  if not deploy:
    outputs, updates = jax.eval_shape(functools.partial(train, model), variables, IMAGES)
    assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {half}
    assert helpers.shapes(updates["batch_stats"]) == helpers.shapes(variables["batch_stats"])


@every_family
def test_dropout_draws_in_training_only(name):
  model = small(name, dropout=0.5)
  variables = init_shapes(model, IMAGES)
  drawn = helpers.primitives(functools.partial(train, model), variables, IMAGES)
  assert drawn.count("random_bits") == FAMILIES[name].dropouts
  assert "random_bits" not in helpers.primitives(model.apply, variables, IMAGES)
  without = functools.partial(train, small(name, dropout=0.0))
  assert "random_bits" not in helpers.primitives(without, variables, IMAGES)


@every_family
def test_remat_keeps_the_tree_and_recomputes_every_block(name):
  plain, model = (small(name, remat=remat) for remat in (False, True))
  variables = init_shapes(plain, IMAGES)
  assert helpers.shapes(init_shapes(model, IMAGES)) == helpers.shapes(variables)
  traced = str(jax.make_jaxpr(functools.partial(train, model))(variables, IMAGES))
  assert len(re.findall(r"= (?:checkpoint|remat\w*)\[", traced)) == FAMILIES[name].blocks


@every_family
def test_every_norm_shares_its_statistics_over_the_axis(name):
  def sums(axis_name):
    own = {"axis_name": axis_name, "statistics": "outputs", "dropout": 0.0}
    step = functools.partial(train, small(name, **own))
    names = helpers.primitives(step, variables, IMAGES, devices=4)
    return sum(name.startswith("psum") for name in names)

  variables = init_shapes(small(name), IMAGES)
  norms = sum(path.endswith("/var") for path in helpers.leaves(variables))
  assert (sums(None), sums("devices")) == (0, norms)


@functools.cache
def results(name):
  """Computes, in one program, what the tests of values below compare; in float64."""
  plain, x = small(name, dropout=0.5, **F64), random_input(4, 32, 32, 3)
  one, other = (random_variables(plain, x, seed) for seed in (0, 1))

  @quick_jit
  def compute(one, other):
    def evaluate(stats):
      logits = plain.apply({**one, "batch_stats": stats}, x)
      return (logits**2).sum(), logits

    by_stats, trained = jax.grad(evaluate, has_aux=True)(one["batch_stats"])
    converted = [repjax.reparameterize(*halves(each)) for each in (one, other)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), one, other)
    return {
      "trained": trained,
      "deployed": plain.clone(deploy=True).apply({"params": converted[0]}, x),
      "by statistics": by_stats,
      # A row for each key of dropout.
      "dropped": jax.vmap(lambda key: train(plain, one, x, key))(jax.random.split(KEY)),
      "converted": converted,
      "together": jax.vmap(lambda each: repjax.reparameterize(*halves(each)))(stacked),
    }

  return one, compute(one, other)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", THOROUGH)
class TestValues:
  def test_both_forms_agree(self, name):
    _, found = results(name)
    assert_close(found["deployed"], found["trained"], 1e-12)

  def test_every_statistic_counts_in_evaluation(self, name):
    # Otherwise a fold that forgot a statistic would go unnoticed by the test above.
    _, found = results(name)
    unused = {
      path for path, leaf in helpers.leaves(found["by statistics"]).items() if not leaf.any()
    }
    assert not {path for path in unused if "AuxHead" not in path and not is_note(path)}

  def test_every_statistic_is_updated_in_training(self, name):
    variables, found = results(name)
    (_, updates) = found["dropped"]
    new, old = helpers.leaves(updates["batch_stats"]), helpers.leaves(variables["batch_stats"])
    assert new.keys() == old.keys()
    moved = [np.abs(new[path][0] - old[path]).max() > 0 for path in old if not is_note(path)]
    assert all(moved)

  def test_dropout_depends_on_its_key_and_only_the_classifier_sees_it(self, name):
    outputs, stats = results(name)[1]["dropped"]
    first, second = jax.tree.leaves(outputs)[0]
    assert helpers.relative_error(first, second) > 0.01
    # The norms of RepViT's classifier come after dropout.
    seen = {path: rows for path, rows in helpers.leaves(stats).items() if "RepHeads" not in path}
    for rows in seen.values():
      assert_close(rows[0], rows[1], 1e-12)

  def test_conversions_of_several_networks_at_once_are_those_of_each(self, name):
    _, found = results(name)
    for index, each in enumerate(found["converted"]):
      part = jax.tree.map(lambda leaf, index=index: leaf[index], found["together"])
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), part, each
      )


@functools.cache
def expanded(name):
  """Computes, in one program, what the tests of the way back compare; in float64."""
  model, x = small(name, dropout=0.0, **F64), random_input(4, 32, 32, 3, seed=2)
  source = random_variables(model, x, seed=3)

  @quick_jit
  def compute(source):
    params, found = repjax.reparameterize(*halves(source)), {}
    ways = {"with images": x, "without images": jax.ShapeDtypeStruct(x.shape, x.dtype)}
    for way, images in ways.items():
      variables = repjax.expand(model, params, KEY, images=images)
      found[way] = {
        "variables": variables,
        "back": repjax.reparameterize(*halves(variables)),
        "evaluated": model.apply(variables, x),
        "trained": jax.tree.leaves(train(model, variables, x)[0])[0],  # without auxiliary logits
      }
    return params, model.clone(deploy=True).apply({"params": params}, x), found

  return helpers.shapes(source), *compute(source)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("way", ["with images", "without images"])
@pytest.mark.parametrize("name", THOROUGH)
class TestExpanded:
  def test_it_folds_into_what_it_was(self, name, way):
    shapes, params, _, found = expanded(name)
    assert helpers.shapes(found[way]["variables"]) == shapes
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-12), found[way]["back"], params)

  def test_it_computes_the_same(self, name, way):
    _, _, deployed, found = expanded(name)
    assert_close(found[way]["evaluated"], deployed, 1e-12)

  def test_training_mode_computes_the_same_only_on_images_that_were_given(self, name, way):
    _, _, deployed, found = expanded(name)
    error = helpers.relative_error(found[way]["trained"], deployed)
    assert error <= 1e-12 if way == "with images" else error > 1e-3


def training_steps(models):
  """Returns gradients, outputs and updates of each model, in training mode on one input."""
  x = random_input(4, 32, 32, 3)
  variables = random_variables(models[0], x)

  def loss(model, params):
    outputs, updates = train(model, {**variables, "params": params}, x)
    return sum((leaf**2).sum() for leaf in jax.tree.leaves(outputs)), (outputs, updates)

  @quick_jit
  def both(params):
    return [jax.grad(functools.partial(loss, model), has_aux=True)(params) for model in models]

  return both(variables["params"])


# One place wraps the blocks of all families. ParNet's blocks read one map, or two.
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", helpers.spread(["repvgg_a0", "parnet_s"], ["repvgg_a0"]))
def test_remat_changes_neither_outputs_nor_gradients(name):
  models = [small(name, remat=remat, **F64) for remat in (False, True)]
  plain, rematerialised = training_steps(models)
  largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(plain[0]))

  def check(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10 * largest)

  jax.tree.map(check, rematerialised, plain)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", [case for case in THOROUGH if case.values != ("vgg16",)])
def test_statistics_from_the_covariance_change_no_training_step(name):
  models = [small(name, statistics=way, dropout=0.0, **F64) for way in ("covariance", "outputs")]
  for found, wanted in zip(*training_steps(models)):
    # Gradients of a bias in front of a norm are zero but for rounding.
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
      np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12 * largest)


@every_family
def test_lists_as_json_gives_them_make_the_same_network(name):
  def listed(value):
    if isinstance(value, dict):
      return {name: listed(item) for name, item in value.items()}
    return [listed(item) for item in value] if isinstance(value, tuple) else value

  overrides = {field: listed(value) for field, value in FAMILIES[name].overrides.items()}
  model = small(name, **overrides)
  assert model == small(name)
  assert hash(model) == hash(small(name))


class TestRefusals:
  @pytest.mark.parametrize("shape", [(64, 64, 3), (1, 3, 64, 3), (1, 64, 1, 3)], ids=str)
  @every_family
  def test_images_that_are_too_small_or_no_batch(self, name, shape):
    model = small(name)
    said = rf"this {type(model).__name__} .*\(N, H, W, C\).*got \({shape[0]}, {shape[1]}"
    with pytest.raises(InputError, match=said):
      init_shapes(model, jnp.ones(shape))

  @pytest.mark.parametrize(
    ("overrides", "said"),
    [
      ({"num_classes": 0}, "num_classes must be at least 1"),
      ({"dropout": 1.0}, "dropout is at least 0 and below 1"),
      ({"dropout": -0.1}, "dropout is at least 0 and below 1"),
      ({"act": "swish"}, "unknown activation 'swish'"),
      ({"stage_sises": 1}, "unknown override of .* 'stage_sises'"),
    ],
    ids=str,
  )
  @every_family
  def test_attributes_that_make_no_network(self, name, overrides, said):
    with pytest.raises(InputError, match=said):
      small(name, **overrides)
