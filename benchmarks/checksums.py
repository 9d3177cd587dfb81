"""Measures what checksums cost when a model's folders are written and read.

The deploy form is written and read with and without checksums, in turns, and so is a checkpoint of
the training form. Files that are read were just written, so they are in memory; from a disk, both
ways take longer by the same time. A table gives medians.

Example:
  python benchmarks/checksums.py --json benchmarks/results/checksums_cpu_2cores.json
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax

import repjax
from repjax import disk, runs

ROWS = ("save deploy", "load deploy", "save checkpoint", "load checkpoint")


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--model", default="repvgg_b3", help="name of a model (default: repvgg_b3)")
  parser.add_argument("--rounds", type=int, default=5, help="rounds (default: 5)")
  parser.add_argument("--folder", type=Path, help="disk to write to (default: a temporary folder)")
  parser.add_argument("--json", type=Path, help="also write the results to this file")
  arguments = parser.parse_args()
  spec = repjax.ModelSpec.usual(arguments.model)
  variables = repjax.init(spec.create_model(), jax.random.key(0), spec.preprocessing.image_size)
  params = jax.jit(repjax.reparameterize)(variables["params"], variables["batch_stats"])
  alone = []  # seconds for the checksums of the deploy form, without anything else
  results = {name: {"with": [], "without": []} for name in ROWS}
  with tempfile.TemporaryDirectory(prefix="checksums-", dir=arguments.folder) as folder:
    once(Path(folder), spec, variables, params, True)  # imports and compiles
    for _ in range(arguments.rounds):
      for verify in (False, True):
        measured = once(Path(folder), spec, variables, params, verify)
        for name, seconds in measured.items():
          results[name]["with" if verify else "without"].append(seconds)
      alone.append(time_of(lambda: disk.content(runs.deploy_folder(Path(folder)))))
  sizes = {
    name: sum(leaf.size for leaf in jax.tree.leaves(tree))
    for name, tree in (("training form", variables), ("deploy form", params))
  }
  print(", ".join(f"{name}: {size:,} numbers" for name, size in sizes.items()))
  print(f"{'seconds':<18}{'without':>10}{'with':>10}{'more':>10}")
  for name, found in results.items():
    without, with_ = (statistics.median(found[key]) for key in ("without", "with"))
    print(f"{name:<18}{without:>10.2f}{with_:>10.2f}{with_ / without - 1:>10.1%}")
  print(f"checksums of the deploy form alone: {statistics.median(alone):.2f} s")
  if arguments.json:
    facts = {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine()}
    facts |= {"model": arguments.model, "numbers": sizes}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(
      json.dumps({**facts, "seconds": results, "checksums": alone}, indent=2) + "\n"
    )


def once(
  folder: Path, spec: repjax.ModelSpec, variables: Any, params: Any, verify: bool
) -> dict[str, float]:
  """Writes and reads both folders once, and returns the seconds of each row."""
  spec.write(folder)
  seconds = {}
  with contextlib.nullcontext() if verify else no_checksums():
    writer = runs.CheckpointWriter(folder)
    seconds["save deploy"] = time_of(lambda: runs.write_deploy(folder, params, spec.to_json(), {}))

    def save() -> None:
      writer.save(1, {"variables": variables}, 0.5)
      writer.settle()

    seconds["save checkpoint"] = time_of(save)
    writer.close()
  for form in ("deploy", "checkpoint"):

    def load(form: str = form) -> Any:
      return repjax.load(folder, deploy=form == "deploy", verify=verify)[1]

    seconds[f"load {form}"] = time_of(load)
  return {name: seconds[name] for name in ROWS}


def time_of(function: Callable[[], Any]) -> float:
  """Returns the seconds of a call, until its arrays are ready."""
  start = time.perf_counter()
  jax.block_until_ready(function())
  return time.perf_counter() - start


@contextlib.contextmanager
def no_checksums() -> Iterator[None]:
  """Writes no manifests."""
  with mock.patch.object(disk, "write_manifest", return_value=None):
    yield


if __name__ == "__main__":
  main()
