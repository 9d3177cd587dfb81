"""Schedule, weight-decay rule and optimizer against the authors' script of June 2021."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import repjax
from repjax.training import optimizer
from tests.helpers import leaves, official_name, relative_error

pytest_plugins = ["tests.training.fixtures"]


@pytest.fixture(scope="module")
def paths():
  """The path of every parameter of a RepVGG with every kind of scope there is."""
  model = repjax.create_model(
    "repvgg_a0", stage_sizes=(1, 1, 2, 1), se="post", se_reduction=4, aux_heads=True
  )
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  return [tuple(path.split("/")) for path in leaves(shapes["params"])]


def test_what_decays_is_what_the_authors_script_lets_decay(paths):
  # train.py: no decay where the name holds "bias" or "bn".
  by_name = {
    path: not any(word in official_name("/".join(path), plus=True) for word in ("bias", "bn"))
    for path in paths
  }
  assert {path: optimizer.decayed(path) for path in paths} == by_name


def test_what_decays_in_words(paths):
  kinds = {path[-2:] for path in paths if optimizer.decayed(path)}
  assert kinds == {
    ("conv", "kernel"),
    ("head", "kernel"),
    ("down", "kernel"),
    ("up", "kernel"),
    ("bn", "scale"),
  }
  scales = {path[-3] for path in paths if path[-1] == "scale" and optimizer.decayed(path)}
  assert scales == {"identity"}
  assert {path[-3] for path in paths if path[-1] == "scale"} == {"identity", "conv3x3", "conv1x1"}


def test_biases_alone_learn_twice_as_fast(paths):
  by_name = {path: "bias" in official_name("/".join(path), plus=True) for path in paths}
  assert {path: optimizer.is_bias(path) for path in paths} == by_name
  kinds = {path[-2:] for path in paths if optimizer.is_bias(path)}
  assert kinds == {("bn", "bias"), ("head", "bias"), ("down", "bias"), ("up", "bias")}


def torch_sgd(params, gradients, rates, *, momentum, nesterov, weight_decay):
  """torch.optim.SGD by its documentation; a parameter is (value, decay?, times the rate)."""
  trace = None
  value, decays, factor = params
  for gradient, rate in zip(gradients, rates):
    g = gradient + weight_decay * decays * value
    trace = g if trace is None else momentum * trace + g
    step = g + momentum * trace if nesterov else trace
    value = value - factor * rate * step
  return value


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_several_steps_are_those_of_pytorch(nesterov, momentum):
  rng = np.random.default_rng(0)
  layout = {
    "stem": {
      "conv3x3": {"conv": {"kernel": (3, 3, 2, 4)}, "bn": {"scale": (4,), "bias": (4,)}},
      "identity": {"bn": {"scale": (4,), "bias": (4,)}},
    },
    "head": {"kernel": (4, 5), "bias": (5,)},
  }

  def draw():
    return jax.tree.map(rng.standard_normal, layout, is_leaf=lambda x: isinstance(x, tuple))

  first, gradients = draw(), [draw() for _ in range(5)]
  rates = [0.5, 0.2, 0.9, 0.0, 0.3]
  sgd = optimizer.sgd(
    lambda step: jnp.asarray(rates)[step], momentum=momentum, nesterov=nesterov, weight_decay=0.03
  )
  params = jax.tree.map(jnp.asarray, first)
  state = sgd.init(params)
  update = jax.jit(sgd.update)
  for gradient in gradients:
    updates, state = update(jax.tree.map(jnp.asarray, gradient), state, params)
    params = optax.apply_updates(params, updates)

  decays = ("stem/conv3x3/conv/kernel", "stem/identity/bn/scale", "head/kernel")
  for path, value in leaves(params).items():
    expected = torch_sgd(
      (leaves(first)[path], path in decays, 2 if path.endswith("bias") else 1),
      [leaves(gradient)[path] for gradient in gradients],
      rates,
      momentum=momentum,
      nesterov=nesterov,
      weight_decay=0.03,
    )
    assert relative_error(value, expected) <= 1e-14, path


def test_the_classifier_is_what_depends_on_the_number_of_classes(paths):
  model = {"stage_sizes": (1, 1, 2, 1), "se": "post", "se_reduction": 4, "aux_heads": True}
  shapes = [
    jax.eval_shape(
      repjax.create_model("repvgg_a0", num_classes=classes, **model).init,
      jax.random.key(0),
      jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32),
    )["params"]
    for classes in (3, 5)
  ]
  of_three, of_five = (leaves(tree) for tree in shapes)
  differ = {path for path, leaf in of_three.items() if leaf.shape != of_five[path].shape}
  assert differ == {"/".join(path) for path in paths if optimizer.is_classifier(path)}
  assert len(differ) == 8  # kernel and bias of the classifier and of three auxiliary heads


LAYOUT = {
  "stem": {"conv": {"kernel": (3, 3, 2, 4)}, "bn": {"scale": (4,), "bias": (4,)}},
  "AuxHead_stage1": {"RepConv_0": {"kernel": (4, 4)}, "head": {"kernel": (4, 5), "bias": (5,)}},
  "head": {"kernel": (4, 5), "bias": (5,)},
}


def drawn(seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32),
    LAYOUT,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def steps_of(count, **settings):
  """The updates of the last of some steps, and the optimizer's state."""
  sgd = optimizer.sgd(lambda step: 0.3, momentum=0.9, nesterov=True, weight_decay=0.03, **settings)
  params, state = drawn(0), sgd.init(drawn(0))
  for seed in range(1, 1 + count):
    updates, state = sgd.update(drawn(seed), state, params)
  return updates, state


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("factor", [0.1, 0.3, 2.0])
def test_the_backbones_rate_scales_its_updates_exactly_and_no_others(factor, steps):
  plain, state = steps_of(steps)
  scaled, scaled_state = steps_of(steps, backbone_rate=factor)
  for path, update in leaves(scaled).items():
    own = 1 if path.startswith(("head/", "AuxHead_stage1/head/")) else factor
    np.testing.assert_array_equal(update, leaves(plain)[path] * np.float32(own), err_msg=path)
  # So that a run may continue at another factor.
  assert jax.tree.structure(scaled_state) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, scaled_state, state)


def test_an_optimizer_for_a_frozen_backbone_holds_and_changes_the_classifier_alone():
  params, gradients = drawn(0), {"head": drawn(1)["head"]}
  settings = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.03}
  sgd = optimizer.sgd(lambda step: 0.3, backbone_rate=0.0, **settings)
  state = sgd.init(params)
  arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
  assert sorted(leaf.shape for leaf in arrays) == [(4, 5), (5,)]
  updates, _ = sgd.update(gradients, state, params)
  expected, _ = steps_of(1)
  assert updates.keys() == {"head"}
  jax.tree.map(np.testing.assert_array_equal, updates["head"], expected["head"])


@pytest.mark.parametrize("batch_size", [64, 256, 1024])
def test_the_rate_warms_up_linearly_then_falls_as_a_cosine_to_zero(batch_size):
  schedule = optimizer.learning_rate_schedule(0.1, batch_size, 10, 110)
  peak = 0.1 * batch_size / 256
  expected = {
    0: 0,
    1: 0.1 * peak,
    5: 0.5 * peak,
    10: peak,
    35: (2 + math.sqrt(2)) / 4 * peak,
    60: 0.5 * peak,
    85: (2 - math.sqrt(2)) / 4 * peak,
    110: 0,
    111: 0,
  }
  for step, rate in expected.items():
    assert float(schedule(step)) == pytest.approx(rate, rel=1e-6, abs=1e-7 * peak), step


def test_without_warm_up_the_first_step_is_at_the_peak():
  schedule = optimizer.learning_rate_schedule(0.1, 256, 0, 100)
  rates = [float(schedule(step)) for step in range(101)]
  expected = [0.05 * (1 + math.cos(math.pi * step / 100)) for step in range(101)]
  np.testing.assert_allclose(rates, expected, rtol=1e-6, atol=1e-8)


def test_a_run_that_is_all_warm_up_has_a_schedule():
  schedule = optimizer.learning_rate_schedule(0.1, 256, 4, 4)
  assert [float(schedule(step)) for step in range(4)] == pytest.approx([0, 0.025, 0.05, 0.075])


@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_the_schedule_is_the_same_for_a_traced_step_under_strict_promotion(warmup_steps):
  schedule = optimizer.learning_rate_schedule(0.1, 256, warmup_steps, 10)
  expected = [float(schedule(step)) for step in range(11)]
  with jax.numpy_dtype_promotion("strict"):
    traced = jax.jit(jax.vmap(schedule))(jnp.arange(11))
  np.testing.assert_allclose(traced, expected, 1e-6, 1e-8)
