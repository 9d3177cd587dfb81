"""What tests of inference share: a small model, its folder, and plans that are not measured."""

import importlib

import jax
import numpy as np
import pytest

import repjax
from repjax import disk
from tests.deploy.tiny import SPEC
from tests.helpers import halves, random_input, random_variables
from tests.training import tiny


@pytest.fixture(scope="session")
def small():
  """A small model in training form with gates and heads, and random variables."""
  model = SPEC.create_model()
  return model, random_variables(model, random_input(1, 16, 16, 3).astype(np.float32))


@pytest.fixture(scope="session")
def small_folder(small, tmp_path_factory):
  """The small model's deploy folder, which no test may change."""
  folder = tmp_path_factory.mktemp("small") / "deploy"
  params = jax.jit(repjax.reparameterize)(*halves(small[1]))
  disk.write_tree(folder / "params", params)
  SPEC.write(folder)
  return folder


@pytest.fixture(scope="module")
def quickly(cache_home):
  """`tiny.quick_programs` for what a module's tests share."""
  with tiny.quick_programs(cache_home / "repjax" / "xla"):
    yield


@pytest.fixture
def fastest(monkeypatch):
  """Makes batches run on so many devices, whatever is faster."""
  devices = importlib.import_module("repjax.deploy.devices")

  def choose(count):
    def measured(programs, batch):
      del batch
      return {program.way: float(program.way.devices != count) for program in programs}

    monkeypatch.setattr(devices, "measure", measured)

  return choose
