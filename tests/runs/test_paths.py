"""The files of a workdir have their names from `repjax.runs` alone."""

import ast
from pathlib import Path

import pytest

from repjax import runs

PACKAGE = Path(runs.__file__).parents[1]
NAMES = {
  path(Path("run")).name
  for path in (
    *(runs.config_file, runs.model_file, runs.data_file, runs.import_file, runs.rounding_file),
    *(runs.metrics_file, runs.timing_file, runs.tensorboard_folder, runs.picture_file),
    *(runs.checkpoints_folder, runs.damaged_folder, runs.recalibrated_folder, runs.lock_file),
    *(runs.deploy_folder, runs.int8_folder),
  )
}


def joined(source):
  """Returns every string that a program joins to a path by a slash."""
  return {
    node.right.value
    for node in ast.walk(ast.parse(source))
    if isinstance(node, ast.BinOp)
    and isinstance(node.op, ast.Div)
    and isinstance(node.right, ast.Constant)
  }


def test_a_joined_name_is_found():
  assert joined('(workdir / "deploy").exists() or workdir / name / "int8"') == {"deploy", "int8"}


@pytest.mark.parametrize(
  "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_no_other_room_spells_the_name_of_a_file_in_a_workdir(path):
  if path.is_relative_to(PACKAGE / "runs"):
    return
  assert not joined(path.read_text()) & NAMES


def test_a_deploy_form_is_found_in_a_workdir_in_its_folder_and_while_it_is_replaced(tmp_path):
  assert runs.find_deploy(tmp_path) is None
  (tmp_path / "deploy" / "params").mkdir(parents=True)
  assert runs.find_deploy(tmp_path) == tmp_path / "deploy"
  assert runs.find_deploy(tmp_path / "deploy") == tmp_path / "deploy"
  (tmp_path / "deploy").rename(tmp_path / "deploy.old")
  assert runs.find_deploy(tmp_path) == tmp_path / "deploy.old"
