"""Times ParNet on one device and with one device for each stream; prints the critical path.

Latency is measured from images on the host to logits on the host, in turns. The benchmark also
prints the time of each piece alone and the critical path; see `repjax.deploy.critical_path`. With a
multiple of three devices, groups of three devices share the batch.

A CPU counts as one device. The example splits a CPU into three devices, which share the cores. Then
pieces are slower side by side than alone, and streams gain little.

Example:
  XLA_FLAGS=--xla_force_host_platform_device_count=3 python benchmarks/streams.py
"""

import argparse
import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import timing

import repjax
from repjax import analysis
from repjax.errors import one_paragraph
from repjax.models import image_size_of

MODELS = ["parnet_s", "parnet_l"]
TOLERANCES = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 5e-3}


def measure(
  name: str, batch_size: int, dtype: str, devices: int, repeats: int, rounds: int
) -> tuple[dict[str, Any], repjax.deploy.CriticalPath]:
  """Times a model on one device and in streams; returns the row and the critical path."""
  model = repjax.create_model(name, deploy=True)
  size = image_size_of(model)
  variables = repjax.init(model, jax.random.key(0), size)
  compiled = functools.partial(
    repjax.deploy.compile, model, variables, image_size=size, dtype=dtype, batch_sizes=batch_size
  )
  chosen = jax.local_devices()[:devices]
  ways = {
    "single": functools.partial(compiled, devices=chosen[:1]),
    "streams": functools.partial(compiled, devices=chosen, parallel="streams"),
  }

  def agree(logits: dict[str, np.ndarray]) -> None:
    timing.relative_errors(logits, logits["single"], TOLERANCES[dtype])

  images = timing.random_images(batch_size, size)
  built = {}  # the compiled model of each way, from the last repeat
  subjects = {way: _subject(way, build, built) for way, build in ways.items()}
  results = timing.race(subjects, images, rounds=rounds, repeats=repeats, check=agree)
  path = repjax.deploy.critical_path(built["streams"], rounds=rounds)
  row = {
    "model": name,
    "batch_size": batch_size,
    "image_size": size,
    "dtype": dtype,
    "devices": path.devices,
    "single_ms": 1e3 * results["single"].median,
    "streams_ms": 1e3 * results["streams"].median,
    "ratios": [
      timing.median_ratio(*pair)
      for pair in zip(results["single"].seconds, results["streams"].seconds)
    ],
    **_facts(path, analysis.summary(model, size)),
  }
  return row, path


def _subject(way: str, build: Callable[[], Any], built: dict[str, Any]) -> timing.Subject:
  """Returns a subject whose call takes images on the host and returns logits on the host."""

  def start(images: np.ndarray) -> timing.Running:
    del images
    built[way] = build()
    return timing.Running(built[way])

  # A call ends with the logits on the host, so there is nothing to wait for.
  return timing.Subject(start, prepare=np.asarray, wait=np.shape)


def _facts(path: repjax.deploy.CriticalPath, found: analysis.Summary) -> dict[str, Any]:
  """Returns the critical path as it stands in the file of results."""
  macs = {stage.name: stage.deploy.macs for stage in found.stages if stage.deploy}
  return {
    "pieces": [
      {
        "scopes": cost.piece.scopes,
        "stream": cost.piece.stream,
        "ms": 1e3 * cost.seconds,
        "moves_ms": {name: 1e3 * seconds for name, seconds in cost.moves.items()},
        "macs_per_image": sum(macs.get(scope, 0) for scope in cost.piece.scopes),
      }
      for cost in path.costs
    ],
    "path": path.path,
    "path_ms": 1e3 * path.seconds,
    "shares_ms": {name: 1e3 * seconds for name, seconds in path.shares.items()},
    "one_by_one_ms": 1e3 * path.one_by_one,
    "bound": path.bound,
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--models", nargs="+", default=MODELS, help=f"default: {' '.join(MODELS)}")
  parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8], help="default: 1 8")
  parser.add_argument("--dtype", choices=TOLERANCES, default="float32", help="default: float32")
  parser.add_argument("--devices", type=int, help="number of devices to use (default: all)")
  parser.add_argument("--repeats", type=int, default=3, help="times that all subjects start again")
  parser.add_argument("--rounds", type=int, default=20, help="rounds in each repeat")
  parser.add_argument("--json", type=Path, help="also write the results to this file")
  arguments = parser.parse_args()
  devices = arguments.devices or jax.local_device_count()
  effort = {"repeats": arguments.repeats, "rounds": arguments.rounds}
  print(f"{devices} x {jax.devices()[0].device_kind}, {timing.cpus()} CPUs, jax {jax.__version__}")
  if jax.default_backend() == "cpu":
    print("devices of one CPU share its cores: pieces are slower side by side than alone")
  rows = []
  with one_paragraph():
    for name in arguments.models:
      for batch_size in arguments.batch_sizes:
        row, path = measure(name, batch_size, arguments.dtype, devices, **effort)
        rows.append(row)
        ratio, low, high = (f(row["ratios"]) for f in (statistics.median, min, max))
        print(
          f"\n{name}, batch {batch_size}, {row['image_size']} px, {arguments.dtype}: one device "
          f"{row['single_ms']:.2f} ms, streams on {row['devices']} {row['streams_ms']:.2f} ms, "
          f"{ratio:.2f} ({low:.2f}-{high:.2f}) times as fast\n{path}",
          flush=True,
        )
  if arguments.json:
    timing.write_json(arguments.json, effort, models=rows)


if __name__ == "__main__":
  main()
