"""Who may import whom, and what `import repjax` costs."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "repjax"

# A room is a file or a folder of the package. Anyone may import the leaves.
LEAVES = {"cache", "disk", "errors", "store"}
MAY_IMPORT = {
  "cache": set(),
  "errors": set(),
  "disk": set(),
  "store": set(),
  "algebra": set(),
  "layers": {"algebra"},
  "reparam": {"layers"},
  "models": {"layers"},
  "spec": {"models", "reparam"},
  "analysis": {"models", "reparam", "spec"},
  "weights": {"models", "reparam", "spec"},
  "deploy": {"algebra", "data", "models", "reparam", "spec"},
  "training": {"algebra", "data", "deploy", "models", "reparam", "spec"},
  "data": set(),
}
# Other people's packages that a room keeps to, or stays clear of.
ONLY = {"algebra": {"jax"}, "errors": set()}
NEVER = {"data": {"jax", "jaxlib", "flax"}}


def imported(source, module):
  """Dotted names of everything a module ("repjax.data.__init__") imports, inside functions too."""
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
  """The names' rooms ("" for what the package itself offers), and other people's packages."""
  rooms = {name.split(".")[1] if "." in name else "" for name in names if in_repjax(name)}
  packages = {name.split(".")[0] for name in names if not in_repjax(name)}
  return {room if room in MAY_IMPORT else "" for room in rooms}, packages - sys.stdlib_module_names


def in_repjax(name):
  return name.split(".")[0] == "repjax"


FILES = sorted(PACKAGE.rglob("*.py"))
FILES.remove(PACKAGE / "__init__.py")


def room_of(path):
  return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_room_has_a_rule():
  rooms = {room_of(path) for path in FILES}
  assert {"algebra", "layers", "reparam", "models", "errors"} <= rooms
  assert rooms <= MAY_IMPORT.keys(), "a new room: say above what it may import"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
  room = room_of(path)
  module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
  rooms, packages = rooms_and_packages(imported(path.read_text(), module))
  assert rooms - LEAVES - {room} <= MAY_IMPORT[room]
  assert packages <= ONLY.get(room, packages)
  assert not packages & NEVER.get(room, set())


@pytest.mark.parametrize(
  ("source", "rooms", "packages"),
  [
    ("import os, jax.numpy as jnp", set(), {"jax"}),
    ("from repjax.layers.linear import linear", {"layers"}, set()),
    ("from repjax import layers, store", {"layers", "store"}, set()),
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
  assert rooms_and_packages(imported(source, "repjax.training.loop")) == (rooms, packages)


def run(program):
  return subprocess.run(
    [sys.executable, "-c", program],
    cwd=PACKAGE.parent,
    check=True,
    capture_output=True,
    text=True,
  ).stdout.split()


def test_importing_repjax_loads_nothing_beyond_jax_and_linen():
  loaded = run(
    "import sys, jax, flax.linen; before = set(sys.modules); import repjax;"
    "print(*set(sys.modules) - before)"
  )
  assert "repjax.reparam" in loaded
  rooms = {name.split(".")[1] for name in loaded if name.startswith("repjax.")}
  assert not rooms & {"analysis", "data", "deploy", "training", "weights"}
  others = {name for name in loaded if name.split(".")[0] not in sys.stdlib_module_names}
  assert {name for name in others if name.split(".")[0] != "repjax"} == set()


def test_importing_repjax_starts_no_backend():
  # Once a backend runs, the number of devices can no longer be set.
  devices = run(
    "import repjax, jax; jax.config.update('jax_platforms', 'cpu');"
    "jax.config.update('jax_num_cpu_devices', 3); print(jax.device_count())"
  )
  assert devices == ["3"]
