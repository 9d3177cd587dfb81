"""RepOptimizer: a plain network learns exactly as a network with scaled branches does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import repjax
from repjax.layers.scaled_conv import merged_kernel
from repjax.training import optimizer, repoptimizer
from tests.helpers import (
  F64,
  init_shapes,
  leaves,
  quick_jit,
  random_input,
  randomise,
  relative_error,
)

pytest_plugins = ["tests.training.fixtures"]

STEPS = 5
NETWORK = {
  "num_classes": 4,
  "stage_sizes": (1, 2, 2, 1),
  "width_multipliers": (0.125, 0.0625, 0.03125, 0.015625),  # 8 channels each
  "strides": (1, 1, 2, 1, 2),
}
PLAIN = repjax.create_model("repvgg_a0", branches=("conv3x3",), **NETWORK, **F64)
SCALED = repjax.create_model("repvgg_a0", scaled=True, **NETWORK, **F64)
IMAGES, LABELS = random_input(6, 8, 8, 3), np.arange(6) % 4


def schedule(step):
  return jnp.asarray([0.05, 0.1, 0.1, 0.07, 0.02])[step]


def constant_scales(path):
  """Returns whether a parameter is s3 or s1, which are constants while the branches learn."""
  return path[-1] == "scale" and path[-2] in ("conv3x3", "conv1x1")


def frozen_scales(inner):
  """Wraps an optimizer so that s3 and s1 keep their values."""

  def frozen(path, change):
    return jnp.zeros_like(change) if constant_scales(path) else change

  def update(updates, state, params):
    updates, state = inner.update(updates, state, params)
    return optimizer.map_by_path(frozen, updates), state

  return optax.GradientTransformation(inner.init, update)


def train(model, variables, optimizer, loss_scale=1.0):
  """Returns the variables after five steps on one batch, which moves by a pixel each time."""
  params, stats, state = *map(variables.get, ("params", "batch_stats")), None

  @quick_jit
  def step(params, stats, state, images):
    def loss(params):
      logits, updates = model.apply(
        {"params": params, "batch_stats": stats}, images, train=True, mutable=["batch_stats"]
      )
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
      return loss_scale * losses.mean(), updates["batch_stats"]

    gradients, new_stats = jax.grad(loss, has_aux=True)(params)
    updates, new_state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), new_stats, new_state

  state = optimizer.init(params)
  for number in range(STEPS):
    params, stats, state = step(params, stats, state, np.roll(IMAGES, number, axis=1))
  return {"params": params, "batch_stats": stats}


def both_trained(make, loss_scale=1.0, **options):
  """Trains both networks from one random start, in which scales have both signs.

  Returns:
    The variables of the plain network, and those of the network of branches.
  """
  scaled = randomise(init_shapes(SCALED, IMAGES), seed=1)
  rng = np.random.default_rng(0)
  scaled["params"] = optimizer.map_by_path(
    lambda path, leaf: (
      leaf * rng.choice([1.0, -1.0], leaf.shape) if constant_scales(path) else leaf
    ),
    scaled["params"],
  )
  scales = repoptimizer.scales_in(scaled["params"])
  plain = as_plain(scaled)
  branches = train(SCALED, scaled, frozen_scales(make(schedule, **options)), loss_scale)
  return train(PLAIN, plain, make(schedule, scales=scales, **options), loss_scale), branches


def as_plain(scaled):
  """Returns the variables of the plain network that computes the same as scaled branches."""

  def convert(params, stats):
    if "bn" in params and "conv3x3" in params:
      kernel = merged_kernel(params)
      return (
        {"conv3x3": {"conv": {"kernel": kernel}, "bn": params["bn"]}},
        {"conv3x3": {"bn": stats["bn"]}},
      )
    pairs = {
      name.replace("ScaledConv", "RepConv"): convert(value, stats.get(name, {}))
      if isinstance(value, dict)
      else (value, None)
      for name, value in params.items()
    }
    kept = {name: below for name, (_, below) in pairs.items() if below}
    return {name: above for name, (above, _) in pairs.items()}, kept

  params, stats = convert(scaled["params"], scaled["batch_stats"])
  return {"params": params, "batch_stats": stats}


def largest_difference(ours, theirs):
  ours, theirs = leaves(ours), leaves(theirs)
  assert ours.keys() == theirs.keys()
  return max(relative_error(value, theirs[path]) for path, value in ours.items())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  ("momentum", "nesterov", "weight_decay", "rule"),
  [
    pytest.param(0.0, False, 0.0, "kernels_and_fast_biases", marks=pytest.mark.proof),
    pytest.param(0.9, False, 0.1, "kernels_and_fast_biases", marks=pytest.mark.proof),
    (0.9, True, 0.1, "more_than_one_axis"),
  ],
)
def test_with_sgd_a_plain_network_is_the_sum_of_its_branches_after_every_step(
  momentum, nesterov, weight_decay, rule
):
  plain, branches = both_trained(
    optimizer.sgd,
    momentum=momentum,
    nesterov=nesterov,
    weight_decay=weight_decay,
    weight_decay_rule=rule,
  )
  assert largest_difference(plain, as_plain(branches)) <= 1e-12


@pytest.mark.usefixtures("x64")
@pytest.mark.proof
def test_with_adamw_it_is_that_sum_where_gradients_are_large_beside_adams_constant():
  def difference(loss_scale):
    options = {"momentum": 0.9, "weight_decay": 0.1}
    plain, branches = both_trained(optimizer.adamw, loss_scale=loss_scale, **options)
    return largest_difference(plain, as_plain(branches))

  # Adam is blind to the size of a gradient but for its constant, which a large loss outweighs.
  assert difference(1e8) <= 1e-9 < difference(1.0)


@pytest.mark.usefixtures("x64")
def test_without_multipliers_the_plain_network_learns_differently():
  def without(schedule, scales=None, **options):
    return optimizer.sgd(schedule, **options)

  options = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
  plain, branches = both_trained(without, **options)
  assert largest_difference(plain, as_plain(branches)) > 0.01
