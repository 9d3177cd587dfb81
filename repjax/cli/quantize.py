"""Quantizes a model's deploy form to int8 for ONNX Runtime, and prints the loss and the gain.

Examples:
  repjax quantize --workdir runs/digits --to exported/digits-int8
  repjax quantize --workdir runs/digits --to exported/digits-int8 --float-layers 2
  repjax quantize --workdir runs/digits --compare
  repjax quantize --workdir runs/digits --to exported/digits-small --weights-only

Images of the training split calibrate the ranges, and rank the layers by the error that 8 bits
cause. The ranking quantizes the network once for each layer, and --no-ranking leaves it out.
Accuracy, or mean IoU, is measured on the evaluation split. Without --to no folder is written. A
file for segmentation takes images of one size: the canvas of the evaluation split, or the run's
window.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import repjax
from repjax import extras
from repjax.cli import flags
from repjax.errors import InputError, one_paragraph

if TYPE_CHECKING:
  import numpy as np

  from repjax.cli.int8_table import Baseline, Int8Row
  from repjax.quantization import Sensitivity


def main(argv: Sequence[str]) -> None:
  """Quantizes the model that the flags name."""
  with one_paragraph():
    quantize(parse(argv))


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """Returns the parsed flags."""
  parser = flags.parser("quantize", __doc__)
  flags.add(parser, "--workdir")
  flags.add(parser, "--to", "--dataset", "--split", "--data-dir", "--num-workers", "--no-verify")
  parser.add_argument(
    "--calibration-split",
    metavar="SPLIT",
    help="split to calibrate on (default: the run's training split)",
  )
  parser.add_argument(
    "--images", type=int, default=256, metavar="N", help="calibration images (default: 256)"
  )
  parser.add_argument(
    "--weights-only",
    action="store_true",
    help="store weights in 8 bits and compute in float32; no layer is ranked",
  )
  parser.add_argument(
    "--calibration",
    default="minmax",
    help="how ranges follow from the calibration images: minmax, entropy or percentile "
    "(default: minmax)",
  )
  parser.add_argument(
    "--activations",
    default="uint8",
    help="type of activations: uint8, or int8 for TensorRT (default: uint8)",
  )
  parser.add_argument(
    "--per-tensor",
    action="store_true",
    help="one scale for a whole kernel instead of one for each output channel",
  )
  parser.add_argument(
    "--weight-bits",
    type=int,
    choices=(7, 8),
    help="bits of weights (default: 7 with uint8 activations, 8 with int8); 8 bits with uint8 "
    "activations need a CPU with VNNI",
  )
  parser.add_argument(
    "--equalize",
    default="activations",
    help="rescale channels between layers by the ranges of activations or weights, or none "
    "(default: activations)",
  )
  parser.add_argument(
    "--no-bias-correction", action="store_true", help="do not correct biases for rounded weights"
  )
  parser.add_argument(
    "--float-layers",
    type=int,
    default=0,
    metavar="N",
    help="leave the N layers with the largest error in float32 (default: 0)",
  )
  parser.add_argument(
    "--no-ranking",
    action="store_true",
    help="do not rank the layers, which takes most of the time of deep networks",
  )
  parser.add_argument(
    "--compare", action="store_true", help="add a row for each option that can reduce the loss"
  )
  parser.add_argument(
    "--timed-images", type=int, default=1, metavar="N", help="images in a timed call (default: 1)"
  )
  parser.add_argument(
    "--timed-rounds", type=int, default=30, metavar="N", help="rounds of timed calls (default: 30)"
  )
  return parser.parse_args(argv)


def quantize(arguments: argparse.Namespace) -> None:
  """Does what the flags ask for, and prints the table.

  Raises:
    InputError: a flag's value cannot be used, or the folder of --to exists.
  """
  check(arguments)
  from repjax.cli import int8_table
  from repjax.quantization import processor, runtime
  from repjax.training.display import title, views

  runtime.need_runtime()
  baseline = int8_table.read_baseline(
    arguments.workdir,
    arguments.images,
    eval_split=arguments.split,
    train_split=arguments.calibration_split,
    verify=arguments.verify,
    **flags.config_changes(arguments),
  )
  proto, images = baseline.proto, baseline.images
  options = options_of(arguments)
  full = not arguments.weights_only
  eight_bits = arguments.compare or (full and options["weight_bits"] == 8)
  if eight_bits and options["activations"] == "uint8" and processor.saturates():
    print(processor.SATURATES, "--weight-bits 7")
  ranking = full and not arguments.no_ranking
  ranked = rank(proto, images, arguments.float_layers, options) if ranking else []
  files = {int8_table.WEIGHTS: repjax.quantization.quantize_weights(proto, images)}
  if full:
    options["float_layers"] = [row.node for row in ranked[: arguments.float_layers]]
    files[int8_table.INT8] = repjax.quantization.quantize(proto, images, **options)
  for name, changes in (
    alternatives(ranked, arguments.float_layers).items() if arguments.compare else ()
  ):
    print(f"quantizing: {name}", flush=True)
    files[name] = repjax.quantization.quantize(proto, images, **options | changes)
  rows = int8_table.measure(
    baseline, files, batch_size=arguments.timed_images, rounds=arguments.timed_rounds
  )
  print()
  int8_table.print_rows(rows, arguments.timed_images)
  config = baseline.config
  print(
    f"{title(baseline.task.scores[0])} on every image of {config.dataset}'s {config.eval_split} "
    f"split{views(config)}, calibrated with {len(images)} of its {config.train_split} split; "
    "error: of the logits against float32"
  )
  if arguments.compare:
    print("int8: as the flags say; plain: the same without equalization and bias correction")
  if arguments.to:
    name = int8_table.INT8 if full else int8_table.WEIGHTS
    write(arguments.to, files[name], baseline, name, rows, ranked, options)


def check(arguments: argparse.Namespace) -> None:
  """Raises InputError for flags that no file can satisfy."""
  from repjax import disk

  if arguments.to:
    disk.check_new(arguments.to)
  if arguments.float_layers < 0 or arguments.timed_rounds < 1 or arguments.timed_images < 1:
    raise InputError(
      "--float-layers is at least 0; --timed-rounds and --timed-images are at least 1"
    )
  if arguments.weights_only and arguments.float_layers:
    raise InputError("--weights-only takes the weights of all layers; leave out --float-layers")
  if arguments.no_ranking and (arguments.float_layers or arguments.compare):
    raise InputError(
      "--float-layers and --compare need the ranking of the layers; leave out --no-ranking"
    )


def rank(
  proto: Any, images: np.ndarray, count: int, options: Mapping[str, Any]
) -> list[Sensitivity]:
  """Returns the layers, largest error first, and prints them.

  Args:
    proto: the ONNX model in float32.
    images: calibration images, uint8 (N, S, S, 3).
    count: number of layers that stay in float32.
    options: from `options_of`.

  Raises:
    InputError: no layer would be left in 8 bits.
  """
  from repjax.quantization.graph import layers_of

  layers = len(layers_of(proto))
  print(
    f"ranking {layers} layers: each one is quantized alone. --no-ranking leaves this out",
    flush=True,
  )
  start = time.perf_counter()
  ranked = repjax.quantization.sensitivity(proto, images, **options)
  print(f"ranked in {time.perf_counter() - start:.0f} s")
  if not 0 <= count < len(ranked):
    raise InputError(f"--float-layers takes 0 to {len(ranked) - 1}, got {count}")
  print_sensitivity(ranked, count)
  return ranked


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
  """Returns keyword arguments for `repjax.quantization.quantize` and `sensitivity`."""
  return {
    "activations": arguments.activations,
    "calibration": arguments.calibration,
    "per_channel": not arguments.per_tensor,
    "weight_bits": arguments.weight_bits or (8 if arguments.activations == "int8" else 7),
    "equalize": arguments.equalize,
    "correct_bias": not arguments.no_bias_correction,
  }


def alternatives(ranked: Sequence[Sensitivity], count: int) -> dict[str, dict[str, Any]]:
  """Returns the rows that --compare adds: name to the changed options.

  Args:
    ranked: from `rank`.
    count: number of layers that the flags leave in float32.
  """
  worst = [row.node for row in ranked]
  counts = [each for each in (1, 2, 4) if each < len(worst) and each != count]
  plain = {"equalize": "none", "correct_bias": False}
  return {
    "plain": plain,
    "plain, a scale for a kernel": plain | {"per_channel": False},
    "plain, 8 bits in weights": plain | {"weight_bits": 8},
    "plain, equalized weights": plain | {"equalize": "weights"},
    "plain, equalized activations": plain | {"equalize": "activations"},
    "plain, corrected biases": plain | {"correct_bias": True},
    "int8, 8 bits in weights": {"weight_bits": 8},
    "int8, entropy": {"calibration": "entropy"},
    "int8, percentile": {"calibration": "percentile"},
    "int8, symmetric, 8 bits": {"activations": "int8", "weight_bits": 8},
    **{f"int8, {each} in float32": {"float_layers": worst[:each]} for each in counts},
  }


def print_sensitivity(ranked: Sequence[Sensitivity], count: int) -> None:
  """Prints a row for each layer; the first `count` layers stay in float32."""
  width = 2 + max(len(row.layer) for row in ranked)
  print(f"{'layer alone in int8':<{width}}{'error':>9}{'changed':>9}")
  for number, row in enumerate(ranked):
    kept = "  left in float32" if number < count else ""
    print(f"{row.layer:<{width}}{row.error:>9.2%}{row.changed:>9.2%}{kept}")
  print(
    "on the calibration images: error of the logits, and share of images, or pixels, with a "
    "different first class"
  )


def write(
  folder: Path,
  proto: Any,
  baseline: Baseline,
  name: str,
  rows: Mapping[str, Int8Row],
  ranked: Sequence[Sensitivity],
  options: Mapping[str, Any],
) -> None:
  """Writes the folder of an int8 file.

  A file in full int8 comes with the ranking of its layers, if they were ranked, and with a picture
  of the ranking where matplotlib is installed.

  Args:
    folder: folder to make.
    proto: the `onnx.ModelProto` to write.
    baseline: the float32 model.
    name: row of the file in the table.
    rows: the table.
    ranked: from `rank`, or empty.
    options: options that the file was quantized with.
  """
  from repjax import runs
  from repjax.cli.int8_table import FLOAT, INT8
  from repjax.deploy.export import onnx_facts
  from repjax.onnx import metadata

  spec = baseline.spec
  facts = onnx_facts(spec, name, baseline.size) | {
    "calibration_images": len(baseline.images),
    **{
      score: {key: rows[key].scores[score] for key in (FLOAT, name)}
      for score in baseline.task.scores
    },
    "error": rows[name].error,
  }
  files = metadata.files(runs.onnx_file(folder).name, proto, spec.preprocessing, spec.class_names)
  if name == INT8:
    facts |= {"settings": options, "sensitivity": [row._asdict() for row in ranked]}
  if ranked:
    files |= draw(f"{spec.name}: what int8 costs, layer by layer", ranked, options["float_layers"])
  runs.write_export(folder, files, spec=spec.to_json(), facts=facts)
  print(f"saved: {folder}")


def draw(
  title: str, ranked: Sequence[Sensitivity], float_layers: Sequence[str]
) -> dict[str, bytes]:
  """Returns the picture of a ranking as {name of the file: PNG}, or {} without matplotlib."""
  if not extras.is_installed("matplotlib"):
    print(extras.missing("matplotlib", "a picture of the ranking"))
    return {}
  from repjax.quantization.drawing import picture

  return {"sensitivity.png": picture(ranked, float_layers, title)}
