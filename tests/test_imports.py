"""Tests of which room may import which, and of the packages that `import repjax` loads."""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

import repjax
from repjax import extras

PACKAGE = pathlib.Path(__file__).parents[1] / "repjax"

# A room is a file or a folder of the package. Every room may import the leaves.
LEAVES = {
  *("cache", "devices", "disk", "errors", "extras", "json_files", "names", "output"),
  *("regular_files", "runs", "saving", "schema", "signals", "timing", "trees", "xla"),
}
# Each room, and the rooms besides the leaves that it may import.
MAY_IMPORT = {
  **{leaf: set() for leaf in LEAVES},
  "runs": {"config"},
  "algebra": set(),
  "program": set(),
  "fusion": {"algebra", "program"},
  "functions": {"fusion", "program"},
  "layers": {"algebra"},
  "nnx": {"layers"},
  "recognition": {"layers"},
  "reparam": {"layers", "recognition"},
  "models": {"layers"},
  "segmentation": {"layers", "models"},
  "expansion": {"algebra", "layers", "models", "recognition", "reparam"},
  "spec": {"models", "reparam"},
  "pretrained": {"reparam", "spec", "weights"},
  "analysis": {"functions", "fusion", "layers", "models", "program", "spec"},
  "weights": {"config", "models", "recognition", "reparam", "spec"},
  "inference": {"functions", "fusion", "models", "program", "recognition", "reparam", "spec"},
  "onnx": {"functions", "inference", "layers", "program", "spec"},
  "quantization": {"algebra", "functions", "inference", "onnx", "program"},
  "web": {"spec"},
  "deploy": {
    *("algebra", "data", "functions", "inference", "models", "onnx", "pretrained", "program"),
    *("spec", "web"),
  },
  "report": {"data", "deploy", "layers", "recognition", "spec"},
  "config": set(),
  "configs": {"config"},
  "training": {
    *("algebra", "config", "data", "deploy", "inference", "models", "onnx", "quantization"),
    *("expansion", "layers", "recognition", "reparam", "report", "spec", "weights"),
  },
  "data": set(),
}
ANYTHING = {"__main__", "cli"}  # may import every room
# Leaves that a room may not import: these import jax, which a process that reads images must not.
NOT_LEAVES = {"data": {"cache", "runs", "trees", "xla"}}
# Packages outside the standard library: all that a room may import, and those that it may not.
ONLY = {
  "algebra": {"jax"},
  **{leaf: set() for leaf in ("devices", "errors", "extras", "json_files", "names", "output")},
  **{leaf: set() for leaf in ("regular_files", "schema", "signals", "timing")},
}
NEVER = {"data": {"jax", "jaxlib", "flax"}}


def imported(source, module):
  """Returns the dotted names of everything that a module imports, also inside functions.

  Args:
    source: source code of the module.
    module: dotted name of the module, for example "repjax.data.__init__".
  """
  names = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      above = module.split(".")[: -node.level] if node.level else []
      origin = ".".join([*above, *([node.module] if node.module else [])])
      names |= {f"{origin}.{alias.name}" for alias in node.names}
  return names


def rooms_and_packages(names):
  """Returns the rooms of repjax and the packages outside the standard library, by dotted names.

  The room "" stands for the names that repjax itself offers.
  """
  rooms = {name.split(".")[1] if "." in name else "" for name in names if in_repjax(name)}
  packages = {name.split(".")[0] for name in names if not in_repjax(name)}
  known = MAY_IMPORT.keys() | ANYTHING
  return {room if room in known else "" for room in rooms}, packages - sys.stdlib_module_names


def in_repjax(name):
  """Returns whether a dotted name belongs to repjax."""
  return name.split(".")[0] == "repjax"


FILES = sorted(PACKAGE.rglob("*.py"))
FILES.remove(PACKAGE / "__init__.py")


def room_of(path):
  """Returns the room that a file belongs to."""
  return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_room_has_a_rule():
  rooms = {room_of(path) for path in FILES}
  assert {"algebra", "layers", "reparam", "models", "errors"} <= rooms
  assert rooms - ANYTHING <= MAY_IMPORT.keys(), "a new room: add to MAY_IMPORT what it may import"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
  room = room_of(path)
  module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
  rooms, packages = rooms_and_packages(imported(path.read_text(), module))
  assert room in ANYTHING or rooms - {room} <= MAY_IMPORT[room] | LEAVES - NOT_LEAVES.get(
    room, set()
  )
  assert packages <= ONLY.get(room, packages)
  assert not packages & NEVER.get(room, set())


@pytest.mark.parametrize(
  ("source", "rooms", "packages"),
  [
    ("import os, jax.numpy as jnp", set(), {"jax"}),
    ("from repjax.layers.linear import linear", {"layers"}, set()),
    ("from repjax import layers, runs", {"layers", "runs"}, set()),
    ("from repjax import create_model", {""}, set()),
    ("import repjax", {""}, set()),
    ("import repjax.data.pipeline", {"data"}, set()),
    ("def f():\n  from repjax.data import x\n  import flax", {"data"}, {"flax"}),
    ("from . import step", {"training"}, set()),
    ("from .step import x", {"training"}, set()),
    ("from ..layers import x", {"layers"}, set()),
    ("from .. import data", {"data"}, set()),
  ],
)
def test_the_walk_sees_every_way_to_import(source, rooms, packages):
  assert rooms_and_packages(imported(source, "repjax.training.run")) == (rooms, packages)


# Notes which modules are loaded after each step.
PROGRAM = """
import json, sys

loaded = {}

def note(step):
  loaded[step] = [*sys.modules]

import repjax
note("repjax")
import jax, flax.linen
note("jax and linen")
repjax.create_model, repjax.reparameterize, repjax.load
note("names of repjax")
# Once a backend runs, the number of devices can no longer be set.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 3)
devices = jax.device_count()
import repjax.onnx.check
note("inference")
sys.path[:0] = ["benchmarks"]
import inference
note("benchmark")
for room in {*repjax._MODULES} - {"training"}:
  getattr(repjax, room)
note("rooms")
print(json.dumps([loaded, devices]))
"""


@pytest.fixture(scope="module")
def loaded():
  """Returns the modules that a new process has loaded after each step, and its device count."""
  return json.loads(
    subprocess.run(
      [sys.executable, "-c", PROGRAM],
      cwd=PACKAGE.parent,
      check=True,
      capture_output=True,
      text=True,
    ).stdout
  )


def test_importing_repjax_loads_no_other_package(loaded):
  packages = {name.split(".")[0] for name in loaded[0]["repjax"]}
  assert "repjax" in packages
  assert not packages & {"jax", "numpy", "flax"}


def test_the_names_of_repjax_load_nothing_beyond_jax_and_linen(loaded):
  names = {*loaded[0]["names of repjax"]} - {*loaded[0]["jax and linen"]}
  assert "repjax.reparam" in names
  rooms = {name.split(".")[1] for name in names if name.startswith("repjax.")}
  assert not rooms & {"analysis", "data", "deploy", "nnx", "training", "weights"}
  others = {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}
  assert {name for name in others if name.split(".")[0] != "repjax"} == set()
  assert "flax.nnx" not in loaded[0]["names of repjax"]


def test_importing_repjax_starts_no_backend(loaded):
  assert loaded[1] == 3


def test_inference_does_not_import_onnx(loaded):
  names = loaded[0]["inference"]
  assert "repjax.onnx.check" in names
  assert "onnx" not in names


def test_rooms_besides_training_load_no_package_of_an_extra(loaded):
  names = loaded[0]["rooms"]
  assert "repjax.report" in names
  # JAX and Flax load these by themselves where they are installed.
  others = {*extras.PACKAGES} - {"absl", "flatbuffers", "optax"}
  assert {*names} & others == set()


def test_the_benchmark_of_inference_loads_no_package_of_training(loaded):
  names = loaded[0]["benchmark"]
  assert "subjects" in names
  assert not {"optax", "grain", "orbax", "matplotlib"} & {*names}


@pytest.mark.parametrize("name", dir(repjax))
def test_every_name_that_repjax_lists_can_be_loaded(name):
  assert getattr(repjax, name) is not None


def test_a_name_that_repjax_lacks_is_an_attribute_error():
  with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
    _ = repjax.no_such_name
