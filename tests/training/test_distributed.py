"""Two processes with two devices each against one process with four."""

import json
import re

import jax
import numpy as np
import pytest

from repjax import disk, runs
from repjax.spec import ModelSpec
from repjax.training import optimizer
from repjax.training.state import create_state, restore_newest
from tests.helpers import random_variables
from tests.training import cluster, tiny

pytest_plugins = ["tests.training.fixtures"]

# Gloo joins the processes, and prints this for each of its groups. Several groups print at the same
# time, so that their sentences can stand inside one another.
GLOO = re.compile(
  r"\[Gloo\] Rank | is connected to | peer ranks\. "
  r"|Expected number of connected peer ranks is : |\d+"
)

# main.py, of which process 1 alone is told to stop.
STOPPED = """
import os, runpy, signal, sys
import jax
from repjax.training import loop

batches_of = loop.train_batches

def stopping(*arguments, **settings):
  for number, batch in enumerate(batches_of(*arguments, **settings)):
    if number == 2 and jax.process_index() == 1:
      os.kill(os.getpid(), signal.SIGTERM)
    yield batch

loop.train_batches = stopping
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def starts_of(digits_dir, cache_home, tmp_path_factory):
  """The tiny run on two processes, which is stopped and continued.

  Their folders, and for both starts how they ended and which checkpoints there were.
  """
  home = tmp_path_factory.mktemp("two")
  folders = [home / "first", home / "second"]  # each with a workdir of its own, if it made one
  for folder in folders:
    folder.mkdir()
  config = home / "small.py"
  config.write_text(
    "from tests.training import tiny\n"
    f"def get_config():\n  return tiny.config({str(digits_dir)!r}, tensorboard=True)\n"
  )
  main = (tiny.ROOT / "main.py", f"--config={config}", "--distributed")
  (home / "stopped.py").write_text(STOPPED)
  starts = []
  for program in ([home / "stopped.py"], []):
    ended = cluster.run(*program, *main, folders=folders, cache=cache_home)
    starts.append((ended, sorted(runs.checkpoints(folders[0] / "runs" / "small"))))
  return folders, *starts


def test_a_signal_to_one_process_saves_and_ends_all(starts_of):
  (first, second), held = starts_of[1]
  assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
  assert "on 4 x cpu of 2 processes\n" in first.stdout
  assert "stopping: the step in hand" in second.stderr
  assert "re-parameterizing" not in first.stdout
  for each in (first, second):
    assert each.stdout.endswith(f"continues from step {held[-1]}/{tiny.STEPS}\n")
  assert held[-1] in (3, 4, 6)  # where they ask one another


def test_the_run_continues_from_where_the_first_process_was(starts_of):
  (first, second), held = starts_of[2]
  assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
  assert f"continuing from the checkpoint of step {starts_of[1][1][-1]}\n" in first.stdout
  assert held[-1] == tiny.STEPS


def test_the_first_process_alone_prints_and_writes(starts_of):
  (ours, theirs), ((first, second), _) = starts_of[0], starts_of[2]
  assert first.stdout.endswith("saved: runs/small/deploy\npicture: runs/small/report.png\n")
  assert "step 12/12" in first.stdout
  assert GLOO.sub("", second.stdout).split() == []
  assert [path.name for path in ours.iterdir()] == ["runs"]
  assert list(theirs.iterdir()) == []


def state_of(workdir):
  spec = ModelSpec.read(workdir)
  sgd = optimizer.sgd(lambda step: 0.1, momentum=0.9, nesterov=False, weight_decay=1e-4)
  model = spec.create_model()
  size = spec.preprocessing.image_size
  variables = random_variables(model, np.ones((1, size, size, 3), np.float32))
  state = restore_newest(workdir, create_state(variables, sgd))
  return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}


def test_two_processes_with_two_devices_are_one_with_four(starts_of, finished):
  ours, theirs = state_of(starts_of[0][0] / "runs" / "small"), state_of(finished[0])
  assert ours.keys() == theirs.keys()
  # A batch norm follows every kernel, so that some momenta are sums of terms that all but cancel.
  # The rounding of such a sum is that of its terms. So errors of momenta are relative to the
  # largest momentum.
  momenta = [path for path in ours if path.startswith(".opt_state")]
  largest = max(np.abs(theirs[path]).max() for path in momenta)
  for path in ours:
    scale = largest if path in momenta else np.abs(theirs[path]).max()
    assert np.abs(ours[path] - theirs[path]).max() <= 1e-5 * scale, path


def records(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_metrics_and_evaluation_are_those_of_one_process(starts_of, finished):
  ours, theirs = records(starts_of[0][0] / "runs" / "small"), records(finished[0])
  assert [record["step"] for record in ours] == [record["step"] for record in theirs]
  for record, expected in zip(ours, theirs, strict=True):
    assert record.keys() == expected.keys()
    for name in record.keys() - {"loss", "eval_loss"}:
      assert record[name] == expected[name], (record["step"], name)
    for name in record.keys() & {"loss", "eval_loss"}:
      assert record[name] == pytest.approx(expected[name], rel=1e-5), (record["step"], name)


def test_the_deploy_form_is_that_of_one_process(starts_of, finished):
  ours = disk.read_json(starts_of[0][0] / "runs" / "small" / "deploy" / "report.json")
  assert ours["images"] == finished[1]["images"] == 360
  for name in ("step", "accuracy", "agreement", "parameters"):
    assert ours[name] == finished[1][name]
