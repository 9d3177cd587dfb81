"""Trains RepVGG with other branches on the digits: the ablations of the RepVGG paper, in small.

Every ablation of the config `digits_ablation` is trained with the same seeds. A seed fixes the
first values, the order of the images and their shifts. The table has the mean and the standard
deviation over the seeds, and the top-1 on ImageNet that the paper gives for RepVGG-B0.

The digits are not ImageNet: a network of 16 layers and 16 channels learns 1,437 images for less
than a minute, and one test image is 0.3 %. Only large differences say something. Their order may
differ from that of the paper.

The file of results is written after each run. The same command continues with the runs that are
missing. An ablation with a ReLU in its branches is trained, and its conversion is refused.

Example:
  nice python benchmarks/ablation.py --json benchmarks/results/ablation_digits.json
"""

import argparse
import contextlib
import importlib
import io
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timing

from repjax import runs, training
from repjax.errors import InputError, one_paragraph
from repjax.layers.grammar import parse

# A type checker does not see that this package lies in configs/.
ABLATIONS = importlib.import_module("repjax.configs.common").ABLATIONS
digits_ablation = importlib.import_module("repjax.configs.digits_ablation")
Cells = dict[str, dict[str, Any]]


class Paper(NamedTuple):
  """Top-1 on ImageNet in percent, and if the source of the number could be checked."""

  top1: float
  is_checked: bool = True


PAPER = {
  "full": Paper(75.14),
  "plain": Paper(72.39),
  "only_1x1": Paper(73.15),
  "only_identity": Paper(74.79),
  "identity_without_norm": Paper(74.18, False),
  "norm_after_sum": Paper(73.52, False),
  "relu_in_branches": Paper(75.69, False),
  "diracnet": Paper(73.97, False),
  "trivial": Paper(73.51, False),
  "acb": Paper(73.58, False),
  "residual_reorg": Paper(74.56),
}
"""Ding et al., RepVGG, CVPR 2021, section 4.2, for RepVGG-B0. https://arxiv.org/abs/2101.03697"""


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--ablations", nargs="+", choices=ABLATIONS, default=list(ABLATIONS))
  parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
  parser.add_argument("--epochs", type=float, help="epochs of each run (default: as in the config)")
  parser.add_argument("--data-dir", help="folder of the data set (default: that of TFDS)")
  parser.add_argument("--json", type=Path, required=True, help="file of results")
  arguments = parser.parse_args()
  with one_paragraph():
    cells = measure(arguments)
  print(table(cells, arguments.ablations))


def measure(arguments: argparse.Namespace) -> Cells:
  """Trains what the file of results lacks, writes each run at once, and returns all runs."""
  path = arguments.json
  facts = {"epochs": arguments.epochs or digits_ablation.get_config().num_epochs}
  cells: Cells = read(path, facts)
  for seed in arguments.seeds:
    for name in arguments.ablations:
      key = f"{name}, seed {seed}"
      if key in cells:
        continue
      cells[key] = run(name, seed, arguments)
      timing.write_json(path, facts, cells=cells)
      print(f"{key}: {cells[key]['accuracy']:.2%}, loss {cells[key]['loss']:.4f}", flush=True)
  return cells


def read(path: Path, facts: Mapping[str, Any]) -> Cells:
  """Returns the runs in a file of results.

  Raises:
    InputError: the runs were made with other settings.
  """
  if not path.exists():
    return {}
  held = json.loads(path.read_text())
  before = {name: held.get(name) for name in facts}
  if before != facts:
    raise InputError(
      f"{path} holds runs with {before}, and these are with {dict(facts)}. Give a different --json"
    )
  return held["cells"]


def run(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
  """Trains and converts one network in a temporary folder, and returns what came out."""
  config = digits_ablation.get_config(name)
  config.seed = seed
  config.data_dir = arguments.data_dir
  if arguments.epochs:
    config.num_epochs = config.eval_every_epochs = arguments.epochs
  refusal, report = None, None
  with tempfile.TemporaryDirectory() as folder:
    workdir = Path(folder) / name
    with contextlib.redirect_stdout(io.StringIO()):
      try:
        report = training.train(config, workdir)
      except InputError as error:
        if not any(parse(branch).relu for branch in config.model_overrides.branches or ()):
          raise
        refusal = str(error)
    lines = [json.loads(line) for line in runs.metrics_file(workdir).read_text().splitlines()]
  last = next(line for line in reversed(lines) if "eval_accuracy" in line)
  return {
    "ablation": name,
    "seed": seed,
    "accuracy": last["eval_accuracy"],
    "loss": last["eval_loss"],
    "training_loss": next(line["loss"] for line in reversed(lines) if "loss" in line),
    "deploy_accuracy": report and report["accuracy"]["deploy"],
    "refusal": refusal,
  }


def table(cells: Cells, ablations: Sequence[str]) -> str:
  """Returns the table of means and standard deviations, in Markdown."""
  rows = [
    "| ablation | accuracy on digits, % | deploy form, % | test loss | top-1 of the paper, % |",
    "|---|---|---|---|---|",
  ]
  for name in ablations:
    held = [cell for cell in cells.values() if cell["ablation"] == name]
    if not held:
      continue
    deployed = [cell["deploy_accuracy"] for cell in held]
    shown = [
      f"`{name}`",
      _spread([100 * cell["accuracy"] for cell in held], 1),
      "refused" if None in deployed else _spread([100 * value for value in deployed], 1),
      _spread([cell["loss"] for cell in held], 3),
      _published(name),
    ]
    rows.append(f"| {' | '.join(shown)} |")
  return "\n".join(rows)


def _spread(values: Sequence[float], digits: int) -> str:
  """Returns the mean and the standard deviation of several runs."""
  deviation = statistics.stdev(values) if len(values) > 1 else 0.0
  return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def _published(name: str) -> str:
  """Returns the number of the paper; a question mark says that it could not be checked."""
  if name not in PAPER:
    return "none"
  return f"{PAPER[name].top1:.2f}" + ("" if PAPER[name].is_checked else " ?")


if __name__ == "__main__":
  main()
