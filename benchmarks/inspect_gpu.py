"""Compiles models for a GPU that this machine does not have, and prints what would run on it.

The programs are those of users, compiled on shapes without numbers. Nothing runs, so there are no
times. What is exact: the number and kinds of kernels, the bytes of their operands and results, the
planned memory, and how the host launches them. `gpu_compiler.py` says how to get the compiler.

Forms:
  deploy    the program of `repjax.deploy.compile`
  sums      the same with depthwise convolutions as sums over their taps, which `compile` tries too
  train     the training form in evaluation mode
  evaluate  the step of an evaluation in a training run
  step      the training step

The columns:
  kernels   fusions, copies, and calls of cuDNN and cuBLAS; in loops once for each turn
  moved     MiB of operands and results of all kernels
  temporary MiB of intermediate values, without the work space of cuDNN
  arguments MiB of parameters, images and, for a step, the state
  launches  what the host launches: CUDA graphs, and kernels outside of them
  in graphs kernels in CUDA graphs

Example:
  python benchmarks/inspect_gpu.py --models repvgg_a2 parnet_s --json before.json
  python benchmarks/inspect_gpu.py --models repvgg_a2 parnet_s --against before.json
"""

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gpu_compiler
import gpu_kernels
from gpu_programs import FORMS, Wanted
from gpu_targets import TARGETS

from repjax.deploy.gpu import GRAPHS
from repjax.errors import InputError, one_paragraph
from repjax.inference import DTYPES

MIB = 2**20
KEY = ("gpu", "model", "form", "dtype", "batch_size", "image_size")
"""The entries of a row by which rows of two files are compared."""
COUNTS = ("kernels", "moved_mib", "temporary_mib", "arguments_mib", "launches", "in_graphs")

Row = dict[str, Any]


def inspect(gpu: str, wanted: Wanted, options: Mapping[str, Any] | None = None) -> Row:
  """Compiles a program for a GPU, and returns the row of the table.

  Args:
    gpu: a name of TARGETS.
    wanted: the program.
    options: options of XLA.
  """
  (device,) = gpu_compiler.devices(gpu)
  compiled = gpu_compiler.compile_lowered(FORMS[wanted.form](wanted, device), options)
  found = gpu_kernels.kernels(compiled.executable.as_text())
  plan = compiled.executable.memory_analysis()
  return {
    "gpu": gpu,
    **wanted._asdict(),
    "kernels": sum(kernel.times for kernel in found),
    "moved_mib": sum(kernel.bytes for kernel in found) / MIB,
    "temporary_mib": plan.temp_size_in_bytes / MIB,
    "arguments_mib": plan.argument_size_in_bytes / MIB,
    "launches": compiled.graphs + compiled.outside,
    "in_graphs": compiled.inside,
    "kinds": gpu_kernels.by_kind(found),
    "list": [kernel._asdict() for kernel in found],
  }


HEADER = (
  f"{'model':<14}{'form':<10}{'dtype':<10}{'batch':>5}{'kernels':>10}{'moved':>13}"
  f"{'temporary':>13}{'arguments':>13}{'launches':>10}{'in graphs':>11}"
)


def line(row: Row) -> str:
  """Returns the line of a row in the table."""
  mib = (f"{row[name]:,.1f} MiB".rjust(13) for name in COUNTS[1:4])
  return (
    f"{row['model']:<14}{row['form']:<10}{row['dtype']:<10}{row['batch_size']:>5}"
    f"{row['kernels']:>10,}{''.join(mib)}{row['launches']:>10,}{row['in_graphs']:>11,}"
  )


def details(row: Row) -> list[str]:
  """Returns a line for each kind of kernel, with its number and the MiB that it moves."""
  return [
    f"  {f'{kind}, {detail}':<50}{counts['kernels']:>10,}{counts['bytes'] / MIB:>9,.1f} MiB"
    for kind, by_detail in row["kinds"].items()
    for detail, counts in by_detail.items()
  ]


def largest(row: Row, count: int) -> list[str]:
  """Returns a line for each of the kernels that move most."""
  order = sorted(row["list"], key=lambda kernel: -kernel["bytes"])[:count]
  return [
    f"    {kernel['bytes'] / MIB:>9,.2f} MiB  {kernel['kind']}, {kernel['detail']}: "
    f"{kernel['source'].partition('/')[2] or kernel['name']}"
    for kernel in order
  ]


def compared(row: Row, before: Mapping[tuple[Any, ...], Row]) -> str:
  """Returns a line with the counts of an earlier file, and how much less the row has now."""
  old = before.get(tuple(row[name] for name in KEY))
  if old is None:
    return "  not in the earlier file"
  parts = []
  for name in COUNTS:
    change = f" ({row[name] / old[name] - 1:+.0%})" if old[name] else ""
    parts.append(f"{name.removesuffix('_mib')} {old[name]:,.5g} -> {row[name]:,.5g}{change}")
  return "  " + ", ".join(parts)


def read(path: Path) -> dict[tuple[Any, ...], Row]:
  """Reads a file that --json has written, by KEY.

  Raises:
    InputError: the file cannot be read, or is a different one.
  """
  try:
    rows = json.loads(path.read_text())["results"]
    return {tuple(row[name] for name in KEY): row for row in rows}
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise InputError(f"{path} is no file of inspect_gpu.py --json: {error}") from error


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  """Returns the parsed flags."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--gpu", choices=TARGETS, default="h100", help="default: h100")
  parser.add_argument("--models", nargs="+", default=["repvgg_a0"], help="default: repvgg_a0")
  parser.add_argument("--form", nargs="+", choices=FORMS, default=["deploy"])
  parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"])
  parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1], help="default: 1")
  parser.add_argument("--image-size", type=int, default=224, help="pixels (default: 224)")
  parser.add_argument(
    "--graphs", action="store_true", help="put convolutions into CUDA graphs, too"
  )
  parser.add_argument("--largest", type=int, default=0, help="list so many kernels that move most")
  parser.add_argument("--json", type=Path, help="also write the results to this file")
  parser.add_argument("--against", type=Path, help="compare with this file of an earlier --json")
  return parser.parse_args(arguments)


def main() -> None:
  with one_paragraph():
    run(parse())


def run(arguments: argparse.Namespace) -> None:
  """Prints the table, and writes the file that the flags name."""
  before = read(arguments.against) if arguments.against else None
  options = GRAPHS if arguments.graphs else {}
  target = TARGETS[arguments.gpu]
  print(f"{target.name}, compute capability {'.'.join(map(str, target.capability))}")
  print(HEADER)
  rows: list[Row] = []
  asked = (arguments.models, arguments.form, arguments.dtypes, arguments.batch_sizes)
  for each in itertools.product(*asked):
    row = inspect(arguments.gpu, Wanted(*each, arguments.image_size), options)
    print(line(row), *details(row), *largest(row, arguments.largest), sep="\n", flush=True)
    if before is not None:
      print(compared(row, before))
    rows.append({name: value for name, value in row.items() if name != "list"})
    if arguments.json:  # after each program, so that a stopped run keeps its results
      write(arguments.json, rows)


def write(path: Path, rows: Sequence[Row]) -> None:
  """Writes the rows as JSON, after the version of the compiler."""
  path.parent.mkdir(parents=True, exist_ok=True)
  facts = {"jaxlib": gpu_compiler.JAXLIB, "results": rows}
  path.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
  main()
