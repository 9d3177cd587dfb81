"""Times ParNet in evaluation mode: the training form, the authors' fold, and the deploy form.

The authors of ParNet fold only convolutions. The norms of gates and of fusion blocks remain, with
their statistics. repjax folds these norms too. For each form the table shows milliseconds,
parameters, statistics and multiply-accumulates. The ratio is the time of a form divided by the time
of the deploy form.

Example:
  python benchmarks/parnet.py --models parnet_s parnet_cifar_s --batch-sizes 1 8
"""

import argparse
import contextlib
import os
import platform
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import timing

import repjax
from repjax import analysis
from repjax.errors import one_paragraph
from repjax.layers import RepConv, fold_rep_conv
from repjax.models import base, image_size_of, parnet

MODELS = ["parnet_s", "parnet_m", "parnet_l", "parnet_xl", "parnet_cifar_s"]
FORMS = ("train", "authors", "deploy")


def _deployed(*arguments: Any, **attributes: Any) -> RepConv:
  """Returns a RepConv in deploy form, even if the network is in training form."""
  return RepConv(*arguments, **{**attributes, "deploy": True})


class AuthorsFold(NamedTuple):
  """A ParNet with folded convolutions and unfolded norms, called like a module.

  Attributes:
    model: the training form.
  """

  model: Any

  def apply(self, variables: Any, images: jax.Array) -> jax.Array:
    """Returns the logits; `variables` come from `fold_convolutions`."""
    with contextlib.ExitStack() as patches:
      for module in (parnet, base):
        patches.enter_context(mock.patch.object(module, "RepConv", _deployed))
      return self.model.apply(variables, images)


def fold_convolutions(variables: Any) -> dict[str, Any]:
  """Returns the variables of `AuthorsFold`, from the variables of the training form."""
  params, stats = variables["params"], variables["batch_stats"]
  paths = list(_norms(stats, ()))
  folds = {"RepConv": fold_rep_conv}
  keep = ["/".join(path) for path in paths]
  return {
    "params": repjax.reparameterize(params, stats, folds=folds, keep=keep),
    "batch_stats": _without_convolutions(stats),
  }


def _norms(stats: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
  """Yields the paths of all norms outside a RepConv."""
  for name, tree in stats.items():
    if name == "bn":
      yield (*path, name)
    elif not name.startswith("RepConv"):
      yield from _norms(tree, (*path, name))


def _without_convolutions(stats: Any) -> Any:
  """Returns a tree of statistics without those of every RepConv, and without empty nodes."""
  if not isinstance(stats, dict):
    return stats
  kept = {k: _without_convolutions(v) for k, v in stats.items() if not k.startswith("RepConv")}
  return {name: tree for name, tree in kept.items() if not isinstance(tree, dict) or tree}


def measure(name: str, batch_size: int, repeats: int, rounds: int) -> dict[str, Any]:
  """Times all forms of a model at its usual image size, and returns the row."""
  model, deploy = (repjax.create_model(name, deploy=form) for form in (False, True))
  size = image_size_of(model)
  variables = repjax.init(model, jax.random.key(0), size)
  params = jax.jit(repjax.reparameterize)(variables["params"], variables["batch_stats"])
  folded = jax.jit(fold_convolutions)(variables)
  forms: dict[str, tuple[Any, Any]] = {
    "train": (model, variables),
    "authors": (AuthorsFold(model), folded),
    "deploy": (deploy, {"params": params}),
  }
  programs = {name: timing.program(form.apply, held) for name, (form, held) in forms.items()}

  def agree(logits: dict[str, np.ndarray]) -> None:
    timing.relative_errors(logits, logits["deploy"], 1e-4)

  images = timing.random_images(batch_size, size)
  results = timing.race(programs, images, rounds=rounds, repeats=repeats, check=agree)
  found = analysis.summary(model, size)
  assert found.deploy is not None
  fastest = results["deploy"].seconds
  return {
    "model": name,
    "batch_size": batch_size,
    "image_size": size,
    **{
      form: {
        "ms": 1e3 * results[form].median,
        "ratios": [timing.median_ratio(*pair) for pair in zip(results[form].seconds, fastest)],
        "params": _count(held["params"]),
        "statistics": _count(held.get("batch_stats", {})),
        "macs": (found.train if form == "train" else found.deploy).macs,
      }
      for form, (_, held) in forms.items()
    },
  }


def _count(tree: Any) -> int:
  """Returns the number of values in a tree."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--models", nargs="+", default=MODELS, help=f"default: {' '.join(MODELS)}")
  parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8], help="default: 1 8")
  parser.add_argument("--repeats", type=int, default=3, help="times that all subjects start again")
  parser.add_argument("--rounds", type=int, default=20, help="rounds in each repeat")
  parser.add_argument("--json", type=Path, help="also write the results to this file")
  arguments = parser.parse_args()
  processor = platform.processor() or platform.machine()
  print(
    f"{jax.devices()[0].device_kind} ({processor}), {os.cpu_count()} CPUs, jax {jax.__version__}, "
    f"float32, medians of {arguments.repeats} x {arguments.rounds} rounds"
  )
  rows = []
  with one_paragraph():
    for name in arguments.models:
      for batch_size in arguments.batch_sizes:
        row = measure(name, batch_size, arguments.repeats, arguments.rounds)
        rows.append(row)
        print(f"{name}, batch {batch_size}, {row['image_size']} px")
        for form in FORMS:
          own = row[form]
          ratio, low, high = (f(own["ratios"]) for f in (statistics.median, min, max))
          print(
            f"  {form:<8}{own['ms']:>9.1f} ms  ratio {ratio:.2f} ({low:.2f}-{high:.2f})"
            f"{own['params']:>12,} parameters{own['statistics']:>8,} statistics"
            f"{own['macs']:>16,} MACs",
            flush=True,
          )
  if arguments.json:
    facts = {"repeats": arguments.repeats, "rounds": arguments.rounds}
    timing.write_json(arguments.json, facts, models=rows)


if __name__ == "__main__":
  main()
