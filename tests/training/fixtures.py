"""What is made once a session: the digits on disk, compiled programs and a finished run."""

import contextlib
import gc
import io
import os
import runpy
import shutil

import jax.numpy as jnp
import pytest

import repjax
from repjax import training
from repjax.data import open_source
from repjax.training import optimizer
from repjax.training.checkpoint import CheckpointWriter
from repjax.training.step import create_state
from tests.helpers import randomise
from tests.training import tiny


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
  """A TFDS folder that holds the digits."""
  folder = tmp_path_factory.mktemp("tfds")
  with contextlib.redirect_stdout(io.StringIO()):
    open_source("digits", "train", data_dir=str(folder))
  return folder


@pytest.fixture(scope="session")
def cache_home(tmp_path_factory):
  """What XDG_CACHE_HOME is for programs that tests start: one folder for all of xdist's workers."""
  base = tmp_path_factory.getbasetemp()
  home = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
  home.mkdir(exist_ok=True)
  return home


@pytest.fixture
def quick_programs(cache_home):
  """See `tiny.quick_programs`."""
  with tiny.quick_programs(cache_home / "repjax" / "xla"):
    yield


@pytest.fixture
def no_leftovers():
  """Collects the reads that Orbax gives up, each with a warning, when one of them fails."""
  yield
  gc.collect()


@pytest.fixture(scope="session")
def finished(digits_dir, cache_home, tmp_path_factory):
  """The workdir of a finished run, which no test may change, with what it printed and returned."""
  workdir = tmp_path_factory.mktemp("runs") / "finished"
  printed = io.StringIO()
  with (
    tiny.quick_programs(cache_home / "repjax" / "xla"),
    contextlib.redirect_stdout(printed),
  ):
    report = training.train(tiny.config(digits_dir), workdir)
  return workdir, report, printed.getvalue()


@pytest.fixture(scope="session")
def averaged(digits_dir, cache_home, tmp_path_factory):
  """The workdir of a finished run that averages its variables, and its report; not to change."""
  workdir = tmp_path_factory.mktemp("runs") / "averaged"
  with tiny.quick_programs(cache_home / "repjax" / "xla"):
    report = training.train(tiny.averaging(digits_dir), workdir)
  return workdir, report


@pytest.fixture
def overtrained(finished, tmp_path):
  """A copy of the finished run, with a checkpoint of step 20 that is newer, worse and other."""
  workdir = shutil.copytree(finished[0], tmp_path / "overtrained")
  variables = randomise(repjax.ModelSpec.read(workdir).variable_shapes())
  sgd = optimizer.sgd(lambda step: 0.1, momentum=0.9, nesterov=False, weight_decay=1e-4)
  writer = CheckpointWriter(workdir)
  writer.save(create_state(variables, sgd).replace(step=jnp.asarray(20)), accuracy=0.0)
  writer.close()
  return workdir


@pytest.fixture
def run_script(monkeypatch, capsys):
  """Runs a script in this process; what it printed, or the text it ended with."""

  def run(name, *arguments):
    path = str(tiny.ROOT / "scripts" / f"{name}.py")
    monkeypatch.setattr("sys.argv", [path, *map(str, arguments)])
    capsys.readouterr()
    runpy.run_path(path, run_name="__main__")
    return capsys.readouterr().out

  return run
