"""Python in the README and in docs runs as written; links, commands and tables there are right."""

import dataclasses
import functools
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from PIL import Image

import repjax
import repjax.models
from repjax import cli, layers
from repjax.algebra import ConvParams, fuse_bn
from repjax.configs import common
from repjax.weights.naming import Row
from tests import helpers
from tests.models import repmlp_cases, test_parnet, test_resnet

pytest_plugins = ["tests.training.fixtures"]

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))  # their blocks continue one another
DOCUMENTS = sorted({*PAGES, *ROOT.glob("*.md"), *ROOT.glob("*/README.md")})


def blocks(page, language):
  """Returns the code blocks of a page in one language."""
  return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


EXAMPLES = {
  f"{page.relative_to(ROOT)}-{number}": block
  for page in PAGES
  if page not in TUTORIALS
  for number, block in enumerate(blocks(page, "python"))
}


def test_there_are_python_examples():
  assert len(EXAMPLES) >= 10


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize("times", helpers.spread([1, 2], [1]))  # a reader repeats an example
@pytest.mark.parametrize("example", EXAMPLES)
def test_python_examples_run(example, times, finished, tmp_path, monkeypatch):
  block = EXAMPLES[example]
  if "jax.jit(model.apply)" in block:  # a shallow network under the same name compiles faster
    family, row = repjax.models._MODELS["repvgg_a0"]
    shallow = (family, {**row, "stage_sizes": (1, 1, 2, 1)})
    monkeypatch.setitem(repjax.models._MODELS, "repvgg_a0", shallow)
  (tmp_path / "runs").mkdir()
  (tmp_path / "runs" / "digits").symlink_to(finished[0])
  monkeypatch.chdir(tmp_path)
  Image.new("L", (8, 8)).save("picture.png")
  for _ in range(times):
    exec(compile(block, example, "exec"), {})


@pytest.mark.proof  # minutes: these train networks, and compare what they print with the page
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_tutorials_print_what_they_say(page):
  subprocess.run([sys.executable, ROOT / "scripts" / "run_page.py", page], check=True)


def worked_example():
  """Runs the code of CONTRIBUTING.md, and returns the names that the code defines."""
  (block,) = blocks(ROOT / "CONTRIBUTING.md", "python")
  scope = {"FOLDS": {}, "VARIANTS": {}, "NAMINGS": {}, "Row": Row, "common": common, "nn": nn}
  scope |= {"RepLayer": layers.RepLayer, "refuse_training": layers.base.refuse_training}
  scope |= {"ConvParams": ConvParams, "fuse_bn": fuse_bn, "linear": layers.linear}
  exec(compile(block, "CONTRIBUTING.md", "exec"), scope)
  return scope


def test_the_worked_example_runs():
  scope = worked_example()
  assert scope["get_config"]().model in scope["VARIANTS"]
  assert scope["FOLDS"] == {"NormedDense": scope["fold_normed_dense"]}
  assert scope["NAMINGS"].keys() == scope["VARIANTS"].keys()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  ("dtype", "param_dtype", "tolerance"),
  [
    (jnp.float64, jnp.float64, 1e-12),
    (jnp.float32, jnp.float32, 1e-5),
    (jnp.bfloat16, jnp.float32, 0.02),
    (jnp.float32, jnp.bfloat16, 0.02),
    (jnp.bfloat16, jnp.bfloat16, 0.02),
  ],
)
def test_the_layer_of_the_worked_example_has_two_equal_forms(dtype, param_dtype, tolerance):
  scope = worked_example()
  form = functools.partial(scope["NormedDense"], 5, dtype=dtype, param_dtype=param_dtype)
  x = jnp.asarray(helpers.random_input(4, 3), dtype)
  variables = helpers.random_variables(form(), x)
  folded = scope["fold_normed_dense"](variables["params"], variables["batch_stats"], 1e-5)
  assert helpers.shapes(folded) == helpers.shapes(
    helpers.init_shapes(form(deploy=True), x)["params"]
  )
  trained, deployed = form().apply(variables, x), form(deploy=True).apply({"params": folded}, x)
  assert (trained.dtype, deployed.dtype) == (dtype, dtype)
  helpers.assert_close(deployed, trained, tolerance)


def test_the_readme_is_short():
  assert len(README.read_text().split()) < 1200
  assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) < 60


def anchors(page):
  """Returns the anchors that GitHub gives to the headings of a page."""
  prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
  headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
  return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
  for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
    if target.startswith("https://"):
      continue
    path, _, anchor = target.partition("#")
    linked = (page.parent / path).resolve() if path else page
    assert linked.exists(), target
    assert not anchor or anchor in anchors(linked), target


def places(entries):
  """Yields the pages of a navigation."""
  for entry in entries:
    for place in entry.values():
      yield from places(place) if isinstance(place, list) else [place]


def test_the_navigation_has_every_page():
  settings = tomllib.loads((ROOT / "zensical.toml").read_text())
  pages = {str(page.relative_to(DOCS)) for page in PAGES[1:]}
  assert sorted(places(settings["project"]["nav"])) == sorted({*pages, "changelog.md"})


def test_the_page_of_commands_lists_every_command():
  page = (DOCS / "guides" / "commands.md").read_text()
  assert re.findall(r"^\| `repjax ([\w-]+)`", page, re.MULTILINE) == list(cli.COMMANDS)


def test_every_public_name_is_in_the_reference():
  """`make docs` checks that each name of the modules below has a place on the built pages."""
  pages = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
  shown = set(re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE))
  files = [*(ROOT / "repjax").glob("*.py"), *(ROOT / "repjax").glob("*/__init__.py")]
  faces = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for file in files
    if "\n__all__ = " in file.read_text()
  }
  assert faces | {f"repjax.{name}" for name in ("algebra", "analysis", "spec")} <= shown


def commands():
  """Yields the words of every command in the shell blocks, without the environment in front."""
  for page in PAGES:
    for line in "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines():
      words = shlex.split(line, comments=True)
      while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
      if words:
        yield words


def test_the_first_commands_are_the_demo_and_the_tests():
  assert list(commands())[:2] == [["make", "demo"], ["make", "test"]]


def known_flags(words, capsys):
  """Returns the text that holds every flag of a command: its help, or the source of its folder."""
  if words[0] == "python" or words[1] == "train":
    folder = "repjax/cli" if words[1] in ("main.py", "train") else Path(words[1]).parent
    return "".join(path.read_text() for path in (ROOT / folder).glob("*.py"))
  with pytest.raises(SystemExit):
    cli.main([words[1], "--help"])
  return capsys.readouterr().out


def test_commands_and_their_flags_exist(capsys):
  fields, checked = common.get_config(), 0
  for words in commands():
    line, wrappers = " ".join(words), {"srun": 1, "taskset": 3}
    words = words[wrappers.get(words[0], 0) :]
    if words[0] == "repjax":
      assert words[1] in cli.COMMANDS, line
    elif words[0] == "python" and words[1].endswith(".py"):
      assert (ROOT / words[1]).exists(), line
    else:
      continue
    known = re.findall(r"[\w-]+", known_flags(words, capsys))
    for flag in (word.split("=")[0] for word in words if word.startswith("--")):
      if flag.startswith("--config."):
        assert flag.removeprefix("--config.").split(".")[0] in fields, line
      else:
        assert flag in known or flag.removeprefix("--") in known, line
    if "--config" in words:
      name, _, _ = words[words.index("--config") + 1].partition(":")
      assert (ROOT / (name if name.endswith(".py") else f"configs/{name}.py")).exists(), line
    checked += 1
  assert checked > 40


def counts(name):
  """Returns the parameters of a model in both forms.

  They are golden numbers, which different tests compare with the models, or are counted here.
  """
  golden = helpers.counts() | repmlp_cases.counts()
  golden |= helpers.repmlpnet_goldens()["counts"] | helpers.parnet_goldens()["counts"]
  golden |= helpers.mobile_goldens()["counts"]
  if name in golden:
    train, deploy = (golden[name][f"{form}_params"] for form in ("train", "deploy"))
    if name.startswith("repmlpnet"):
      deploy -= helpers.folded_beyond_the_authors(repjax.create_model(name))
    if name.startswith("parnet"):
      deploy += test_parnet.folded_beyond_the_authors(repjax.create_model(name))
    if name in helpers.mobile_goldens()["counts"]:
      deploy -= helpers.folded_beyond_timm(repjax.create_model(name))
    return train, deploy
  if name in test_resnet.PARAMETERS:
    train = test_resnet.PARAMETERS[name]
    return train, train - test_resnet.NORMALISED[name]
  classes = 10 if "cifar" in name else 1000
  if repjax.ModelSpec(name).task == "segmentation":
    classes = 19
  spec = repjax.ModelSpec.usual(name, num_classes=classes)
  shapes = (spec.variable_shapes(deploy=deploy) for deploy in (False, True))
  return tuple(sum(leaf.size for leaf in jax.tree.leaves(tree["params"])) for tree in shapes)


def listed():
  """Returns the table of docs/models.md: name to (training, deploy) parameters as written."""
  text = (ROOT / "docs" / "models.md").read_text()
  rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| ([\d,]+) \|", text, re.MULTILINE)
  return {name: (train, deploy) for name, train, deploy in rows}


def test_every_model_is_listed_with_its_parameters():
  assert sorted(listed()) == repjax.list_models()
  for name, written in listed().items():
    assert written == tuple(f"{count:,}" for count in counts(name)), name


def test_families_have_the_parameters_of_their_models():
  section = README.read_text().split("## Models\n")[1].split("\n## ")[0]
  rows = re.findall(r"^\| \[.+?\) \| (.+?) \| (.+?) \| (.+?) \|", section, re.MULTILINE)
  found = set()
  for names, *written in rows:
    patterns = [pattern.replace("*", ".*") for pattern in re.findall(r"`([^`]+)`", names)]
    models = {name for name in listed() for each in patterns if re.fullmatch(each, name)}
    assert not models & found
    found |= models
    for form, text in enumerate(written):
      sizes = [int(listed()[name][form].replace(",", "")) / 1e6 for name in models]
      bounds = dict.fromkeys(f"{bound:.1f} M" for bound in (min(sizes), max(sizes)))
      assert text.split(" to ") == list(bounds), names
  assert found == set(listed())


def test_overrides_are_those_of_the_classes():
  models = {
    "RepVGG": "repvgg_a0",
    "ResNet": "resnet18",
    "`repmlp_resnet50_*`": "repmlp_resnet50_light",
    "`repmlp_cifar`": "repmlp_cifar",
    "RepMLPNet": "repmlpnet_t224",
    "ParNet": "parnet_s",
    "VGG": "vgg16",
    "MobileOne": "mobileone_s0",
    "RepViT": "repvit_m0_9",
    "FastViT": "fastvit_t8",
    "PSPNet": "pspnet",
    "FCN": "fcn",
  }
  fields = {
    row: {field.name for field in dataclasses.fields(repjax.create_model(name))}
    for row, name in models.items()
  }
  shared = set.intersection(*fields.values())
  section = (ROOT / "docs" / "models.md").read_text().split("## Overrides\n")[1]
  found = {
    row: set(re.findall(r"`(\w+)`", text))
    for row, text in re.findall(r"^\| (\S+) \| (.+) \|$", section, re.MULTILINE)
    if row in models
  }
  found["`repmlp_resnet50_*`"] |= found["ResNet"]
  found["PSPNet"] |= found["FCN"]
  assert found == {row: names - shared for row, names in fields.items()}
