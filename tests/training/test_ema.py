"""Averages of parameters and statistics: in a step, in a checkpoint, and in a whole run."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repjax
from repjax import runs, training
from repjax.errors import InputError
from repjax.training import evaluation, parallel, planning
from repjax.training.state import create_state, from_items, restore_newest, to_items
from repjax.training.step import make_train_step
from tests.helpers import leaves
from tests.training import tiny
from tests.training.test_step import PREPROCESSING, Toy, make_batch, toy_state

pytest_plugins = ["tests.training.fixtures"]

DECAY = 0.8


def averaging_state(model):
  state, sgd = toy_state(model)
  return create_state(state.variables, sgd, ema=True), sgd


@pytest.mark.parametrize("start", [0, 2])
def test_an_average_is_a_copy_during_the_warm_up_and_then_falls_behind(start):
  model = Toy()
  state, sgd = averaging_state(model)
  step = jax.jit(make_train_step(model, sgd, PREPROCESSING, ema_decay=DECAY, ema_start=start))
  expected = {path: np.asarray(value, np.float64) for path, value in leaves(state.ema).items()}
  for number in range(4):
    state, _ = step(state, make_batch(number, classes=3))
    decay = DECAY if number >= start else 0
    for path, value in leaves(state.variables).items():
      expected[path] = decay * expected[path] + (1 - decay) * np.asarray(value)
    average = leaves(state.ema)
    assert average.keys() == expected.keys()
    for path, value in average.items():
      np.testing.assert_allclose(value, expected[path], rtol=1e-5, atol=1e-7, err_msg=path)
    same = jax.tree.map(np.array_equal, state.ema, state.variables)
    assert all(jax.tree.leaves(same)) == (number < start)
  assert {path.split("/")[0] for path in average} == {"params", "batch_stats"}


def test_averaging_changes_nothing_else():
  model = Toy(dropout=0.5)
  (plain, sgd), (averaging, _) = toy_state(model), averaging_state(model)
  steps = [
    jax.jit(make_train_step(model, sgd, PREPROCESSING, ema_decay=decay)) for decay in (0.0, DECAY)
  ]
  for number in range(2):
    plain, averaging = (
      step(state, make_batch(number, classes=3))[0]
      for step, state in zip(steps, (plain, averaging))
    )
  assert plain.ema is None
  jax.tree.map(np.testing.assert_array_equal, averaging.replace(ema=None), plain)


def test_a_placed_state_with_an_average_can_be_donated():
  model = Toy()
  state, sgd = averaging_state(model)
  step = make_train_step(model, sgd, PREPROCESSING, axis_name=parallel.AXIS, ema_decay=DECAY)
  run, batch = parallel.data_parallel(step, donate=True), parallel.split(make_batch(classes=3))
  expected, _ = parallel.data_parallel(step)(parallel.place(state), batch)
  donated, _ = run(parallel.place(state), batch)
  jax.tree.map(np.testing.assert_array_equal, donated, expected)


@pytest.mark.parametrize("ema", [False, True])
def test_a_state_becomes_items_and_back(ema):
  state, sgd = toy_state(Toy())
  state = create_state(state.variables, sgd, ema=ema)
  if ema:
    state = state.replace(ema=jax.tree.map(lambda x: x + 1, state.ema))
  back = from_items(to_items(state))
  assert jax.tree.structure(back) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, back, state)
  inference = to_items(state)["variables"]
  jax.tree.map(np.testing.assert_array_equal, inference, state.ema if ema else state.variables)


def records(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def newest(workdir, config):
  model = repjax.ModelSpec.read(workdir)
  sgd = planning.make_optimizer(config, planning.make_plan(config), lambda step: 0.1)
  like = jax.eval_shape(
    lambda variables: create_state(variables, sgd, ema=True), model.variable_shapes()
  )
  return restore_newest(workdir, like)


@pytest.mark.proof
def test_the_average_has_an_evaluation_of_its_own(averaged):
  evaluated = [row for row in records(averaged[0]) if "eval_loss" in row]
  assert [row["step"] for row in evaluated] == [4, 8, 12]
  for row in evaluated:
    assert row.keys() == {
      "step",
      "eval_accuracy",
      "eval_loss",
      "eval_ema_accuracy",
      "eval_ema_loss",
    }
    assert row["eval_ema_loss"] != row["eval_loss"]


def test_the_averages_accuracy_decides_which_checkpoint_is_the_best(averaged):
  accuracies = {
    row["step"]: row["eval_ema_accuracy"] for row in records(averaged[0]) if "eval_ema_loss" in row
  }
  kept = runs.checkpoints(averaged[0])
  assert kept.items() <= accuracies.items()
  best = max(accuracies, key=lambda step: (accuracies[step], step))
  assert kept.keys() == {12, best}
  assert averaged[1]["step"] == best


def test_the_average_is_what_is_evaluated_later_and_deployed(averaged, digits_dir):
  workdir, report = averaged
  row = next(
    row for row in records(workdir) if row["step"] == report["step"] and "eval_ema_loss" in row
  )
  assert report["ema_decay"] == DECAY
  assert report["accuracy"] == {
    "train": row["eval_ema_accuracy"],
    "deploy": row["eval_ema_accuracy"],
  }
  for deploy in (False, True):
    result = evaluation.evaluate(tiny.averaging(digits_dir), workdir, deploy=deploy)
    assert result["accuracy"] == row["eval_ema_accuracy"]
    assert result["loss"] == pytest.approx(row["eval_ema_loss"], rel=1e-4)


def test_what_learns_is_what_it_is_without_an_average(averaged, finished, digits_dir):
  plain, beside = (
    [{k: v for k, v in row.items() if not k.startswith("eval_ema")} for row in records(folder)]
    for folder in (finished[0], averaged[0])
  )
  assert beside == plain
  learning = newest(averaged[0], tiny.averaging(digits_dir)).variables
  step, items = runs.read_checkpoint(finished[0], {"variables": learning})
  assert step == 12
  jax.tree.map(np.testing.assert_array_equal, items["variables"], learning)


@pytest.mark.parametrize("begun", [False, True])
def test_an_average_is_neither_begun_nor_dropped_within_a_run(
  averaged, finished, digits_dir, tmp_path, begun
):
  workdir = shutil.copytree(finished[0] if begun else averaged[0], tmp_path / "run")
  before = tiny.contents(workdir)
  config = tiny.averaging(digits_dir) if begun else tiny.config(digits_dir)
  with pytest.raises(InputError, match="config: ema_decay"):
    training.train(config, workdir)
  assert tiny.contents(workdir) == before


def test_another_run_starts_from_the_average(averaged, digits_dir):
  spec = repjax.ModelSpec.read(averaged[0])
  fresh = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), spec.variable_shapes())
  variables, _ = training.finetune.first_variables(
    averaged[0], spec, fresh, key=jax.random.key(0), images=None
  )
  best = runs.read_best(averaged[0], spec.variable_shapes())[1]
  jax.tree.map(np.testing.assert_array_equal, variables, best)
  if averaged[1]["step"] == 12:
    jax.tree.map(
      np.testing.assert_array_equal, best, newest(averaged[0], tiny.averaging(digits_dir)).ema
    )
