"""Exchanges between the processes of a run."""

import json
import shutil
import sys

import jax
import numpy as np
import pytest

import repjax
from repjax import training
from repjax.disk import trees
from repjax.errors import InputError
from repjax.training import processes
from repjax.training.interruption import Preempted, Stopped
from tests.training import cluster, tiny

pytest_plugins = ["tests.training.fixtures"]

PROGRAM = """
import json, os, sys, time, warnings
import jax, numpy as np
from pathlib import Path
from repjax import training
from repjax.errors import InputError
from repjax.training import parallel, processes
from tests.training import tiny

processes.initialize()
me, said = jax.process_index(), {}

def stop(text, *only):
  if not only or me in only:
    raise InputError(text)
  return me

def text_of(function, *arguments):
  try:
    return function(*arguments)
  except processes.SharedError as error:
    return str(error)

def values():
  Path("called").touch()
  tree = {"odd": np.array([-0.0, np.nan, 1e-45], np.float32), "long": np.arange(5001), "none": None}
  return tree if me == 0 else None

for name, chunk in (("at_once", processes._CHUNK), ("in_parts", 2048)):
  processes._CHUNK = chunk
  sent = processes.first(values)
  said[name] = [sent["odd"].tobytes().hex(), sent["long"].tolist() == [*range(5001)], sent["none"]]
said["first_fails"] = text_of(processes.first, stop, "no folder")
said["nobody_fails"] = processes.together(stop, "no data", 2)
said["one_fails"] = text_of(processes.together, stop, "no data", 1)
said["all_fail"] = text_of(processes.together, stop, "no data")
said["equal"] = text_of(processes.check_equal, "the data", {"images": 3})
said["unequal"] = text_of(processes.check_equal, "the data", {"images": 3 + me})
log = processes.writer(open, "log.txt", "w")
log.write("text")
log.close()
with processes.first_prints():
  print(f"printed by {me}", flush=True)

warnings.simplefilter("error")
step = parallel.data_parallel(
  lambda state, batch: (
    jax.tree.map(lambda leaf: leaf + jax.lax.pmean(batch["x"].sum(), parallel.AXIS), state),
    {},
  ),
  donate=True,
)
parallel._REORDERING = ("cpu",)  # kernels lie in a different order, as on GPUs
held = parallel.place({"kernel": np.ones((1, 1, 3, 2), np.float32)})
for _ in range(2):
  new, _ = step(held, parallel.split({"x": np.arange(4, dtype=np.float32) + 4 * me}))
  assert held["kernel"].is_deleted()
  held = new
said["order"] = held["kernel"].format.layout.major_to_minor
said["copies"] = [np.asarray(shard.data).tolist() for shard in held["kernel"].addressable_shards]
parallel._REORDERING = ()
said["shard"] = parallel.shard()

said["step"] = tiny.one_step_with_everything(parallel.shard())

config = tiny.config(sys.argv[1], seed=me)  # which is right in the first process only
workdir = sys.argv[2] if me == 0 else "nowhere"
said["evaluated"] = training.evaluate(config, workdir, deploy=True)
said["recalibrated"] = training.recalibrate(config, workdir, num_batches=3)
Path("said.json").write_text(json.dumps(said))

with processes.leave_at_once():
  if me == 1:
    Path("leaving").touch()
    raise InputError("a file is damaged")
  while not Path("../second/leaving").exists():
    time.sleep(0.1)
  time.sleep(3)  # more than the other needs, unless it waits for this one
  os._exit(0)
"""


@pytest.fixture(scope="module")
def two(digits_dir, cache_home, finished, tmp_path_factory):
  """The values that two processes have written, how they ended, their folders and the workdir."""
  home = tmp_path_factory.mktemp("talk")
  folders = [home / "first", home / "second"]
  for folder in folders:
    folder.mkdir()
  (home / "program.py").write_text(PROGRAM)
  workdir = shutil.copytree(finished[0], home / "run")
  program = (home / "program.py", digits_dir, workdir)
  ended = cluster.run(*program, folders=folders, cache=cache_home)
  assert (folders[1] / "said.json").exists(), ended[0].stderr + ended[1].stderr
  said = [json.loads((folder / "said.json").read_text()) for folder in folders]
  return said, ended, folders, workdir


@pytest.mark.parametrize("name", ["at_once", "in_parts"])
def test_what_the_first_process_read_reaches_all_bit_for_bit(two, name):
  said, _, folders, _ = two
  odd = np.array([-0.0, np.nan, 1e-45], np.float32).tobytes().hex()
  assert [each[name] for each in said] == [[odd, True, None]] * 2
  assert [(folder / "called").exists() for folder in folders] == [True, False]


def test_an_error_is_raised_in_all_processes(two):
  said = two[0]
  assert [each["first_fails"] for each in said] == ["no folder"] * 2
  assert [each["one_fails"] for each in said] == ["process 1 of 2: no data"] * 2
  assert [each["all_fail"] for each in said] == ["no data"] * 2
  assert [each["nobody_fails"] for each in said] == [0, 1]


def test_processes_with_other_data_are_refused(two):
  said = two[0]
  assert [each["equal"] for each in said] == [None, None]
  assert said[0]["unequal"] == said[1]["unequal"]
  assert said[0]["unequal"].startswith(
    "process 1 of 2: the data differs from that of the first process: {'images': 4} here, "
    "{'images': 3} there; start all processes by the same command"
  )


def test_one_process_writes_and_prints(two):
  _, ended, folders, _ = two
  assert (folders[0] / "log.txt").read_text() == "text"
  assert not (folders[1] / "log.txt").exists()
  assert "printed by 0" in ended[0].stdout
  assert "printed by" not in ended[1].stdout


def test_a_donated_state_is_the_same_on_every_device_of_every_process(two):
  for index, said in enumerate(two[0]):
    assert said["copies"] == [[[[[1 + 2 * sum(range(8)) / 4] * 2] * 3]]] * 2
    assert said["order"] == [3, 0, 1, 2]
    assert said["shard"] == [index, 2]


@pytest.mark.usefixtures("quick_programs")
def test_dropout_mixing_and_shared_statistics_are_those_of_one_process(two):
  first, second = (said["step"] for said in two[0])
  assert first == second
  alone = tiny.one_step_with_everything((0, 1))
  assert first.keys() == alone.keys()
  assert len(alone) > 20
  for name, value in alone.items():
    assert first[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


@pytest.mark.usefixtures("quick_programs")
def test_statistics_and_evaluation_are_those_of_one_process(two, finished, digits_dir, tmp_path):
  said, _, folders, workdir = two
  alone = shutil.copytree(finished[0], tmp_path / "run")
  config = tiny.config(digits_dir)
  evaluated = training.evaluate(config, alone, deploy=True)
  record = training.recalibrate(config, alone, num_batches=3)
  for name, value in (("evaluated", evaluated), ("recalibrated", record)):
    assert said[0][name] == said[1][name]
    assert said[0][name]["loss"] == pytest.approx(value["loss"], rel=1e-5)
    assert said[0][name]["accuracy"] == value["accuracy"]
  shapes = training_shapes(alone)["batch_stats"]
  ours, theirs = (
    trees.read_tree(folder / "recalibrated" / "batch_stats", shapes) for folder in (workdir, alone)
  )
  for value, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
    np.testing.assert_allclose(value, other, rtol=1e-4, atol=1e-6)
  assert not (folders[1] / "nowhere").exists()


def training_shapes(workdir):
  return repjax.ModelSpec.read(workdir).variable_shapes()


def test_a_process_that_fails_alone_says_why_and_does_not_wait(two):
  ended = two[1]
  assert [each.returncode for each in ended] == [0, 1]
  assert "error: process 1 of 2: a file is damaged" in ended[1].stderr
  assert "Traceback" not in ended[1].stderr


@pytest.mark.parametrize(("stop", "status"), [(Preempted, 0), (Stopped, 130)])
def test_a_stop_that_no_other_process_knows_of_ends_this_one_alone(
  monkeypatch, capsys, stop, status
):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(processes.os, "_exit", sys.exit)
  with pytest.raises(SystemExit) as ended, processes.leave_at_once():
    raise stop()
  assert ended.value.code == status
  assert "process 0 of 2 was stopped; the same command" in capsys.readouterr().err
  with pytest.raises(stop), processes.leave_at_once():
    raise stop(agreed=True)


def test_where_there_is_one_process_nothing_changes(tmp_path, capsys):
  def stop():
    raise InputError("no")

  assert processes.is_first()
  assert processes.first(max, 1, 2) == processes.together(max, 1, 2) == 2
  for call in (processes.first, processes.together):
    with pytest.raises(InputError) as caught, processes.leave_at_once():
      call(stop)
    assert type(caught.value) is InputError
  processes.check_equal("the data", object())
  with processes.writer(open, tmp_path / "log.txt", "w") as log, processes.first_prints():
    print("text", file=log)
    print("shown")
  assert (tmp_path / "log.txt").read_text() == "text\n"
  assert capsys.readouterr().out == "shown\n"


@pytest.fixture
def environment(monkeypatch):
  """Sets the variables of a cluster, of which there are none otherwise."""
  names = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")
  for name in names:
    monkeypatch.delenv(f"JAX_{name}", raising=False)

  def set_to(*values):
    for name, value in zip(names, values):
      monkeypatch.setenv(f"JAX_{name}", value)

  return set_to


@pytest.mark.parametrize(
  ("values", "message"),
  [
    (("machine", "2", "0"), "JAX_COORDINATOR_ADDRESS is HOST:PORT, got machine. On two machines,"),
    (("machine:", "2", "0"), "JAX_COORDINATOR_ADDRESS is HOST:PORT, got machine:. On two"),
    (("machine:1", "two", "0"), "JAX_NUM_PROCESSES takes a number, got 'two'. On two machines,"),
    (("machine:1", "2" * 5000, "0"), "JAX_NUM_PROCESSES takes a number, got '222"),
    (("machine:1", "2", "-1"), "JAX_PROCESS_ID takes a number, got '-1'. On two machines,"),
    (
      ("machine:1", "2", "2"),
      "JAX_PROCESS_ID numbers the processes from 0 to one less than",
    ),
    (
      ("machine:1", "0", "0"),
      "JAX_NUM_PROCESSES counts processes, at least 1; got 0. On",
    ),
  ],
  ids=str,
)
def test_a_variable_that_cannot_be_is_named(environment, values, message):
  environment(*values)
  with pytest.raises(InputError) as caught:
    processes.initialize()
  assert str(caught.value).startswith(message)


def test_without_a_cluster_what_is_missing_is_named(cache_home, tmp_path):
  program = tmp_path / "program.py"
  program.write_text(
    "import os\nfrom repjax.errors import one_paragraph\nfrom repjax.training import processes\n"
    "with one_paragraph():\n  processes.initialize(num_processes=2)\n"
  )
  ended = tiny.run_python(str(program), cwd=tmp_path, cache=cache_home)
  assert ended.returncode == 1
  assert ended.stderr.startswith(
    "error: no cluster was found that says who the other processes are, and "
    "JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID are not set. On two machines, put"
  )


def test_what_else_jax_says_is_one_paragraph(environment, monkeypatch):
  def start(*arguments, **keywords):
    raise RuntimeError("UNKNOWN: Failed to\n start RPC server")

  monkeypatch.setattr(jax.distributed, "initialize", start)
  environment("localhost:1234", "1", "0")
  monkeypatch.setattr(processes.joining, "meet", lambda *arguments: None)
  with pytest.raises(InputError, match="joined: UNKNOWN: Failed to start RPC"):
    processes.initialize()


def test_arguments_win_over_the_environment(environment, monkeypatch):
  calls, met = [], []
  monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append(a))
  monkeypatch.setattr(processes.joining, "meet", lambda address, *a: met.append((address.text, *a)))
  environment("machine:1234", "4", "3")
  processes.initialize()
  processes.initialize("other:5678", 2, 0)
  assert calls == [("machine:1234", 4, 3), ("other:5678", 2, 0)]
  assert [each[:3] for each in met] == calls


def test_processes_with_different_numbers_of_devices_are_refused(environment, monkeypatch):
  monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: None)
  monkeypatch.setattr(processes.joining, "meet", lambda *arguments: None)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(jax, "local_devices", lambda process: [0] * (4 - process))
  environment("machine:1234", "2", "0")
  with pytest.raises(InputError, match="different numbers of devices: process 0 has 4 of 4; start"):
    processes.initialize()
