"""Tests that variable trees, runs and imports of earlier versions stay readable.

`goldens/trees.json.gz` lists every variable of every model as the version before the base classes
had them. `fixtures/*.tar.gz` are small folders that the same version wrote, each with the logits
that it computed from them.
"""

import contextlib
import gzip
import json
import re
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

import repjax
from repjax import runs, training
from repjax.config import default
from repjax.training import run
from tests import helpers

pytest_plugins = ["tests.training.fixtures"]

FIXTURES = Path(__file__).parent / "fixtures"
TREES = json.loads(gzip.decompress((helpers.GOLDENS / "trees.json.gz").read_bytes()))


def test_every_model_has_a_stored_tree():
  assert sorted(TREES) == repjax.list_models()


def kinds():
  """Returns the model with the fewest variables of those whose scopes have the same names."""
  smallest = {}
  for name in sorted(TREES, key=lambda name: -len(TREES[name]["train"])):
    smallest[frozenset(re.sub(r"\d+", "", path) for path in TREES[name]["train"])] = name
  return smallest.values()


@pytest.mark.parametrize("name", helpers.spread(TREES, kinds()))
def test_paths_shapes_and_dtypes_are_those_of_the_stored_tree(name):
  spec = repjax.ModelSpec.usual(name, num_classes=10 if "cifar" in name else 1000)
  for form, stored in TREES[name].items():
    found = helpers.leaves(spec.variable_shapes(deploy=form == "deploy"))
    described = {path: f"{leaf.dtype.name}{list(leaf.shape)}" for path, leaf in found.items()}
    assert described == stored


@pytest.fixture
def unpack(tmp_path):
  """Unpacks a stored folder; returns its path, the images and the logits by form."""

  def unpacked(name):
    with tarfile.open(FIXTURES / f"{name}.tar.gz") as archive:
      archive.extractall(tmp_path, filter="data")
    expected = dict(np.load(FIXTURES / f"{name}.npz"))
    return tmp_path / name, expected.pop("images"), expected

  return unpacked


@pytest.mark.parametrize("name", ["run", "imported"])
def test_a_stored_folder_loads_and_computes_the_stored_logits(unpack, name):
  folder, images, expected = unpack(name)
  for form, logits in expected.items():
    model, variables, spec = repjax.load(folder, deploy=form == "deploy")
    found = jax.jit(model.apply)(variables, spec.preprocessing.normalize(images))
    helpers.assert_close(found, logits, 1e-5)


def test_a_stored_run_continues_from_its_last_step(unpack, digits_dir):
  folder, _, _ = unpack("run")
  # The command that began the run has every field of today; the run's own file lacks newer ones.
  config = default()
  config.update(training.read_config(folder, data_dir=str(digits_dir)))
  with contextlib.ExitStack() as held:
    prepared = run.prepare(config, folder, "must", held)
  assert int(prepared.state.step) == prepared.plan.total_steps
  assert prepared.bookmark.evaluated
  assert prepared.bookmark.records == len((folder / "metrics.jsonl").read_text().splitlines())
  assert runs.all_finite(prepared.state)
