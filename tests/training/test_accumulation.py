"""A batch in parts against the same thing written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from repjax import training
from repjax.training import loop, optimizer, parallel
from repjax.training.state import create_state
from repjax.training.step import accumulate, make_train_step
from repjax.training.tasks import Classification
from tests.helpers import leaves, relative_error
from tests.training import tiny
from tests.training.test_step import (
  DEVICES,
  EACH,
  PREPROCESSING,
  Toy,
  cross_entropy,
  make_batch,
)

pytest_plugins = ["tests.training.fixtures"]

RATE = 0.5


class Plain(nn.Module):
  """No batch norm; counts how often its statistics were updated."""

  @nn.compact
  def __call__(self, images, train=False):
    count = self.variable("batch_stats", "count", jnp.zeros, ())
    if train:
      count.value = count.value + 1
    x = nn.relu(nn.Conv(4, (3, 3), (2, 2))(images)).mean((1, 2))
    return nn.Dense(3)(x)


def parts_of(model, parts, *, axis_name=None, **options):
  """The model's first state and a step that cuts each device's batch into parts."""
  variables = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 16, 16, 3)))
  sgd = optimizer.sgd(lambda step: RATE, momentum=0.9, nesterov=False, weight_decay=0.01)
  step = make_train_step(
    model, sgd, PREPROCESSING, accumulate_steps=parts, axis_name=axis_name, **options
  )
  return create_state(variables, sgd), step


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_without_batch_norm_parts_are_as_good_as_the_whole(parts):
  batch = make_batch(classes=3)
  state, whole = parts_of(Plain(), 1, task=Classification(0.1))
  expected, metrics = jax.jit(whole)(state, batch)
  new, own = jax.jit(parts_of(Plain(), parts, task=Classification(0.1))[1])(state, batch)
  for path, value in leaves(new.params).items():
    assert relative_error(value, leaves(expected.params)[path]) <= 1e-5, path
  for name, value in metrics.items():
    assert relative_error(own[name], value) <= 1e-5, name
  assert (expected.batch_stats["count"], new.batch_stats["count"]) == (1, parts)
  assert new.step == 1  # so that the schedule counts updates
  assert [leaf for leaf in jax.tree.leaves(new.opt_state) if not leaf.ndim] == [1]


def test_parts_on_four_devices_are_the_devices_parts_one_after_another():
  parts, model = 2, Toy()
  state, step = parts_of(model, parts, axis_name=parallel.AXIS)
  batches = [make_batch(seed, classes=3) for seed in range(parts)]
  # Of a device's images the first EACH are the first part.
  cut = jax.tree.map(
    lambda *values: np.concatenate([v.reshape(DEVICES, EACH, *v.shape[1:]) for v in values], 1),
    *batches,
  )
  new, metrics = parallel.data_parallel(step)(parallel.place(state), cut)

  @jax.jit
  def alone(params, stats, images, labels):
    def loss_of(params):
      logits, updates = model.apply(
        {"params": params, "batch_stats": stats}, images, train=True, mutable=["batch_stats"]
      )
      return cross_entropy(logits, labels), updates["batch_stats"]

    return jax.value_and_grad(loss_of, has_aux=True)(params)

  losses, gradients, statistics = [], [], []
  for device in range(DEVICES):
    stats = state.batch_stats
    for part in range(parts):
      own = slice(part * EACH, (part + 1) * EACH)
      images = PREPROCESSING.normalize(jnp.asarray(cut["image"][device, own]))
      (loss, stats), gradient = alone(state.params, stats, images, cut["label"][device, own])
      losses, gradients = [*losses, loss], [*gradients, gradient]
    statistics.append(stats)
  gradient, stats = (
    jax.tree.map(lambda *values: sum(values) / len(values), *trees)
    for trees in (gradients, statistics)
  )
  assert relative_error(metrics["loss"], np.mean(losses)) <= 1e-6
  for path, value in leaves(new.batch_stats).items():
    assert relative_error(value, leaves(stats)[path]) <= 1e-6, path
  first = leaves(state.params)
  for path, value in leaves(new.params).items():
    factor = 2 if path.endswith("bias") else 1
    decay = 0.01 * path.endswith("kernel") * first[path]
    expected = first[path] - factor * RATE * (leaves(gradient)[path] + decay)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6, err_msg=path)


def test_each_part_has_a_key_of_its_own():
  def gradients_of(variables, batch, rng):
    drawn = jax.random.uniform(rng)
    return drawn, {"batch_stats": variables["batch_stats"].at[batch["x"][0]].set(drawn)}, {}

  def keys(parts):
    variables, batch = {"batch_stats": jnp.zeros(parts)}, {"x": jnp.arange(parts)}
    return accumulate(gradients_of, variables, batch, jax.random.key(3), parts)

  mean, updates, _ = keys(4)
  drawn = np.asarray(updates["batch_stats"])
  assert len(set(drawn)) == 4
  assert mean == pytest.approx(drawn.mean())
  # Of a whole batch it is the step's, so that a run continues as it began under any later version.
  assert keys(1)[0] == jax.random.uniform(jax.random.key(3))


def test_a_part_sees_the_statistics_of_the_one_before():
  def gradients_of(variables, batch, rng):
    del rng
    last = {"batch_stats": variables["batch_stats"] * 10 + batch["x"].sum()}
    return batch["x"].mean(), last, {"loss": batch["x"].max()}

  variables = {"params": jnp.zeros(()), "batch_stats": jnp.zeros(())}
  gradients, updates, metrics = accumulate(
    gradients_of, variables, {"x": jnp.asarray([1.0, 2, 3, 4, 5, 6])}, jax.random.key(0), 3
  )
  assert (gradients, updates["batch_stats"], metrics["loss"]) == (3.5, 3 * 100 + 7 * 10 + 11, 4.0)


def test_every_field_of_a_recipe_reaches_the_step(digits_dir, tmp_path, monkeypatch):
  changes = {
    "aux_weight": 0.5,
    "custom_l2": 0.6,
    "accumulate_steps": 2,
    "ema_decay": 0.7,
    "seed": 8,
  }

  class BuiltError(Exception):
    """Ends the run where the step is built."""

  def built(model, optimizer, preprocessing, **options):
    raise BuiltError(model.axis_name, model.dtype, options)

  monkeypatch.setattr(loop, "make_train_step", built)
  config = tiny.config(
    digits_dir,
    **changes,
    label_smoothing=0.2,
    mixup=0.3,
    cutmix=0.4,
    weight_decay_rule="all_but_penalised_kernels",
    sync_batch_norm=True,
    dtype="bfloat16",
  )
  with pytest.raises(BuiltError) as caught:
    training.train(config, tmp_path)
  axis, dtype, options = caught.value.args
  assert (axis, dtype) == (parallel.AXIS, jnp.bfloat16)
  task = Classification(label_smoothing=0.2, mixup=0.3, cutmix=0.4)
  own = {"ema_start": 3, "axis_name": parallel.AXIS, "frozen": False, "network": None}
  assert options == {"task": task, **changes, **own}
