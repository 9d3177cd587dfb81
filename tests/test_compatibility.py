"""Tests that variable trees, runs and imports of earlier versions stay readable.

`goldens/trees.json.gz` lists every variable of every model as the version before the base classes
had them. Of families that came later, `goldens/small_trees.json.gz` lists a small network.
`fixtures/*.tar.gz` are small folders that the first of these versions wrote, each with the logits
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
from tests.models.families import small

pytest_plugins = ["tests.training.fixtures"]

FIXTURES = Path(__file__).parent / "fixtures"
SMALL_TREES = json.loads(gzip.decompress((helpers.GOLDENS / "small_trees.json.gz").read_bytes()))
TREES = json.loads(gzip.decompress((helpers.GOLDENS / "trees.json.gz").read_bytes()))


def test_every_model_or_its_family_has_a_stored_tree():
  stored = {type(repjax.create_model(name)) for name in SMALL_TREES}
  rest = set(repjax.list_models()) - TREES.keys()
  assert {type(repjax.create_model(name)) for name in rest} == stored


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


@pytest.mark.parametrize("name", SMALL_TREES)
def test_paths_shapes_and_dtypes_are_those_of_the_stored_small_tree(name):
  assert described(small(name), small(name, deploy=True)) == SMALL_TREES[name]


def described(*forms):
  """Describes the variables of the training form and of the deploy form of a network."""
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
  trees = [helpers.leaves(helpers.init_shapes(form, images)) for form in forms]
  return {
    form: {path: f"{leaf.dtype.name}{list(leaf.shape)}" for path, leaf in tree.items()}
    for form, tree in zip(("train", "deploy"), trees)
  }


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
