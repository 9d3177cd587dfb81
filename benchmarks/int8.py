"""Compares float32, bfloat16 and 8 bits on the digits: a table for RepVGG, RepMLP and ParNet each.

A network that is missing is trained first, and then fine-tuned in 8 bits, as by

  repjax train --config digits
  repjax train --config digits_qat

For all three networks this takes about 15 minutes on two cores. Each row of a table is a file that
ONNX Runtime runs on all test images; bfloat16 runs in JAX. The columns are accuracy, loss, error of
the logits, size, and the time of a call.

  int8, plain   quantized by ONNX Runtime's quantizer alone
  int8          also equalized and with corrected biases, as by `repjax quantize`
  int8, QAT     fine-tuned in 8 bits; its error is against the float32 file of the same run

Small networks spend much of a call between their layers. The last table therefore times models at
full size, with random weights.

Example:
  python benchmarks/int8.py --json benchmarks/results/int8.json
"""

import argparse
import importlib
import statistics
from pathlib import Path
from typing import Any

import jax
import timing

import repjax
from repjax import runs as workdir_files
from repjax import training
from repjax.cli import int8_table
from repjax.cli.int8_table import FLOAT, INT8, WEIGHTS
from repjax.errors import one_paragraph
from repjax.models import image_size_of
from repjax.onnx.proto import need_onnx
from repjax.quantization import runtime

NETWORKS = ("digits", "digits_repmlp", "digits_parnet")
PLAIN, QAT = "int8, plain", "int8, QAT"
PLAIN_OPTIONS = {"equalize": "none", "correct_bias": False}
FULL_SIZE = ("repvgg_a0", "repmlp_resnet50_light", "parnet_s")


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--networks", nargs="+", choices=NETWORKS, default=NETWORKS, help="default: all"
  )
  parser.add_argument(
    "--full-size", nargs="*", default=FULL_SIZE, help="models to time at full size"
  )
  parser.add_argument(
    "--runs", type=Path, default=Path("runs"), help="folder of the runs (default: runs)"
  )
  parser.add_argument("--batch-size", type=int, default=1, help="images in a timed call")
  parser.add_argument("--rounds", type=int, default=50, help="rounds of timed calls")
  parser.add_argument("--json", type=Path, help="also write the results to this file")
  arguments = parser.parse_args()
  with one_paragraph():
    runtime.need_runtime()
    for name in arguments.networks:
      make_runs(arguments.runs, name)
    found = {name: measure(name, arguments) for name in arguments.networks}
    milliseconds = f"ms, batch {arguments.batch_size}"
    print(f"\n{'full size, random weights':<38}{FLOAT:>10}{INT8:>10}{'':>9}  {milliseconds}")
    speeds = {name: measure_speed(name, arguments) for name in arguments.full_size}
  if arguments.json:
    facts = {"batch_size": arguments.batch_size, "rounds": arguments.rounds}
    timing.write_json(arguments.json, facts, networks=found, full_size=speeds)


def make_runs(runs: Path, name: str) -> None:
  """Trains and fine-tunes a network, unless its folders exist."""
  if not workdir_files.deploy_folder(runs / name).exists():
    training.train(config_of(name), runs / name)
  if not workdir_files.int8_folder(runs / f"{name}_qat").exists():
    config = config_of(f"{name}_qat")
    config.init_from = str(runs / name)
    training.train(config, runs / f"{name}_qat")


def config_of(name: str) -> Any:
  """Returns a config by name."""
  return importlib.import_module(f"repjax.configs.{name}").get_config()


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
  """Prints a network's table, and returns its rows."""
  effort = {"batch_size": arguments.batch_size, "rounds": arguments.rounds}
  baseline = int8_table.read_baseline(arguments.runs / name, 256)
  tuned = arguments.runs / f"{name}_qat"
  file = need_onnx().load(workdir_files.onnx_file(workdir_files.int8_folder(tuned)))
  files = {
    WEIGHTS: repjax.quantization.quantize_weights(baseline.proto, baseline.images),
    PLAIN: repjax.quantization.quantize(baseline.proto, baseline.images, **PLAIN_OPTIONS),
    INT8: repjax.quantization.quantize(baseline.proto, baseline.images),
    QAT: file,
  }
  rows = int8_table.measure(baseline, files, **effort)
  # Fine-tuning changed the weights, so the error is against the float32 file of that run.
  fine_tuned = int8_table.read_baseline(tuned, 256)
  row = int8_table.measure(fine_tuned, {QAT: file}, batch_size=1, rounds=1)[QAT]
  rows[QAT] = rows[QAT]._replace(error=row.error)
  print(f"\n{name}: {baseline.spec.name}")
  int8_table.print_rows(rows, arguments.batch_size)
  return {name: row.facts() for name, row in rows.items()}


def measure_speed(name: str, arguments: argparse.Namespace) -> dict[str, float]:
  """Prints the time of a call in float32 and int8, and returns the seconds."""
  model = repjax.create_model(name, deploy=True)
  size = image_size_of(model)
  variables = repjax.init(model, jax.random.key(0), size)
  proto = repjax.onnx.to_onnx(model, variables, image_size=size)
  images = timing.random_images(max(4, arguments.batch_size), size)[0]
  files = {FLOAT: proto, INT8: repjax.quantization.quantize(proto, images, **PLAIN_OPTIONS)}
  sessions = {name: int8_table.session(file) for name, file in files.items()}
  batch = images[: arguments.batch_size]
  found = int8_table.speeds(sessions, batch, arguments.rounds // 5 + 1, calls=1)
  medians = {name: statistics.median(seconds) for name, seconds in found.items()}
  print(
    f"{name:<30}{f'{size} px':>8}{1e3 * medians[FLOAT]:>10.2f}{1e3 * medians[INT8]:>10.2f}"
    f"{int8_table.speed(found[FLOAT], found[INT8]):>9}",
    flush=True,
  )
  return medians


if __name__ == "__main__":
  main()
