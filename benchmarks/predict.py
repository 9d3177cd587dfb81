"""Times `repjax predict` from the command to the first label, with a cold and with a warm cache.

Every start is a new process, on an image of 500 x 375 pixels and a model with random parameters.
The first start finds an empty compilation cache and fills it. The warm starts take turns with
processes that only import packages. The printed times are medians:

  jax       Python and `import jax`
  flax      Python, `import jax` and `import flax.linen`
  repjax    the same and `import repjax.deploy`
  answer    the whole command

Example:
  python benchmarks/predict.py --json benchmarks/results/predict_cpu_2cores.json
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import timing
from PIL import Image

import repjax
from repjax import runs
from repjax.disk import trees
from repjax.errors import one_paragraph

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = {
  "jax": "import jax",
  "flax": "import jax, flax.linen",
  "repjax": "import jax, flax.linen, repjax.deploy",
}


def make_folder(folder: Path, name: str) -> None:
  """Writes a deploy folder with random parameters, and an image."""
  spec = repjax.ModelSpec.usual(name)
  model = spec.create_model(deploy=True)
  params = repjax.init(model, jax.random.key(0), spec.preprocessing.image_size)["params"]
  trees.write_tree(runs.params_folder(folder), params)
  spec.write(folder)
  pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
  Image.fromarray(pixels).resize((500, 375)).save(folder / "image.jpg")


def time_once(command: Sequence[str | Path], environment: dict[str, str]) -> float:
  """Returns the seconds from the start of a command to its first printed line, or to its end."""
  start = time.perf_counter()
  with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout is not None
    process.stdout.readline()
    seconds = time.perf_counter() - start
  if process.returncode:
    raise SystemExit(f"error: the command ended with status {process.returncode}, see above")
  return seconds


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--model", default="repvgg_a0", help="default: repvgg_a0")
  parser.add_argument("--starts", type=int, default=7, help="starts with a warm cache (default: 7)")
  parser.add_argument("--json", type=Path, help="also write the results to this file")
  arguments = parser.parse_args()
  with one_paragraph(), tempfile.TemporaryDirectory(prefix="predict-") as made:
    folder = Path(made)
    make_folder(folder / "model", arguments.model)
    predict, image = ("-m", "repjax", "predict"), folder / "model" / "image.jpg"
    answer = [sys.executable, *predict, "--workdir", folder / "model", image]
    commands = {name: [sys.executable, "-c", program] for name, program in IMPORTS.items()}
    commands["answer"] = answer
    environment = {**os.environ, "XDG_CACHE_HOME": made, "PYTHONPATH": str(ROOT)}
    cold = time_once(answer, environment)
    warm = [
      {name: time_once(command, environment) for name, command in commands.items()}
      for _ in range(arguments.starts)
    ]
  median = {name: statistics.median(each[name] for each in warm) for name in commands}
  print(f"cold  answer {cold:.2f} s")
  print("warm  " + "  ".join(f"{name} {seconds:.2f} s" for name, seconds in median.items()))
  if arguments.json:
    timing.write_json(arguments.json, {"model": arguments.model}, cold=cold, warm=warm)


if __name__ == "__main__":
  main()
