"""Quantizes a workdir's deploy form to int8 for ONNX Runtime, and says what that costs and gives.

repjax quantize --workdir runs/digits --to exported/digits-int8
repjax quantize --workdir runs/digits --to exported/digits-int8 --float-layers 2
repjax quantize --workdir runs/digits --compare
repjax quantize --workdir runs/digits --to exported/digits-small --weights-only

Ranges are calibrated, and layers ranked, on images of the training split; accuracy is that on the
evaluation split. `--compare` measures each thing that can be done about a loss; without `--to` no
folder is written. `--weights-only` ranks nothing, since a ranking is of full int8.
"""

import argparse
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import repjax
from repjax.cli import int8_rows
from repjax.cli.int8_rows import FLOAT, INT8, WEIGHTS
from repjax.deploy.export import onnx_facts, write_folder
from repjax.errors import InputError, one_paragraph
from repjax.quantization import Sensitivity, processor, runtime
from repjax.quantization.equalization import EQUALIZATIONS


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(
    prog="repjax quantize",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--workdir", required=True, type=Path, help="folder of a run or an import")
  parser.add_argument("--to", type=Path, help="the folder to be made")
  parser.add_argument("--dataset", help="a TFDS name instead of the run's own, or synthetic")
  parser.add_argument("--split", help="for accuracy, instead of the run's own")
  parser.add_argument("--calibration-split", help="instead of the run's training split")
  parser.add_argument("--data-dir", help="where TFDS keeps the data set")
  parser.add_argument("--num-workers", type=int, help="processes that read images")
  parser.add_argument("--images", type=int, default=256, help="to calibrate with")
  parser.add_argument("--weights-only", action="store_true", help="write int8 weights alone")
  parser.add_argument("--calibration", choices=runtime.CALIBRATIONS, default="minmax")
  parser.add_argument(
    "--activations", choices=runtime.ACTIVATIONS, default="uint8", help="int8 for TensorRT"
  )
  parser.add_argument("--per-tensor", action="store_true", help="one scale for a whole kernel")
  parser.add_argument(
    "--weight-bits",
    type=int,
    choices=(7, 8),
    help="default: 7 with uint8 activations, where 8 is for CPUs with VNNI; 8 with int8",
  )
  parser.add_argument("--equalize", choices=EQUALIZATIONS, default="activations")
  parser.add_argument("--no-bias-correction", action="store_true", help="leave biases alone")
  parser.add_argument("--float-layers", type=int, default=0, metavar="N", help="the worst N")
  parser.add_argument("--compare", action="store_true", help="a row for each measure")
  parser.add_argument("--batch-size", type=int, default=1, help="images a call, for speed")
  parser.add_argument("--rounds", type=int, default=30, help="of calls in turns, for speed")
  with one_paragraph():
    quantize(parser.parse_args(argv))


def quantize(flags: argparse.Namespace) -> None:
  """Does what the flags say, printing as it goes."""
  if flags.to and flags.to.exists():
    raise InputError(f"{flags.to} exists already; give another path, or remove it first")
  if flags.float_layers < 0 or flags.rounds < 1 or flags.batch_size < 1:
    raise InputError("--float-layers is at least 0, --rounds and --batch-size are at least 1")
  if flags.weights_only and flags.float_layers:
    raise InputError("--weights-only takes the weights of all layers; leave out --float-layers")
  runtime.need_runtime()
  workdir = int8_rows.open_workdir(
    flags.workdir,
    flags.images,
    dataset=flags.dataset,
    eval_split=flags.split,
    train_split=flags.calibration_split,
    data_dir=flags.data_dir,
    num_workers=flags.num_workers,
  )
  proto, images = workdir.proto, workdir.images
  chosen = settings_of(flags)
  full = not flags.weights_only
  eight = flags.compare or (full and chosen["weight_bits"] == 8)
  if eight and chosen["activations"] == "uint8" and processor.saturates():
    print(processor.SATURATES, "--weight-bits 7")
  ranked = ranking(proto, images, flags.float_layers, chosen) if full else []
  files = {WEIGHTS: repjax.quantization.quantize_weights(proto, images)}
  if full:
    chosen["float_layers"] = [row.node for row in ranked[: flags.float_layers]]
    files[INT8] = repjax.quantization.quantize(proto, images, **chosen)
  for name, changes in measures(ranked, flags.float_layers).items() if flags.compare else ():
    print(f"quantizing: {name}", flush=True)
    files[name] = repjax.quantization.quantize(proto, images, **chosen | changes)
  rows = int8_rows.measured(workdir, files, batch_size=flags.batch_size, rounds=flags.rounds)
  print()
  int8_rows.print_rows(rows, flags.batch_size)
  config = workdir.config
  print(
    f"accuracy on every image of {config.dataset}'s {config.eval_split} split, calibrated with "
    f"{len(images)} of its {config.train_split} split; error: of the logits against float32"
  )
  if flags.compare:
    print("int8: as the flags say; plain: so, but neither equalized nor with corrected biases")
  if flags.to:
    name = INT8 if full else WEIGHTS
    write(flags.to, files[name], workdir, name, rows, ranked, chosen)


def ranking(
  proto: Any, images: np.ndarray, left: int, chosen: Mapping[str, Any]
) -> list[Sensitivity]:
  """The layers, the worst first, which are printed too; `left` of them stay in float."""
  ranked = repjax.quantization.sensitivity(proto, images, **chosen)
  if not 0 <= left < len(ranked):
    raise InputError(f"--float-layers takes 0 to {len(ranked) - 1}, got {left}")
  print_sensitivity(ranked, left)
  return ranked


def settings_of(flags: argparse.Namespace) -> dict[str, Any]:
  """What `repjax.quantization.quantize` and `sensitivity` take."""
  return {
    "activations": flags.activations,
    "calibration": flags.calibration,
    "per_channel": not flags.per_tensor,
    "weight_bits": flags.weight_bits or (8 if flags.activations == "int8" else 7),
    "equalize": flags.equalize,
    "correct_bias": not flags.no_bias_correction,
  }


def measures(ranked: Sequence[Sensitivity], left: int) -> dict[str, dict[str, Any]]:
  """What `--compare` tries, as changes to what was chosen, with `left` layers in float."""
  worst = [row.node for row in ranked]
  counts = [count for count in (1, 2, 4) if count < len(worst) and count != left]
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
    **{f"int8, {count} in float32": {"float_layers": worst[:count]} for count in counts},
  }


def print_sensitivity(ranked: Sequence[Sensitivity], left: int) -> None:
  width = 2 + max(len(row.layer) for row in ranked)
  print(f"{'layer alone in int8':<{width}}{'error':>9}{'changed':>9}")
  for number, row in enumerate(ranked):
    kept = "  left in float32" if number < left else ""
    print(f"{row.layer:<{width}}{row.error:>9.2%}{row.changed:>9.2%}{kept}")
  print("on the images that calibrate: error of the logits, and images with another first class")


def write(
  folder: Path,
  proto: Any,
  workdir: int8_rows.Workdir,
  name: str,
  rows: Mapping[str, int8_rows.Row],
  ranked: Sequence[Sensitivity],
  chosen: Mapping[str, Any],
) -> None:
  """Writes the folder: of full int8 with the ranking, in a picture too where matplotlib is."""
  spec = workdir.spec
  facts = onnx_facts(spec, name) | {
    "calibration_images": len(workdir.images),
    "accuracy": {key: rows[key].accuracy for key in (FLOAT, name)},
    "error": rows[name].error,
  }
  files = {"model.onnx": proto.SerializeToString()}
  if name == INT8:
    facts |= {"settings": chosen, "sensitivity": [row._asdict() for row in ranked]}
    files |= pictures(f"{spec.name}: what int8 costs, layer by layer", ranked, chosen)
  write_folder(folder, files, spec, facts)
  print(f"saved: {folder}")


def pictures(
  title: str, ranked: Sequence[Sensitivity], chosen: Mapping[str, Any]
) -> dict[str, bytes]:
  """The picture of a ranking, if matplotlib is installed, by the name of its file."""
  if not importlib.util.find_spec("matplotlib"):
    print("no picture, which needs matplotlib: pip install 'repjax[report]'")
    return {}
  from repjax.quantization.drawing import picture

  return {"sensitivity.png": picture(ranked, chosen["float_layers"], title)}
