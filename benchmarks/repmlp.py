"""Times RepMLP: both forms of the models in evaluation mode, and four ways to compute FC3.

The models come first: training form and deploy form in turns, with parameters and
multiply-accumulates. Then FC3, the fully connected layer over tiles, alone, at the sizes that the
models of the paper have:

  batched      one matrix product, batched over groups, as RepDense computes FC3
  eight axes   the same product over the axes of the tiles, without moving them first
  grouped      a grouped 1x1 convolution over flattened tiles, as in PyTorch
  dense        one matrix for all groups, with zeros between the groups

Example:
  python benchmarks/repmlp.py --models repmlp_cifar repmlp_resnet50_light --batch-sizes 1 8
"""

import argparse
import os
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import timing
from jax import lax

import repjax
from repjax import analysis
from repjax.errors import one_paragraph
from repjax.layers.rep_dense import partition, unpartition
from repjax.models import image_size_of

Formulation = Callable[[jax.Array, jax.Array], jax.Array]

MODELS = [
  "repmlp_cifar",
  "repmlp_resnet50_light",
  "repmlp_resnet50_bottleneck_g8",
  "repmlpnet_t224",
]
LAYERS = {  # side of the map, side of the tile, channels, groups, rows of channels
  "light c3": (28, 7, 64, 4, 1),
  "light c4": (14, 7, 128, 4, 1),
  "bottleneck_g8 c3": (28, 7, 64, 8, 1),
  "cifar stage 1": (32, 8, 16, 2, 1),
  "cifar stage 3": (8, 8, 64, 2, 1),
  # A share-set is a group of one channel, through which several rows of channels pass in turn.
  "repmlpnet_t224 stage 3": (14, 14, 16, 16, 16),
  "repmlpnet_t224 stage 4": (7, 7, 128, 128, 4),
}


def batched(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Maps (N, H, W, C) by a kernel (g, h, w, C/g, h, w, C/g)."""
  groups, height, width = kernel.shape[:3]
  tiles = partition(x, (height, width))
  rows = tiles.reshape(*tiles.shape[:3], groups, -1).transpose(3, 0, 1, 2, 4)
  y = lax.batch_matmul(
    rows.reshape(groups, len(tiles), -1), kernel.reshape(groups, rows[0, 0].size, -1)
  )
  y = y.reshape(rows.shape).transpose(1, 2, 3, 0, 4).reshape(tiles.shape)
  return unpartition(y, (x.shape[1], x.shape[2]))


def eight_axes(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Computes the same as `batched`, over the axes of the tiles as they are."""
  groups, height, width = kernel.shape[:3]
  n, rows, columns, _ = x.shape
  split = x.reshape(n, rows // height, height, columns // width, width, groups, -1)
  y = lax.dot_general(split, kernel, (((2, 4, 6), (1, 2, 3)), ((5,), (0,))))
  return y.transpose(1, 2, 4, 3, 5, 0, 6).reshape(x.shape)


def grouped(x: jax.Array, taps: jax.Array) -> jax.Array:
  """Computes the same as `batched`; `as_taps` makes the kernel (1, 1, h * w * C/g, h * w * C)."""
  groups, side = taps.shape[3] // taps.shape[2], round((taps.shape[3] // x.shape[3]) ** 0.5)
  tiles = partition(x, (side, side))
  flat = tiles.reshape(*tiles.shape[:3], groups, -1).transpose(0, 3, 1, 2, 4)
  y = lax.conv_general_dilated(
    flat.reshape(len(tiles), 1, 1, -1),
    taps,
    (1, 1),
    "VALID",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=groups,
  )
  y = y.reshape(flat.shape).transpose(0, 2, 3, 1, 4).reshape(tiles.shape)
  return unpartition(y, (x.shape[1], x.shape[2]))


def as_taps(kernel: np.ndarray) -> np.ndarray:
  """Returns the kernel of a grouped 1x1 convolution, with the groups along the last axis."""
  matrices = kernel.reshape(len(kernel), np.prod(kernel.shape[1:4]), -1)
  return np.concatenate(list(matrices), axis=1)[None, None]


def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Computes the same as `batched`; `expand` makes the kernel (h * w * C, h * w * C)."""
  side = round((len(kernel) // x.shape[3]) ** 0.5)
  tiles = partition(x, (side, side))
  y = (tiles.reshape(len(tiles), -1) @ kernel).reshape(tiles.shape)
  return unpartition(y, (x.shape[1], x.shape[2]))


def expand(kernel: np.ndarray) -> np.ndarray:
  """Returns one matrix (h * w * C, h * w * C) for all groups, with zeros between the groups."""
  groups, height, width, inputs = kernel.shape[:4]
  whole = np.zeros((height, width, groups, inputs, height, width, groups, inputs), kernel.dtype)
  for group in range(groups):
    whole[:, :, group, :, :, :, group, :] = kernel[group]
  return whole.reshape(height * width * groups * inputs, -1)


FORMULATIONS: dict[str, tuple[Formulation, Callable[[np.ndarray], np.ndarray]]] = {
  "batched": (batched, lambda kernel: kernel),
  "eight axes": (eight_axes, lambda kernel: kernel),
  "grouped": (grouped, as_taps),
  "dense": (dense, expand),
}
"""Name to the function of the layer, which is timed, and the function that prepares its kernel."""


def measure_layer(name: str, batch_size: int, rounds: int) -> dict[str, Any]:
  """Compares the outputs of all formulations of a layer, and returns their milliseconds."""
  size, tile, channels, groups, rows = LAYERS[name]
  rng, inner = np.random.default_rng(0), channels // groups
  shape = (groups, tile, tile, inner, tile, tile, inner)
  kernel = rng.standard_normal(shape, np.float32) / np.float32(tile * inner**0.5)
  images = [rng.standard_normal((batch_size * rows, size, size, channels), np.float32)]
  forms = {
    form: timing.program(lambda own, x, function=function: function(x, own), prepare(kernel))
    for form, (function, prepare) in FORMULATIONS.items()
  }

  def agree(outputs: dict[str, np.ndarray]) -> None:
    timing.relative_errors(outputs, outputs["batched"], 1e-3)

  results = timing.race(forms, images, rounds=rounds, check=agree)
  medians = {form: 1e3 * result.median for form, result in results.items()}
  return {"layer": name, "batch_size": batch_size, "ms": medians}


def measure_model(name: str, batch_size: int, repeats: int, rounds: int) -> dict[str, Any]:
  """Times both forms of a model at its usual image size, and returns the row."""
  model, deploy = (repjax.create_model(name, deploy=form) for form in (False, True))
  size = image_size_of(model)
  variables = repjax.init(model, jax.random.key(0), size)
  params = jax.jit(repjax.reparameterize)(variables["params"], variables["batch_stats"])
  forms = {
    "train": timing.program(model.apply, variables),
    "deploy": timing.program(deploy.apply, {"params": params}),
  }
  images = timing.random_images(batch_size, size)
  results = timing.race(forms, images, rounds=rounds, repeats=repeats)
  train, plain = results["train"], results["deploy"]
  ratios = [timing.median_ratio(*pair) for pair in zip(train.seconds, plain.seconds)]
  found = analysis.summary(model, size)
  assert found.deploy is not None
  return {
    "model": name,
    "batch_size": batch_size,
    "train_ms": 1e3 * train.median,
    "deploy_ms": 1e3 * plain.median,
    "ratio": timing.median_ratio(train.all_seconds, plain.all_seconds),
    "ratio_of_each_repeat": ratios,
    "train_compile_s": statistics.median(train.compile_s),
    "deploy_compile_s": statistics.median(plain.compile_s),
    "image_size": size,
    "train": found.train._asdict(),
    "deploy": found.deploy._asdict(),
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--models", nargs="*", default=MODELS, help=f"default: {' '.join(MODELS)}")
  parser.add_argument(
    "--layers", nargs="*", choices=list(LAYERS), default=list(LAYERS), help="default: all"
  )
  parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8], help="default: 1 8")
  parser.add_argument("--repeats", type=int, default=3, help="times that all subjects start again")
  parser.add_argument("--rounds", type=int, default=20, help="rounds in each repeat")
  parser.add_argument("--json", type=Path, help="also write the results to this file")
  arguments = parser.parse_args()
  device = jax.devices()[0]
  processor = platform.processor() or platform.machine()
  print(
    f"{device.device_kind} ({processor}), {os.cpu_count()} CPUs, jax {jax.__version__}, float32"
  )
  models, layers = [], []
  with one_paragraph():
    for name in arguments.models:
      for batch_size in arguments.batch_sizes:
        row = measure_model(name, batch_size, arguments.repeats, arguments.rounds)
        models.append(row)
        print(f"{name}, batch {batch_size}, {row['image_size']} px: ratio {row['ratio']:.2f}")
        for form in ("train", "deploy"):
          cost = f"{row[form]['params']:>14,} parameters{row[form]['macs']:>16,} MACs"
          print(f"  {form:<8}{row[f'{form}_ms']:>9.1f} ms{cost}", flush=True)
    for name in arguments.layers:
      for batch_size in arguments.batch_sizes:
        row = measure_layer(name, batch_size, arguments.rounds)
        layers.append(row)
        times = "  ".join(f"{form} {value:.2f} ms" for form, value in row["ms"].items())
        print(f"FC3 of {name}, batch {batch_size}: {times}", flush=True)
  if arguments.json:
    facts = {"repeats": arguments.repeats, "rounds": arguments.rounds}
    timing.write_json(arguments.json, facts, models=models, layers=layers)


if __name__ == "__main__":
  main()
