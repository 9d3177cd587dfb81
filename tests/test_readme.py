"""The README's Python runs as written, and its table of models is right."""

import re
from pathlib import Path

import pytest
from PIL import Image

import repjax
from tests import helpers

pytest_plugins = ["tests.training.fixtures"]

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_there_are_python_examples():
  assert len(BLOCKS) == 4


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize("block", BLOCKS, ids=["functions", "own network", "load", "weights"])
def test_python_examples_run(block, finished, tmp_path, monkeypatch):
  (tmp_path / "runs").mkdir()
  (tmp_path / "runs" / "digits").symlink_to(finished[0])
  monkeypatch.chdir(tmp_path)
  Image.new("L", (8, 8)).save("picture.png")
  exec(compile(block, "README.md", "exec"), {})


def test_every_model_is_listed_with_its_parameters():
  rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| ([\d,]+) \|", README.read_text(), re.MULTILINE)
  assert sorted(name for name, _, _ in rows) == repjax.list_models()
  # The golden counts, which tests of the models and of the analysis compare with the models.
  counts = helpers.counts()
  for name, *written in rows:
    expected = [f"{counts[name][f'{form}_params']:,}" for form in ("train", "deploy")]
    assert written == expected, name
