"""The README's Python runs as written, and its table of models is right."""

import re
from pathlib import Path

import jax
import pytest
from PIL import Image

import repjax
import repjax.models
from tests import helpers
from tests.models import repmlp_cases, test_parnet, test_resnet

pytest_plugins = ["tests.training.fixtures"]

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_there_are_python_examples():
  assert len(BLOCKS) == 7


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize(
  "block",
  BLOCKS,
  ids=["functions", "own network", "features", "load", "production", "8 bits", "weights"],
)
def test_python_examples_run(block, finished, tmp_path, monkeypatch):
  if "jax.jit(model.apply)" in block:  # what is compiled has few blocks behind its name
    family, row = repjax.models._MODELS["repvgg_a0"]
    shallow = (family, {**row, "stage_sizes": (1, 1, 2, 1)})
    monkeypatch.setitem(repjax.models._MODELS, "repvgg_a0", shallow)
  (tmp_path / "runs").mkdir()
  (tmp_path / "runs" / "digits").symlink_to(finished[0])
  monkeypatch.chdir(tmp_path)
  Image.new("L", (8, 8)).save("picture.png")
  exec(compile(block, "README.md", "exec"), {})


def counts(name):
  """Of both forms: golden ones, which other tests compare with the models, or counted here."""
  golden = helpers.counts() | repmlp_cases.counts()
  golden |= helpers.repmlpnet_goldens()["counts"] | helpers.parnet_goldens()["counts"]
  if name in golden:
    train, deploy = (golden[name][f"{form}_params"] for form in ("train", "deploy"))
    if name.startswith("repmlpnet"):
      deploy -= helpers.folded_beyond_the_authors(repjax.create_model(name))
    if name.startswith("parnet"):
      deploy += test_parnet.folded_beyond_the_authors(repjax.create_model(name))
    return train, deploy
  if name in test_resnet.PARAMETERS:
    train = test_resnet.PARAMETERS[name]
    return train, train - test_resnet.NORMALISED[name]
  spec = repjax.ModelSpec.usual(name, num_classes=10 if "cifar" in name else 1000)
  shapes = (spec.variable_shapes(deploy=deploy) for deploy in (False, True))
  return tuple(sum(leaf.size for leaf in jax.tree.leaves(tree["params"])) for tree in shapes)


def test_every_model_is_listed_with_its_parameters():
  section = README.read_text().split("## Models\n")[1].split("\n## ")[0]
  rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| ([\d,]+) \|", section, re.MULTILINE)
  assert sorted(name for name, _, _ in rows) == repjax.list_models()
  for name, *written in rows:
    assert written == [f"{count:,}" for count in counts(name)], name
