"""The files of a workdir have their names from `repjax.runs` alone."""

import ast
import inspect
from pathlib import Path

import pytest

from repjax import runs
from repjax.runs import paths

ROOT = Path(runs.__file__).parents[2]
PACKAGE = ROOT / "repjax"
FOLDER = Path("run")
OF_A_STEP = (runs.variables_folder, runs.score_file, runs.bookmark_file)
OF_A_FOLDER = tuple(
  function
  for name, function in inspect.getmembers(paths, inspect.isfunction)
  if list(inspect.signature(function).parameters) in (["workdir"], ["folder"])
  and name != "find_deploy"
)
NAMES = {
  *(path(FOLDER).name for path in OF_A_FOLDER),
  *(path(FOLDER, 0).name for path in OF_A_STEP),
}
FILES = [
  *(path for path in PACKAGE.rglob("*.py") if not path.is_relative_to(PACKAGE / "runs")),
  *(path for folder in ("benchmarks", "scripts") for path in (ROOT / folder).glob("*.py")),
  ROOT / "main.py",
]
JOINS = {"join", "joinpath", "Path", "glob", "rglob", "with_name"}
# Repositories of the Hugging Face hub also have a config.json, with a different content.
# The manifest is a matter of the disk.
ELSEWHERE = {
  PACKAGE / "weights" / "hub.py": {"config.json"},
  PACKAGE / "disk" / "manifest.py": {"manifest.json"},
  ROOT / "scripts" / "fuzz_files.py": {"model.json"},  # the name of a reader
}


def spelt(source):
  """Returns the names of files of a workdir that a program spells.

  The name of a file, with a suffix, is found in any string that holds nothing else. Other names are
  ordinary words too, so they are found only where a program joins a path.
  """
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
      found.add(node.value)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
      found |= parts(node.left) | parts(node.right)
    if isinstance(node, ast.Call):
      called = node.func.attr if isinstance(node.func, ast.Attribute) else None
      called = node.func.id if isinstance(node.func, ast.Name) else called
      if called in JOINS:
        found |= {part for argument in node.args for part in parts(argument)}
  return found & NAMES


def parts(node):
  """Returns the parts of a path that is written as a string."""
  is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
  return set(node.value.split("/")) if is_text else set()


def test_the_names_of_all_files_are_known():
  assert {"config.json", "params", "model.onnx", "report.json", "variables", "int8"} <= NAMES
  assert len(NAMES) >= 25


@pytest.mark.parametrize(
  ("source", "names"),
  [
    ('(workdir / "deploy").exists() or workdir / name / "int8"', {"deploy", "int8"}),
    ('folder.joinpath("params", "model.onnx")', {"params", "model.onnx"}),
    ('Path(folder, "variables"), folder.glob("checkpoints/*.tmp")', {"variables", "checkpoints"}),
    ('folder / "deploy/report.json"', {"deploy", "report.json"}),
    ('{"model.onnx": content}', {"model.onnx"}),
    ('tree["params"], form == "deploy", "writes model.json", 3 / 4', set()),
  ],
)
def test_a_spelt_name_is_found(source, names):
  assert spelt(source) == names


@pytest.mark.parametrize("path", sorted(FILES), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_file_spells_the_name_of_a_file_in_a_workdir(path):
  assert spelt(path.read_text()) <= ELSEWHERE.get(path, set())


def test_a_deploy_form_is_found_in_a_workdir_in_its_folder_and_while_it_is_replaced(tmp_path):
  assert runs.find_deploy(tmp_path) is None
  (tmp_path / "deploy" / "params").mkdir(parents=True)
  assert runs.find_deploy(tmp_path) == tmp_path / "deploy"
  assert runs.find_deploy(tmp_path / "deploy") == tmp_path / "deploy"
  aside = tmp_path / ".deploy.repjax-0123abcd"
  aside.mkdir()
  (tmp_path / "deploy").rename(aside / "old")
  assert runs.find_deploy(tmp_path) == aside / "old"
