"""The packages that `pip` installs are those that repjax imports, and errors name the extras."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

import repjax
from repjax import cli, extras

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Packages that a package of the list brings for certain, and names for `import` that differ.
BROUGHT = {"jaxlib": "jax", "scipy": "jax", "ml_dtypes": "jax", "google_crc32c": "google-crc32c"}
BROUGHT |= {"orbax": "orbax-checkpoint", "tensorflow": None, "openvino": None, "kubernetes": None}


def names(requirements):
  """Returns the packages that requirements name, and those of extras of repjax that they name."""
  found = set()
  for requirement in requirements:
    name, _, inside = re.match(r"([\w-]+)(\[([\w,-]+)\])?", requirement).groups()
    if name == "repjax":
      found |= set().union(*(names(EXTRAS[extra]) for extra in inside.split(",")))
    else:
      found.add(name)
  return found


def imports():
  """Returns the packages outside the standard library that files of repjax import anywhere."""
  found = set()
  for path in [*(ROOT / "repjax").rglob("*.py"), *(ROOT / "configs").glob("*.py")]:
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        found |= {alias.name.split(".")[0] for alias in node.names}
      elif isinstance(node, ast.ImportFrom) and not node.level:
        found.add(node.module.split(".")[0])
  return found - sys.stdlib_module_names - {"repjax"}


def test_every_import_is_a_dependency_or_of_an_extra():
  core = names(PROJECT["dependencies"])
  for module in imports() - {"google"}:
    package = extras.PACKAGES.get(module)
    assert package or BROUGHT.get(module, module) in core | {None}, module


@pytest.mark.parametrize("module", extras.PACKAGES)
def test_the_extra_that_an_error_names_brings_the_package(module):
  package = extras.PACKAGES[module]
  assert package.name in names(EXTRAS[package.extra])
  assert package.name not in names(PROJECT["dependencies"])


@pytest.mark.parametrize("command", cli._EXTRAS)
def test_extras_of_commands_exist(command):
  assert command in cli.COMMANDS
  assert set(cli._EXTRAS[command].split(",")) <= EXTRAS.keys()


def test_all_brings_what_every_extra_for_users_brings():
  users = EXTRAS.keys() - {"bench", "cuda", "dev", "dev-torch", "docs", "libraries", "photographs"}
  for extra in users:
    assert names(EXTRAS[extra]) <= names(EXTRAS["all"]), extra
  assert names(EXTRAS["all"]) <= names(EXTRAS["dev"])


def test_requirements_txt_brings_what_training_needs():
  lines = (ROOT / "requirements.txt").read_text().splitlines()
  listed = {re.match(r"[\w-]+", line)[0].replace("_", "-") for line in lines if line[:1].isalpha()}
  needed = names(EXTRAS["train"]) | names(PROJECT["dependencies"])
  # jax brings NumPy and flax brings Orbax; the file need not say so.
  assert {name.replace("_", "-") for name in needed} - listed <= {"numpy", "flatbuffers"}


def test_the_citation_has_the_version():
  assert f"\nversion: {repjax.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_a_missing_package_is_one_line_with_the_extra(monkeypatch):
  find = extras.importlib.util.find_spec
  monkeypatch.setattr(
    "importlib.util.find_spec", lambda name: None if name == "grain" else find(name)
  )
  with pytest.raises(extras.MissingPackageError, match=r"for batches, .* 'repjax\[train\]'") as it:
    extras.need("grain", "batches")
  assert "\n" not in str(it.value)


def missing(name):
  """Returns the error of an import of a package that is not installed."""
  return ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_an_import_that_fails_is_explained_if_the_package_is_of_an_extra(monkeypatch):
  find = extras.importlib.util.find_spec
  monkeypatch.setattr(
    "importlib.util.find_spec", lambda name: None if name == "grain" else find(name)
  )
  with (
    pytest.raises(extras.MissingPackageError, match=r"grain .*'repjax\[train,onnx\]'"),
    extras.explained("x", "train,onnx"),
  ):
    raise missing("grain.python")
  for name in ("tensorflow", "optax.gone"):  # not of an extra; installed, and broken
    with pytest.raises(ModuleNotFoundError, match=name), extras.explained("x"):
      raise missing(name)


def test_a_command_without_its_packages_names_the_extra(monkeypatch):
  find = extras.importlib.util.find_spec
  monkeypatch.setattr(
    "importlib.util.find_spec", lambda name: None if name == "grain" else find(name)
  )

  def load(name):
    raise missing("grain")

  monkeypatch.setattr(cli.importlib, "import_module", load)
  with pytest.raises(SystemExit, match=r"^error: for `repjax train`, .*'repjax\[train\]'$"):
    cli.main(["train", "--config", "digits"])
