"""Times a model's inference in repjax, PyTorch, ONNX Runtime and OpenVINO, in turns in one process.

A subject is left out where its libraries are not installed (pip install 'repjax[bench]').

  repjax-train-form   the training form in evaluation mode
  repjax-deploy       the deploy form, by repjax.deploy.compile
  repjax-untuned      the same, without measuring which convolution algorithm is fastest
  repjax-graphs       the same, with convolutions in CUDA graphs (on GPUs)
  torch-eager         the deploy form with the same weights in PyTorch, channels last
  torch-compile       the same, by torch.compile
  onnxruntime         the deploy form, exported by PyTorch, in ONNX Runtime (on CPUs)
  openvino            the same in OpenVINO (on CPUs)
  repjax-onnxruntime  the deploy form, exported by repjax, in ONNX Runtime (on CPUs)
  repjax-openvino     the same in OpenVINO (on CPUs)

The outputs of all subjects are compared before anything is timed. Every subject has one turn in
each round, so that all meet the same noise. Times are medians with quartiles. The columns:

  to best     the time of the fastest subject outside repjax, divided by the subject's time: the
              median over the rounds; above 1 the subject is faster
  start       time from the network to its first output, compilation included
  memory      bytes that XLA plans; for PyTorch on a GPU, the most bytes that it held
  GFLOP/s     two FLOP for each multiply-accumulate of the definition; an algorithm with fewer
              multiplications shows more
  of matmul   GFLOP/s divided by those of a large matrix product in JAX, same rounds and dtype

On a machine that other programs use, measure CPU time on one core.

With --training, the subjects are training steps: forward pass, backward pass and update. The table
has three more columns, of what XLA plans for each device:

  temporary   bytes of intermediate values
  arguments   bytes of the state and the images
  accessed    bytes that operations read and write, where a value counts at each use; an estimate

Examples:
  python benchmarks/inference.py --models repvgg_a0 --batch-sizes 1 8 --image-size 224
  taskset -c 0 python benchmarks/inference.py --cpu-time
  python benchmarks/inference.py --training --models repvgg_a0 --batch-sizes 8
"""

import argparse
import importlib.metadata
import importlib.util
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import subjects
import timing
from subjects import DTYPES, Kind, Task

from repjax.errors import InputError, one_paragraph

TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
TOLERANCE_TF32 = 2e-2
"""Largest relative errors against float32. GPUs compute float32 in TF32, in JAX and in PyTorch."""

BUSY = 0.7
WARNING = (
  "  other programs use this machine: turns are unfair to threads that wait for each other, as in\n"
  "  PyTorch; measure again when the machine is idle, or measure one core with --cpu-time"
)
"""A warning, printed where the load per CPU exceeds BUSY."""

MATMUL = "matrix product"
PACKAGES = ("torch", "onnxruntime", "openvino")

Row = dict[str, Any]


def chosen(
  kinds: Mapping[str, Kind], task: Task, names: list[str] | None
) -> dict[str, timing.Subject]:
  """Returns the subjects that can do a task, and prints why the rest cannot.

  Args:
    kinds: name to kind of all subjects.
    task: the model, batch size and dtype.
    names: subjects to time; None: all.

  Raises:
    InputError: a subject in `names` is unknown or not installed, or no subject is left.
  """
  made = {}
  for name in names or kinds:
    if name not in kinds:
      raise InputError(f"{name} is no subject here; there are: {', '.join(kinds)}")
    reason = subjects.why_not(kinds[name], task)
    if reason is None:
      made[name] = kinds[name].make(task)
    elif names and "installed" in reason:
      raise InputError(f"{name} is {reason}")
    else:
      print(f"  without {name}: {reason}", flush=True)
  if not made:
    raise InputError(f"no subject is left for {task.name} in {task.dtype}; see the reasons above")
  return made


def matrix_product(dtype: str) -> tuple[timing.Subject, int]:
  """Returns a large product of square matrices in JAX, and its FLOP."""
  size = 1024 if jax.default_backend() == "cpu" else 8192
  matrix = jnp.full((size, size), 0.5, DTYPES[dtype])
  subject = timing.program(jnp.matmul, matrix)
  return subject._replace(prepare=lambda images: matrix), 2 * size**3


def tolerance(dtype: str) -> float:
  """Returns the largest relative error against the deploy form in float32."""
  on_gpu = jax.default_backend() != "cpu"
  return TOLERANCE_TF32 if dtype == "float32" and on_gpu else TOLERANCES[dtype]


def measure(
  kinds: Mapping[str, Kind], task: Task, names: list[str] | None, **race: Any
) -> list[Row]:
  """Times all subjects on one model, batch size and dtype, and returns their rows.

  Args:
    kinds: name to kind of all subjects.
    task: the model, batch size and dtype.
    names: subjects to time; None: all.
    **race: keyword arguments of `timing.race`.
  """
  running = chosen(kinds, task, names)
  product, product_flops = matrix_product(task.dtype)
  errors: dict[str, float] = {}

  def check(outputs: dict[str, np.ndarray]) -> None:
    # On several devices, our programs pad a batch to a multiple of their number.
    found = {name: value for name, value in outputs.items() if name != MATMUL}
    outputs = {name: y[: task.batch_size] if y.ndim else y for name, y in found.items()}
    expected = task.expected(outputs)
    errors.update(timing.relative_errors(outputs, expected, tolerance(task.dtype)))

  results = timing.race({**running, MATMUL: product}, task.inputs, check=check, **race)
  rate = product_flops / results.pop(MATMUL).median
  rows = rows_of(results, task.batch_size, {name: task.flops(name) for name in results}, rate)
  facts = {"model": task.name, "batch_size": task.batch_size, "dtype": task.dtype}
  return [facts | row | {"relative_error": errors[row["subject"]]} for row in rows]


def best_peer(results: Mapping[str, timing.Result]) -> str | None:
  """Returns the fastest subject outside repjax, or None."""
  peers = [name for name in results if not name.startswith("repjax")]
  return min(peers, key=lambda name: results[name].median, default=None)


def rows_of(
  results: Mapping[str, timing.Result], batch_size: int, flops: Mapping[str, int], rate: float
) -> list[Row]:
  """Returns the row of each subject, for the table and the file.

  Args:
    results: name of a subject to its measurements.
    batch_size: images in a call.
    flops: name of a subject to the FLOP of a call.
    rate: FLOP/s of a large matrix product.
  """
  best, rows = best_peer(results), []
  for name, result in results.items():
    seconds = result.all_seconds
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    own = flops[name] / result.median
    rows.append(
      {
        "subject": name,
        "ms": 1e3 * result.median,
        "ms_quartiles": [1e3 * low, 1e3 * high],
        "images_per_s": batch_size / result.median,
        "best_peer": best,
        "to_best": timing.median_ratio(results[best].all_seconds, seconds) if best else None,
        "start_s": result.compile_s[0],
        "memory_mib": _mib(result.memory),
        **{
          f"{field}_mib": _mib(result.plan and getattr(result.plan, field))
          for field in timing.Plan._fields
        },
        "gflops": own / 1e9,
        "matmul_gflops": rate / 1e9,
        "of_matmul": own / rate,
        "ms_of_each_round": [[1e3 * value for value in repeat] for repeat in result.seconds],
      }
    )
  return rows


def _mib(count: int | None) -> float | None:
  """Returns bytes in MiB."""
  return None if count is None else count / 2**20


HEADER = (
  f"{'model':<14}{'batch':>6} {'dtype':<9}{'subject':<18}{'ms':>9}{'quartiles':>16}{'images/s':>10}"
  f"{'to best':>9}{'start':>9}{'memory':>11}{'GFLOP/s':>9}{'of matmul':>10}"
)
PLAN_HEADER = "".join(f"{field:>13}" for field in timing.Plan._fields)


def line(row: Row, plan: bool = False) -> str:
  """Returns the line of a row in the table; with `plan`, also what XLA plans."""

  def cell(name: str, form: str, unit: str, width: int) -> str:
    value = row[name]
    return ("-" if value is None else f"{value:{form}}{unit}").rjust(width)

  low, high = row["ms_quartiles"]
  return (
    f"{row['model']:<14}{row['batch_size']:>6} {row['dtype']:<9}{row['subject']:<18}"
    + cell("ms", ".2f", "", 9)
    + f"{low:.2f}-{high:.2f}".rjust(16)
    + cell("images_per_s", ",.1f", "", 10)
    + cell("to_best", ".2f", "", 9)
    + cell("start_s", ".1f", " s", 9)
    + cell("memory_mib", ",.0f", " MiB", 11)
    + cell("gflops", ",.0f", "", 9)
    + cell("of_matmul", ".0%", "", 10)
    + "".join(cell(f"{field}_mib", ",.0f", " MiB", 13) for field in timing.Plan._fields if plan)
  )


def versions() -> dict[str, str]:
  """Returns the versions of the installed libraries that repjax is compared with."""
  found = [name for name in PACKAGES if importlib.util.find_spec(name)]
  return {name: importlib.metadata.version(name) for name in found}


def parse() -> argparse.Namespace:
  """Returns the parsed flags."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--training", action="store_true", help="time training steps")
  parser.add_argument("--models", nargs="+", default=["repvgg_a0"], help="default: repvgg_a0")
  parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8], help="default: 1 8")
  parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
  parser.add_argument("--subjects", nargs="+", help="default: all installed subjects")
  parser.add_argument("--image-size", type=int, default=224, help="pixels (default: 224)")
  parser.add_argument("--rounds", type=int, default=15, help="rounds in each repeat")
  parser.add_argument("--repeats", type=int, default=1, help="times that all subjects start again")
  parser.add_argument(
    "--calls",
    type=int,
    default=1,
    help="calls before each wait: 1 measures latency, more measure throughput",
  )
  parser.add_argument(
    "--cpu-time",
    action="store_true",
    help="measure CPU time instead, on one core; other programs do not disturb it",
  )
  parser.add_argument("--json", type=Path, help="also write the results to this file")
  parser.add_argument(
    "--plot", type=Path, help="draw accuracy against speed into this file; needs matplotlib"
  )
  return parser.parse_args()


def main() -> None:
  arguments = parse()
  # By default JAX reserves most of a GPU's memory, and leaves too little for PyTorch.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  with one_paragraph():
    run(arguments)


def check_one_core(machine: Mapping[str, Any]) -> None:
  """Raises InputError where CPU time differs from the time that a user would wait."""
  if jax.default_backend() != "cpu" or machine["cpus"] > 1:
    on_cpu = jax.default_backend() == "cpu"
    place = f"{machine['cpus']} CPUs" if on_cpu else machine["device"]
    raise InputError(
      f"--cpu-time adds up the time of parallel threads, and this process runs on {place}. Run it "
      "on one core of a CPU: taskset -c 0 python ..."
    )


def run(arguments: argparse.Namespace) -> None:
  """Prints the table, and writes the files that the flags name."""
  new, kinds = Task, subjects.KINDS
  if arguments.training:
    import training_subjects  # loads Optax and the rest of training

    new, kinds = training_subjects.TrainingTask, training_subjects.KINDS
  names = ("rounds", "repeats", "calls")
  race: dict[str, Any] = {name: getattr(arguments, name) for name in names}
  names = ("training", "image_size", "cpu_time", *names)
  facts = {**versions(), **{name: getattr(arguments, name) for name in names}}
  machine = timing.machine()
  if arguments.cpu_time:
    check_one_core(machine)
    race["clock"] = timing.cpu_time
  print(", ".join(f"{name} {value}" for name, value in {**machine, **facts}.items()))
  if machine["load"] > BUSY * machine["cpus"] and not arguments.cpu_time:
    print(WARNING)
  print(HEADER + PLAN_HEADER if arguments.training else HEADER)
  rows: list[Row] = []
  for name in arguments.models:
    for dtype in arguments.dtypes:
      for batch_size in arguments.batch_sizes:
        task = new(name, batch_size, arguments.image_size, dtype)
        rows += (found := measure(kinds, task, arguments.subjects, **race))
        print(*(line(row, arguments.training) for row in found), sep="\n", flush=True)
        if arguments.json:  # after each model, so that a stopped run keeps its results
          timing.write_json(arguments.json, machine | facts, results=rows)
  if arguments.plot:
    import plot

    plot.save(rows, arguments.plot)


if __name__ == "__main__":
  main()
