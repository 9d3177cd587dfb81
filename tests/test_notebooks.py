"""The notebooks of docs/notebooks hold no output, and run from the first cell to the last."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb"))


def code(notebook):
  """Returns the source of the cells that hold code."""
  cells = json.loads(notebook.read_text())["cells"]
  return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def program(notebook):
  """Returns a notebook as a plain program, which installs nothing."""
  lines = ["import subprocess"]
  for source in code(notebook):
    if source.startswith("%%sh\n"):
      command = source.removeprefix("%%sh\n")
      lines.append(f"subprocess.run(['bash', '-e', '-c', {command!r}], check=True)")
    elif not source.startswith("%pip "):
      lines.append(source)
  return "\n".join(lines)


def test_there_are_two_notebooks():
  assert [path.stem for path in NOTEBOOKS] == ["convert", "photographs"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stripped_and_can_be_read(notebook):
  content = json.loads(notebook.read_text())
  assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
  for cell in content["cells"]:
    assert not cell.get("outputs")
    assert cell.get("execution_count") is None
  compile(program(notebook), notebook.name, "exec")


@pytest.mark.proof  # minutes: they train and compile networks
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(notebook, tmp_path):
  path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
  environment = {**os.environ, "PATH": path, "MPLBACKEND": "Agg", "HOME": str(tmp_path)}
  command = [sys.executable, "-c", program(notebook)]
  subprocess.run(command, cwd=tmp_path, env=environment, check=True)
