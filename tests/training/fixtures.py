"""Fixtures made once a session: the digits on disk, compiled programs, finished runs."""

import contextlib
import fcntl
import gc
import io
import json
import os
import runpy
import shutil

import jax.numpy as jnp
import pytest

import repjax
from repjax import cli, training
from repjax.data import open_source
from repjax.runs import CheckpointWriter
from repjax.training import optimizer
from repjax.training.state import create_state, to_items
from tests.helpers import randomise
from tests.training import tiny


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
  """A folder of the session that all workers of xdist share."""
  base = tmp_path_factory.getbasetemp()
  folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
  folder.mkdir(exist_ok=True)
  return folder


@contextlib.contextmanager
def made_once(folder):
  """Yields True to the first worker, which makes a folder; the others wait and get False."""
  made = folder.with_suffix(".made")
  with open(f"{folder}.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield not made.exists()
    made.touch()


@pytest.fixture(scope="session")
def digits_dir(shared_folder):
  """A TFDS folder that holds the digits."""
  folder = shared_folder / "tfds"
  with made_once(folder) as is_first, contextlib.redirect_stdout(io.StringIO()):
    if is_first:
      open_source("digits", "train", data_dir=str(folder))
  return folder


@pytest.fixture(scope="session")
def cache_home(shared_folder):
  """The value of XDG_CACHE_HOME for programs that tests start."""
  home = shared_folder / "cache"
  home.mkdir(exist_ok=True)
  return home


@pytest.fixture
def quick_programs(cache_home):
  """Compiles fast rather than well, see `tiny.quick_programs`."""
  with tiny.quick_programs(cache_home / "repjax" / "xla"):
    yield


@pytest.fixture
def no_leftovers():
  """Collects the reads that Orbax gives up, each with a warning, when one of them fails."""
  with tiny.quick_collection():
    yield
    gc.collect()


def run_once(config, workdir, cache_home):
  """Trains in a workdir unless a worker has; returns the report and the printed text."""
  kept = workdir.with_suffix(".json")
  with made_once(workdir) as is_first:
    if is_first:
      printed = io.StringIO()
      with (
        tiny.quick_programs(cache_home / "repjax" / "xla"),
        contextlib.redirect_stdout(printed),
      ):
        report = training.train(config, workdir)
      kept.write_text(json.dumps([report, printed.getvalue()]))
    report, printed = json.loads(kept.read_text())
  return report, printed


@pytest.fixture(scope="session")
def finished(digits_dir, cache_home, shared_folder):
  """The workdir of a finished run, which no test may change, its report and its printed text."""
  workdir = shared_folder / "finished"
  return workdir, *run_once(tiny.config(digits_dir), workdir, cache_home)


@pytest.fixture(scope="session")
def averaged(digits_dir, cache_home, shared_folder):
  """The workdir of a finished run that averages its variables, and its report; do not change it."""
  workdir = shared_folder / "averaged"
  return workdir, run_once(tiny.averaging(digits_dir), workdir, cache_home)[0]


@pytest.fixture(scope="session")
def segmented(cache_home, shared_folder):
  """The workdir of a finished run of segmentation, and its report; do not change it."""
  workdir = shared_folder / "segmented"
  return workdir, run_once(tiny.segmentation(), workdir, cache_home)[0]


@pytest.fixture
def overtrained(finished, tmp_path):
  """A copy of the finished run, with a newer and worse checkpoint of step 20."""
  workdir = shutil.copytree(finished[0], tmp_path / "overtrained")
  variables = randomise(repjax.ModelSpec.read(workdir).variable_shapes())
  sgd = optimizer.sgd(lambda step: 0.1, momentum=0.9, nesterov=False, weight_decay=1e-4)
  writer = CheckpointWriter(workdir)
  state = create_state(variables, sgd).replace(step=jnp.asarray(20))
  writer.save(20, to_items(state), score=0.0)
  writer.close()
  return workdir


@pytest.fixture
def run_script(monkeypatch, capsys):
  """Runs a program of benchmarks/ or scripts/ in this process, and returns what it printed."""

  def run(path, *arguments):
    path = tiny.ROOT / path
    monkeypatch.setattr("sys.argv", [str(path), *map(str, arguments)])
    monkeypatch.syspath_prepend(path.parent)  # as Python does when it runs a program
    capsys.readouterr()
    runpy.run_path(str(path), run_name="__main__")
    return capsys.readouterr().out

  return run


@pytest.fixture
def run_command(capsys):
  """Runs `repjax COMMAND` in this process, and returns what it printed."""

  def run(*arguments):
    capsys.readouterr()
    cli.main([str(argument) for argument in arguments])
    return capsys.readouterr().out

  return run
