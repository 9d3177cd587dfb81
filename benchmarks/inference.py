"""Times a model against what people would use instead, in turns, in one process.

Subjects, each where it is installed (pip install 'repjax[bench]'):

  repjax-train-form   the network that is trained, in evaluation mode
  repjax-deploy       the plain network that it is converted to, by repjax.deploy.compile;
                      a call ends when logits are on the host, whatever --calls is
  repjax-untuned      the same without measuring how convolutions are computed fastest
  torch-eager         the plain network with the same weights in PyTorch, channels last
  torch-compile       the same by torch.compile
  onnxruntime         the same, exported by PyTorch, in ONNX Runtime (on CPUs)
  openvino            the same in OpenVINO (on CPUs)
  repjax-onnxruntime  the plain network, exported by repjax, in ONNX Runtime
  repjax-openvino     the same in OpenVINO

Before anything is timed their outputs are compared. Each round runs all of them, so that they meet
the same noise; times are medians with quartiles, and `to best` is the median over rounds of the
fastest other library's time over the subject's: above 1 the subject is faster. `start` is from the
network to its first output, compiling included; memory is what XLA plans or, on a GPU, the most
that PyTorch has held. GFLOP/s count two for each multiply-accumulate of the plain definition (an
algorithm that needs fewer multiplications shows more), and `of matmul` is their share of what a
large matrix product in JAX reaches on the device, in the same rounds and dtype.

    python benchmarks/inference.py --models repvgg_a0 --batch-sizes 1 8 --image-size 224

On a machine where others compute too, CPU time on one core still is comparable:

    taskset -c 0 python benchmarks/inference.py --cpu-time

With --training the step of training is timed instead, forward, backward and update, against
PyTorch's on the same weights and data.

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
"""Relative errors of outputs against float32. On GPUs that is TF32, in JAX and in PyTorch."""

BUSY = 0.7
WARNING = (
  "  others compute on this machine: where threads wait for one another (PyTorch's most), turns do "
  "not make\n  this fair; measure again in a quiet hour, or one core by --cpu-time"
)
"""Said where the load per CPU exceeds BUSY."""

MATMUL = "matrix product"
PACKAGES = ("torch", "onnxruntime", "openvino")

Row = dict[str, Any]


def chosen(
  kinds: Mapping[str, Kind], task: Task, names: list[str] | None
) -> dict[str, timing.Subject]:
  """The subjects that can do a task; the others are named with the reason.

  Raises:
    InputError: one that was asked for by name is not installed, or none is left.
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
  """A large product of square matrices in JAX, and how many FLOP it is."""
  size = 1024 if jax.default_backend() == "cpu" else 8192
  matrix = jnp.full((size, size), 0.5, DTYPES[dtype])
  subject = timing.program(jnp.matmul, matrix)
  return subject._replace(prepare=lambda images: matrix), 2 * size**3


def tolerance(dtype: str) -> float:
  """How far an output may be from the deploy form's in float32."""
  on_gpu = jax.default_backend() != "cpu"
  return TOLERANCE_TF32 if dtype == "float32" and on_gpu else TOLERANCES[dtype]


def measure(
  kinds: Mapping[str, Kind], task: Task, names: list[str] | None, **race: Any
) -> list[Row]:
  """All subjects on one model, batch size and dtype: a row for each."""
  running = chosen(kinds, task, names)
  product, product_flops = matrix_product(task.dtype)
  errors: dict[str, float] = {}

  def check(outputs: dict[str, np.ndarray]) -> None:
    outputs = {name: value for name, value in outputs.items() if name != MATMUL}
    expected = task.expected(outputs)
    errors.update(timing.relative_errors(outputs, expected, tolerance(task.dtype)))

  results = timing.race({**running, MATMUL: product}, task.inputs, check=check, **race)
  rate = product_flops / results.pop(MATMUL).median
  rows = rows_of(results, task.batch_size, {name: task.flops(name) for name in results}, rate)
  facts = {"model": task.name, "batch_size": task.batch_size, "dtype": task.dtype}
  return [facts | row | {"relative_error": errors[row["subject"]]} for row in rows]


def best_peer(results: Mapping[str, timing.Result]) -> str | None:
  """The fastest subject that is not ours."""
  peers = [name for name in results if not name.startswith("repjax")]
  return min(peers, key=lambda name: results[name].median, default=None)


def rows_of(
  results: Mapping[str, timing.Result], batch_size: int, flops: Mapping[str, int], rate: float
) -> list[Row]:
  """What the table and the file say of each subject."""
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
        "memory_mib": None if result.memory is None else result.memory / 2**20,
        "gflops": own / 1e9,
        "matmul_gflops": rate / 1e9,
        "of_matmul": own / rate,
        "ms_of_each_round": [[1e3 * value for value in repeat] for repeat in result.seconds],
      }
    )
  return rows


HEADER = (
  f"{'model':<14}{'batch':>6} {'dtype':<9}{'subject':<18}{'ms':>9}{'quartiles':>16}{'images/s':>10}"
  f"{'to best':>9}{'start':>9}{'memory':>11}{'GFLOP/s':>9}{'of matmul':>10}"
)


def line(row: Row) -> str:
  """One line of the table."""

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
  )


def versions() -> dict[str, str]:
  """Of the other libraries that are installed."""
  found = [name for name in PACKAGES if importlib.util.find_spec(name)]
  return {name: importlib.metadata.version(name) for name in found}


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--training", action="store_true", help="time the step of training")
  parser.add_argument("--models", nargs="+", default=["repvgg_a0"])
  parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
  parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
  parser.add_argument("--subjects", nargs="+", help="default: all that are installed")
  parser.add_argument("--image-size", type=int, default=224, help="pixels")
  parser.add_argument("--rounds", type=int, default=15, help="of each repeat")
  parser.add_argument("--repeats", type=int, default=1, help="everything is made anew in each")
  parser.add_argument(
    "--calls", type=int, default=1, help="in a turn before waiting: 1 times latency, more a stream"
  )
  parser.add_argument(
    "--cpu-time", action="store_true", help="of one core, which others cannot take away"
  )
  parser.add_argument("--json", type=Path, help="also write the results to this file")
  parser.add_argument("--plot", type=Path, help="draw accuracy over speed; needs matplotlib")
  return parser.parse_args()


def main() -> None:
  arguments = parse()
  # JAX would take most of a GPU's memory at once and leave the others too little.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  with one_paragraph():
    run(arguments)


def check_one_core(machine: Mapping[str, Any]) -> None:
  """Raises InputError where CPU time is not the time that a user would wait on a quiet machine."""
  if jax.default_backend() != "cpu" or machine["cpus"] > 1:
    raise InputError(
      f"--cpu-time adds up what threads do side by side, and these are {machine['cpus']} CPUs and "
      f"{machine['device']}; run it on one core of a CPU: taskset -c 0 python ..."
    )


def run(arguments: argparse.Namespace) -> None:
  """Prints the table, and writes the file and the picture that are asked for."""
  new, kinds = Task, subjects.KINDS
  if arguments.training:
    import training_subjects  # which needs more packages than the rest

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
  print(HEADER)
  rows: list[Row] = []
  for name in arguments.models:
    for dtype in arguments.dtypes:
      for batch_size in arguments.batch_sizes:
        task = new(name, batch_size, arguments.image_size, dtype)
        rows += (found := measure(kinds, task, arguments.subjects, **race))
        print(*map(line, found), sep="\n", flush=True)
        if arguments.json:  # each time, so that a run that is stopped leaves what it has found
          timing.write_json(arguments.json, machine | facts, results=rows)
  if arguments.plot:
    import plot_benchmark

    plot_benchmark.save(rows, arguments.plot)


if __name__ == "__main__":
  main()
