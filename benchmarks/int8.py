"""The digits in float32, bfloat16 and 8 bits: a RepVGG, a RepMLP and a ParNet, one table each.

Networks that are not there yet are trained first, then fine-tuned in 8 bits, as by

    python main.py --config configs/digits.py
    python main.py --config configs/digits_qat.py

which takes some 15 minutes for all three on two cores. Each row is a file that ONNX Runtime runs on
all images of the test split (bfloat16: by JAX), its size, and the time of a call, in turns. "int8,
plain" is by ONNX Runtime's quantizer alone, "int8" with equalization and corrected biases too, as
repjax quantize makes it; the error of "int8, QAT" is against the same run's own float32.

Networks as small as these spend much of a call between their layers. How fast 8 bits are at full
size is timed beside, with random weights, which say nothing about accuracy.
"""

import argparse
import importlib
from pathlib import Path
from typing import Any

import jax
import timing
from repjax.cli.int8_rows import FLOAT, INT8, WEIGHTS

import repjax
from repjax import training
from repjax.cli import int8_rows
from repjax.errors import one_paragraph
from repjax.models import image_size_of
from repjax.onnx.proto import need_onnx
from repjax.quantization import runtime

NETWORKS = ("digits", "digits_repmlp", "digits_parnet")
PLAIN, QAT = "int8, plain", "int8, QAT"
AS_IT_IS = {"equalize": "none", "correct_bias": False}
FULL_SIZE = ("repvgg_a0", "repmlp_resnet50_light", "parnet_s")


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
  parser.add_argument("--full-size", nargs="*", default=FULL_SIZE, help="models that are timed")
  parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the runs are, or go")
  parser.add_argument("--batch-size", type=int, default=1, help="images a call, for speed")
  parser.add_argument("--rounds", type=int, default=50, help="of calls in turns, for speed")
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
  """Trains and fine-tunes a network, as far as that is not done."""
  if not (runs / name / "deploy").exists():
    training.train(config_of(name), runs / name)
  if not (runs / f"{name}_qat" / "int8").exists():
    config = config_of(f"{name}_qat")
    config.init_from = str(runs / name)
    training.train(config, runs / f"{name}_qat")


def config_of(name: str) -> Any:
  return importlib.import_module(f"configs.{name}").get_config()


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
  """Prints a network's table, and returns its rows for the file of results."""
  effort = {"batch_size": arguments.batch_size, "rounds": arguments.rounds}
  workdir = int8_rows.open_workdir(arguments.runs / name, 256)
  tuned = arguments.runs / f"{name}_qat"
  file = need_onnx().load(tuned / "int8" / "model.onnx")
  files = {
    WEIGHTS: repjax.quantization.quantize_weights(workdir.proto, workdir.images),
    PLAIN: repjax.quantization.quantize(workdir.proto, workdir.images, **AS_IT_IS),
    INT8: repjax.quantization.quantize(workdir.proto, workdir.images),
    QAT: file,
  }
  rows = int8_rows.measured(workdir, files, **effort)
  own = int8_rows.measured(int8_rows.open_workdir(tuned, 256), {QAT: file}, batch_size=1, rounds=1)
  rows[QAT] = rows[QAT]._replace(error=own[QAT].error)
  print(f"\n{name}: {workdir.spec.name}")
  int8_rows.print_rows(rows, arguments.batch_size)
  return {row: facts._asdict() for row, facts in rows.items()}


def measure_speed(name: str, arguments: argparse.Namespace) -> dict[str, float]:
  """Prints how long a model takes in float32 and int8, and returns seconds."""
  model = repjax.create_model(name, deploy=True)
  size = image_size_of(model)
  variables = repjax.init(model, jax.random.key(0), size)
  proto = repjax.onnx.to_onnx(model, variables, image_size=size)
  images = timing.random_images(max(4, arguments.batch_size), size)[0]
  files = {FLOAT: proto, INT8: repjax.quantization.quantize(proto, images, **AS_IT_IS)}
  sessions = {name: int8_rows.session(file) for name, file in files.items()}
  batch = images[: arguments.batch_size]
  found = int8_rows.speeds(sessions, batch, arguments.rounds // 5 + 1, calls=1)
  print(
    f"{name:<30}{f'{size} px':>8}{1e3 * found[FLOAT]:>10.2f}{1e3 * found[INT8]:>10.2f}"
    f"{found[FLOAT] / found[INT8]:>8.2f}x",
    flush=True,
  )
  return found


if __name__ == "__main__":
  main()
