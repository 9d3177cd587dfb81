"""Builds the package, checks it, installs it into an empty environment, and uses it there.

The wheel is built from the source distribution, so that a file that one of them lacks is noticed.
`pip install repjax` must be enough for models, folds, `fuse` and `compile`. Everything else says
in one line which extra it needs. With --extras, each extra gets its own environment, and a table
shows how large the environments are.

Examples:
  python scripts/prove_package.py
  python scripts/prove_package.py --extras train deploy onnx hub report all
  python scripts/prove_package.py --python python3.13
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

from repjax.errors import InputError, one_paragraph

ROOT = Path(__file__).parents[1]
INSIDE = ("repjax/py.typed", "repjax/configs/common.py", "repjax/configs/digits.py")
"""Files that the wheel must hold and that no import would miss at once."""

CORE = """
import warnings
import jax, jax.numpy as jnp, numpy as np, repjax

warnings.simplefilter("error")
tiny = {"stage_sizes": (1, 1, 1, 1), "width_multipliers": (0.125,) * 4}
model = repjax.create_model("repvgg_a0", num_classes=3, **tiny)
variables = repjax.init(model, jax.random.key(0), 32)
images = np.ones((1, 32, 32, 3), np.float32)
wanted = model.apply(variables, images)
params = repjax.reparameterize(variables["params"], variables["batch_stats"])
deploy = repjax.create_model("repvgg_a0", num_classes=3, deploy=True, **tiny)
np.testing.assert_allclose(deploy.apply({"params": params}, images), wanted, rtol=1e-4, atol=1e-5)
repjax.expand(model, params, jax.random.key(1))
fused = repjax.fuse(model.apply, variables, images)
np.testing.assert_allclose(fused(fused.fold(variables), images), wanted, rtol=1e-4, atol=1e-5)
fused.save(fused.fold(variables), "fused")
repjax.analysis.summary(model, 32)
repjax.deploy.compile(model, variables, image_size=32, batch_sizes=(1,))(images)

def needs(extra, function, *arguments, **named):
  try:
    function(*arguments, **named)
  except repjax.errors.InputError as error:
    text = str(error)
    assert f"pip install 'repjax[{extra}]'" in text and "\\n" not in text, text
    print(f"  {text}")
  else:
    raise AssertionError(f"{function} needs {extra} no more")

spec = repjax.ModelSpec.usual("repvgg_a0", 3, tiny)
needs("train", lambda: repjax.training.train)
needs("train", lambda: repjax.data.open_source)
needs("deploy", lambda: repjax.data.read_image)
predictor = repjax.deploy.Predictor.of(model, variables, repjax.spec.Preprocessing(32, 32))
needs("deploy", predictor, "image.png")
needs("deploy", repjax.deploy.export, model, variables, spec, "out")
needs("onnx", repjax.onnx.to_onnx, model, variables, image_size=32)
needs("hub", repjax.load, "hf:timm/repvgg_a0.rvgg_in1k")
needs("report", repjax.report.write_report, ".")
"""
"""A program that uses what `pip install repjax` brings, and that meets the lack of each extra."""


def run(*command: object, cwd: Path) -> str:
  """Runs a command without this environment's packages, and returns what the command prints.

  Raises:
    InputError: the command fails; the text is its output.
  """
  env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
  words = [str(word) for word in command]
  start = time.perf_counter()
  done = subprocess.run(
    words,
    cwd=cwd,
    env=env | {"JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  if done.returncode:
    raise InputError(f"{_shown(words)} failed:\n{done.stdout[-4000:]}")
  print(f"{time.perf_counter() - start:.0f} s: {_shown(words)}", flush=True)
  return done.stdout


def _shown(words: Sequence[str]) -> str:
  """Returns a command in one line, without programs in it and with the names of files alone."""
  return " ".join("..." if "\n" in word else Path(word).name for word in words)


def build(folder: Path) -> Path:
  """Builds the source distribution, and the wheel from it, and returns the checked wheel."""
  run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
  files = sorted(folder.iterdir())
  print(run(sys.executable, "-m", "twine", "check", "--strict", *files, cwd=folder), end="")
  (wheel,) = folder.glob("*.whl")
  with zipfile.ZipFile(wheel) as archive:
    names = set(archive.namelist())
  lacking = [name for name in INSIDE if name not in names]
  foreign = {name.split("/")[0] for name in names if not name.startswith("repjax")}
  if lacking or foreign:
    raise InputError(f"the wheel lacks {lacking} and holds {sorted(foreign)} beside repjax")
  for file in files:
    print(f"{file.name}: {file.stat().st_size / 1e6:.2f} MB")
  return wheel


def install(folder: Path, python: str, wheel: Path, extra: str = "") -> tuple[Path, int]:
  """Makes an environment with the wheel, and returns its Python and the bytes of its packages."""
  run(python, "-m", "venv", folder, cwd=wheel.parent)
  own = folder / "bin" / "python"
  what = f"{wheel}[{extra}]" if extra else wheel
  run(own, "-m", "pip", "install", "--quiet", what, cwd=wheel.parent)
  (packages,) = folder.glob("lib/python*/site-packages")
  size = sum(
    512 * file.lstat().st_blocks
    for file in packages.rglob("*")
    if file.relative_to(packages).parts[0].partition("-")[0] not in ("pip", "setuptools")
  )
  return own, size


def main(argv: Sequence[str] | None = None) -> None:
  """Proves the package as the flags say."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--python", default=sys.executable, help="Python to install for")
  parser.add_argument(
    "--extras", nargs="+", default=[], metavar="NAME", help="extras to install and measure"
  )
  arguments = parser.parse_args(argv)
  with one_paragraph(), tempfile.TemporaryDirectory() as folder:
    base = Path(folder)
    (base / "dist").mkdir()
    wheel = build(base / "dist")
    own, size = install(base / "core", arguments.python, wheel)
    print(f"pip install repjax: {size / 1e6:,.0f} MB, {run(own, '--version', cwd=base).strip()}")
    print(run(own, "-c", CORE, cwd=base), end="")
    print(f"  {run(own.with_name('repjax'), '--version', cwd=base).strip()}: the command runs")
    for extra in arguments.extras:
      _, size = install(base / extra, arguments.python, wheel, extra)
      print(f"pip install 'repjax[{extra}]': {size / 1e6:,.0f} MB")


if __name__ == "__main__":
  main()
