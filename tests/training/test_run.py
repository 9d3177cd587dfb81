"""Runs from the first step to the deploy form: whole, interrupted, finished and diverging."""

import itertools
import json
import re
import shutil
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import repjax
from repjax import disk, runs, training
from repjax.configs import digits_repmlp
from repjax.errors import InputError
from repjax.training import display, loop, optimizer, planning, schedules
from repjax.training.prefetch import ReadAhead
from repjax.training.state import create_state
from tests.training import tiny
from tests.training.boards import shown

pytest_plugins = ["tests.training.fixtures"]


def newest(workdir):
  """Returns step and every array of a run's newest checkpoint."""
  spec = planning.ModelSpec.read(workdir)
  sgd = optimizer.sgd(lambda step: 0.1, momentum=0.9, nesterov=False, weight_decay=1e-4)
  shapes = jax.eval_shape(lambda variables: create_state(variables, sgd), spec.variable_shapes())
  items = {
    "variables": {"params": shapes.params, "batch_stats": shapes.batch_stats},
    "training": {"step": shapes.step, "opt_state": shapes.opt_state},
  }
  return runs.read_checkpoint(workdir, items)


def records(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def continued(digits_dir, cache_home, tmp_path_factory):
  """The tiny run, interrupted two steps after its first checkpoint and started again."""
  workdir = tmp_path_factory.mktemp("runs") / "continued"
  config = tiny.config(digits_dir, tensorboard=True)
  batches_of = loop.train_batches

  def until_interrupted(*arguments, **settings):
    batches = batches_of(*arguments, **settings)
    yield from itertools.islice(batches, tiny.EVAL_STEPS + 2)
    raise KeyboardInterrupt

  with tiny.quick_programs(cache_home / "repjax" / "xla"), pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "train_batches", until_interrupted)
    with pytest.raises(KeyboardInterrupt):
      training.train(config, workdir)
    patch.undo()
    assert runs.checkpoints(workdir).keys() == {tiny.EVAL_STEPS}
    # Statistics beside a checkpoint must leave no trace in what follows from it.
    training.recalibrate(config, workdir, num_batches=1)
    training.train(config, workdir)
  return workdir


def test_a_run_leaves_these_files_and_no_others(finished):
  workdir, _, _ = finished
  names = {path.name for path in workdir.iterdir()}
  assert names == {
    *("config.json", "model.json", "data.json", "metrics.jsonl", "timing.jsonl"),
    *("checkpoints", "deploy", "report.png", "manifest.json", "newest.json"),
  }
  assert {path.name for path in (workdir / "deploy").iterdir()} == {
    *("model.json", "report.json", "params", "manifest.json"),
  }


def test_a_run_ends_with_two_forms_that_agree(finished):
  _, report, _ = finished
  assert report["images"] == 360
  assert report["agreement"] == 1.0
  assert 0 < report["logits_difference"] <= 1e-5
  assert report["accuracy"]["train"] == report["accuracy"]["deploy"]


def test_a_run_says_what_it_does(finished):
  workdir, _, printed = finished
  lines = printed.splitlines()
  assert lines[0] == f"workdir: {workdir}"
  assert "repvgg_a0 on digits: 1,437 images, 10 classes, 16 px, on 4 x cpu" in lines
  assert "12 steps of 32 images; learning rate 0.4 x 32/256 = 0.05" in lines
  assert [line.split("  ")[0] for line in lines if line.startswith("step ")] == [
    f"step {step}/12" for step in (1, 3, 4, 4, 6, 8, 8, 9, 12, 12)
  ]
  assert len([line for line in lines if re.match(r"steps waited .* s for data \(", line)]) == 1
  assert lines[-2:] == [f"saved: {workdir}/deploy", f"picture: {workdir}/report.png"]


def test_a_first_step_that_is_logged_is_shown_once(digits_dir, tmp_path, capsys):
  training.train(tiny.config(digits_dir, num_steps=1), tmp_path / "run")
  lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 1/1  ")]
  assert ["evaluation" in line for line in lines] == [False, True]


def test_metrics_hold_training_and_evaluation_in_the_order_of_the_steps(finished):
  workdir, _, _ = finished
  rows = records(workdir)
  trained = [row for row in rows if "loss" in row]
  evaluated = [row for row in rows if "eval_loss" in row]
  assert len(rows) == len(trained) + len(evaluated)
  assert sorted(rows, key=lambda row: row["step"]) == rows
  assert [row["step"] for row in trained] == [3, 4, 6, 8, 9, 12]
  assert [row["step"] for row in evaluated] == [4, 8, 12]
  schedule = schedules.learning_rate_schedule(0.4, 32, 3, 12)
  for row in trained:
    assert row.keys() == {"step", "loss", "accuracy", "learning_rate"}
    assert row["learning_rate"] == float(schedule(row["step"] - 1))
  for row in evaluated:
    assert row.keys() == {"step", "eval_accuracy", "eval_loss"}


def test_checkpoints_carry_the_accuracy_of_their_evaluation(finished):
  workdir, _, _ = finished
  accuracies = {row["step"]: row["eval_accuracy"] for row in records(workdir) if "eval_loss" in row}
  kept = runs.checkpoints(workdir)
  assert kept.items() <= accuracies.items()
  best = max(accuracies, key=lambda step: (accuracies[step], step))
  assert kept.keys() == {12, best}


def test_a_run_that_was_interrupted_ends_with_the_same_bits(finished, continued):
  step, expected = newest(finished[0])
  assert step == tiny.STEPS
  assert newest(continued)[0] == step
  jax.tree.map(np.testing.assert_array_equal, newest(continued)[1], expected)


def test_a_run_that_was_interrupted_ends_with_the_same_metrics(finished, continued):
  assert records(continued) == records(finished[0])


def test_a_run_that_was_interrupted_shows_and_times_every_record_once(continued):
  expected = {}
  for row in records(continued):
    for name in row.keys() - {"step"}:
      tag = name.replace("eval_", "eval/") if "eval" in name else f"train/{name}"
      expected.setdefault(tag, []).append((row["step"], pytest.approx(row[name])))
  found = shown(continued / "tensorboard")
  assert {tag: points for tag, points in found.items() if "speed/" not in tag} == expected
  lines = (continued / "timing.jsonl").read_text().splitlines()
  timed = [json.loads(line)["step"] for line in lines]
  assert [step for step, _ in found["speed/images_per_second"]] == timed == [3, 4, 6, 8, 9, 12]


def test_a_run_that_was_interrupted_ends_with_the_same_report(finished, continued):
  assert json.loads((continued / "deploy" / "report.json").read_text()) == finished[1]


def test_a_finished_run_started_again_trains_no_further(
  finished, digits_dir, tmp_path, monkeypatch, capsys
):
  workdir = shutil.copytree(finished[0], tmp_path / "run")

  def files():
    held = tiny.contents(workdir).items()
    # Orbax notes the time at which it writes.
    with_time = ("deploy/params/", "deploy/manifest.json")
    return {name: data for name, data in held if not name.startswith(with_time)}

  before = files()
  monkeypatch.setattr(loop, "train_batches", None)
  assert training.train(tiny.config(digits_dir), workdir) == finished[1]
  printed = capsys.readouterr().out
  assert "all 12 steps were done already" in printed
  assert "devices so far" not in printed
  assert files() == before


def test_a_run_that_continues_on_other_devices_says_so(finished, digits_dir, tmp_path, capsys):
  workdir = shutil.copytree(finished[0], tmp_path / "run")
  path = workdir / "checkpoints" / "12" / "bookmark" / "metadata"
  disk.write_json(path, {**disk.read_json(path), "devices": 8})
  disk.update_manifest(workdir / "checkpoints" / "12", path)
  training.train(tiny.config(digits_dir), workdir)
  assert "had 8 devices so far and now has 4" in capsys.readouterr().out


# After step 8 comes an evaluation, which notices before any step does.
@pytest.mark.parametrize(
  ("spoiled", "noticed"), [pytest.param(6, "7", marks=pytest.mark.proof), (8, "[89]")]
)
def test_a_loss_that_is_not_finite_stops_the_run_and_spoils_no_checkpoint(
  digits_dir, tmp_path, monkeypatch, spoiled, noticed
):
  data_parallel = loop.parallel.data_parallel

  def spoiling(step, donate=False, **rest):
    run = data_parallel(step, donate, **rest)
    if not donate:
      return run

    def run_and_spoil(state, batch):
      new, metrics = run(state, batch)
      if new.step == spoiled:
        new = new.replace(params=jax.tree.map(lambda x: x * jnp.nan, new.params))
      return new, metrics

    return run_and_spoil

  monkeypatch.setattr(loop.parallel, "data_parallel", spoiling)
  with pytest.raises(InputError, match=f"is nan at step {noticed}; training stopped") as caught:
    training.train(tiny.config(digits_dir), tmp_path)
  assert "A lower --config.learning_rate" in str(caught.value)
  step, items = newest(tmp_path)
  assert step == 4
  assert all(np.isfinite(value).all() for value in jax.tree.leaves(items))
  assert not (tmp_path / "deploy").exists()
  assert not [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


@pytest.mark.proof
def test_bfloat16_gates_auxiliary_heads_dropout_mixing_and_parts_train_and_deploy(
  digits_dir, tmp_path, capsys
):
  config = tiny.config(
    digits_dir,
    model_overrides={**tiny.WITH_GATES_AND_HEADS, "dropout": 0.2},
    dtype="bfloat16",
    optimizer="adamw",
    learning_rate=0.01,
    schedule="poly",
    weight_decay_rule="all_but_penalised_kernels",
    custom_l2=1e-3,
    clip_norm=5.0,
    accumulate_steps=4,
    ema_decay=0.5,
    label_smoothing=0.1,
    mixup=0.2,
    cutmix=1.0,
    augment="random_resized_crop | flip",
    image_size=24,
    eval_image_size=16,
    num_steps=1,
  )
  report = training.train(config, tmp_path)
  assert report["agreement"] == 1.0
  assert report["logits_difference"] <= 1e-5
  assert not any("AuxHead" in name for name in report["layers"])
  folder = tmp_path / "checkpoints" / "1" / "variables"
  with ocp.StandardCheckpointer() as checkpointer:
    held = checkpointer.restore(folder)  # as it is on disk
  assert {np.asarray(leaf).dtype for leaf in jax.tree.leaves(held)} == {np.dtype("float32")}
  assert "AuxHead_stage1" in held["params"]
  printed = capsys.readouterr().out
  assert "24 px (16 in evaluation), on 4 x cpu" in printed
  assert "= 0.00125; gradients of 4 parts of a batch are averaged" in printed
  assert "averaged over the steps, decay 0.5" in printed
  assert repjax.load(tmp_path)[2].preprocessing.image_size == 16


@pytest.mark.proof
def test_repmlp_on_digits_trains_and_deploys(digits_dir, tmp_path):
  config = digits_repmlp.get_config()
  config.model_overrides.update({"stage_sizes": (1, 1, 1), "widths": (4, 6, 8)})
  config.update({"data_dir": str(digits_dir), "num_steps": 3, "batch_size": 32})
  report = training.train(config, tmp_path)
  assert report["agreement"] == 1.0
  assert report["images"] == 360
  assert report["logits_difference"] <= 1e-5
  assert any("RepDense" in name for name in report["layers"])


def test_a_run_that_waits_for_its_data_says_so(digits_dir, tmp_path, monkeypatch, capsys):
  now, take = [0.0], ReadAhead.take

  def slowly(self, running=()):  # a step a second, half of which the devices waited
    batch = take(self, running)
    now[0] += 1.0
    self.waited = now[0] / 2
    return batch

  monkeypatch.setattr(ReadAhead, "take", slowly)
  monkeypatch.setattr(display, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
  config = tiny.config(digits_dir, num_steps=6, log_every_steps=6, eval_every_epochs=1.0)
  training.train(config, tmp_path)
  printed = capsys.readouterr().out
  assert re.findall(r"data (\d+)%", printed) == ["50"]
  assert "steps waited 2.5 s of 5.0 s for data (50.0%)" in printed
  assert "data limits the speed: more --config.num_workers" in printed


def test_nothing_is_written_where_the_evaluation_split_does_not_exist(digits_dir, tmp_path):
  with pytest.raises(InputError, match="unknown split of digits 'validation'"):
    training.train(tiny.config(digits_dir, eval_split="validation"), tmp_path / "run")
  assert not (tmp_path / "run").exists()
