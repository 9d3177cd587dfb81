"""Times PSPNet over RepVGG with full and with fast dilation, and over ResNet-50, in one run.

All forms of all networks take turns in one process, so that all meet the same noise.

  train     the training form in evaluation mode, compiled by XLA
  deploy    the deploy form, compiled by XLA
  compiled  the deploy form by `repjax.deploy.compile`, which first measures ways to convolve

The ratio is the time of the baseline's deploy form divided by that of the network, the median over
the rounds: above 1 the network is faster. The last network is the baseline. The RepVGG paper has
10.9 images/s for B1g2-fast, 8.0 for B1g2 and 10.4 for ResNet-50, on a GTX 1080 Ti at 713 pixels.
These numbers come from a copy that could not be checked.

Example:
  python benchmarks/segmentation.py --image-size 257 --rounds 3
"""

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import timing

import repjax
from repjax import analysis
from repjax.errors import one_paragraph

NETWORKS: dict[str, dict[str, Any]] = {
  "b1g2-fast": {"backbone": "repvgg_b1g2", "dilation": "fast"},
  "b1g2": {"backbone": "repvgg_b1g2"},
  "resnet50": {"backbone": "resnet50"},
  "b2-fast": {"backbone": "repvgg_b2", "dilation": "fast"},
  "b2": {"backbone": "repvgg_b2"},
  "resnet101": {"backbone": "resnet101"},
}
"""The networks with which the RepVGG paper segments, by name."""
USUAL = ("b1g2-fast", "b1g2", "resnet50")
FORMS = ("train", "deploy", "compiled")
CLASSES = 19
TOLERANCE = 1e-3
"""Largest relative error between forms. Convolutions by Winograd's algorithm round more."""


def subjects_of(name: str, forms: list[str], size: int, batch: int) -> dict[str, timing.Subject]:
  """Returns the subjects of a network, by form."""
  attributes = NETWORKS[name]
  model = repjax.create_model("pspnet", num_classes=CLASSES, **attributes)
  variables = repjax.init(model, jax.random.key(0), size)
  fold = jax.jit(repjax.reparameterize)
  deployed = {"params": fold(variables["params"], variables["batch_stats"])}
  deploy = repjax.create_model("pspnet", num_classes=CLASSES, deploy=True, **attributes)

  def start(_: Any) -> timing.Running:
    return timing.Running(
      repjax.deploy.compile(deploy, deployed, image_size=size, batch_sizes=(batch,))
    )

  made = {
    "train": timing.program(model.apply, variables),
    "deploy": timing.program(deploy.apply, deployed),
    "compiled": timing.Subject(start, prepare=np.asarray),
  }
  return {f"{name} {form}": made[form] for form in forms}


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
  """Times all networks, and returns a row for each form of each of them."""
  size, batch = arguments.image_size, arguments.batch_size
  subjects: dict[str, timing.Subject] = {}
  for name in arguments.networks:
    subjects |= subjects_of(name, arguments.forms, size, batch)

  def agree(outputs: dict[str, np.ndarray]) -> None:
    for name in arguments.networks:
      own = {key: value for key, value in outputs.items() if key.split()[0] == name}
      timing.relative_errors(own, next(iter(own.values())), TOLERANCE)

  images = timing.random_images(batch, size)
  results = timing.race(
    subjects,
    images,
    rounds=arguments.rounds,
    clock=timing.cpu_time if arguments.cpu_time else time.perf_counter,
    check=agree,
  )
  form = "deploy" if "deploy" in arguments.forms else arguments.forms[-1]
  baseline = results[f"{arguments.networks[-1]} {form}"].all_seconds
  return [
    {
      "network": key.split()[0],
      "form": key.split()[1],
      "seconds": result.median,
      "ratio": timing.median_ratio(baseline, result.all_seconds),
      "memory": result.memory,
      "compile_s": result.compile_s[0],
      **_cost(key, size),
    }
    for key, result in results.items()
  ]


def _cost(key: str, size: int) -> dict[str, int]:
  """Returns parameters and multiply-accumulates of one form."""
  name, form = key.split()
  attributes = NETWORKS[name]
  model = repjax.create_model("pspnet", num_classes=CLASSES, **attributes)
  found = analysis.summary(model, size)
  assert found.deploy is not None
  cost = found.train if form == "train" else found.deploy
  return {"params": cost.params, "macs": cost.macs}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(USUAL))
  parser.add_argument("--forms", nargs="+", choices=FORMS, default=["train", "deploy"])
  parser.add_argument("--image-size", type=int, default=713, help="pixels (default: 713)")
  parser.add_argument("--batch-size", type=int, default=1, help="default: 1")
  parser.add_argument("--rounds", type=int, default=5, help="rounds (default: 5)")
  parser.add_argument("--cpu-time", action="store_true", help="measure CPU time, not wall time")
  parser.add_argument("--json", type=Path, help="also write the results to this file")
  arguments = parser.parse_args()
  with one_paragraph():
    rows = measure(arguments)
  facts = {
    name: getattr(arguments, name) for name in ("image_size", "batch_size", "rounds", "cpu_time")
  }
  print(f"{timing.machine()}\n{facts}; the ratio is that of {arguments.networks[-1]}")
  for row in rows:
    print(
      f"  {row['network']:<10}{row['form']:<9}{1e3 * row['seconds']:>10.0f} ms"
      f"  ratio {row['ratio']:.2f}{row['params']:>13,} parameters{row['macs'] / 1e9:>8.1f} GMAC",
      flush=True,
    )
  if arguments.json:
    timing.write_json(arguments.json, facts, rows=rows)


if __name__ == "__main__":
  main()
