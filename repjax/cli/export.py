"""Writes a workdir's deploy form as StableHLO or ONNX, which other programs run without repjax.

repjax export --workdir runs/a0 --to exported/a0
repjax export --workdir runs/a0 --to exported/a0-onnx --format onnx

An ONNX file is checked, and where ONNX Runtime is installed its outputs are compared with JAX's.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import repjax
from repjax.deploy.export import FORMATS, PLATFORMS
from repjax.errors import one_paragraph
from repjax.inference import DTYPES
from repjax.onnx.check import TOLERANCES


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(
    prog="repjax export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", required=True, type=Path, help="folder of a run or an import")
  parser.add_argument("--to", required=True, type=Path, help="the folder to be made")
  parser.add_argument("--format", choices=FORMATS, default="stablehlo")
  parser.add_argument("--dtype", choices=DTYPES, default="float32")
  parser.add_argument(
    "--platforms",
    nargs="+",
    choices=PLATFORMS,
    default=["cpu", "cuda"],
    help="that StableHLO is for",
  )
  parser.add_argument(
    "--normalized", action="store_true", help="take normalized float images instead of uint8"
  )
  parser.add_argument(
    "--probabilities", action="store_true", help="return probabilities instead of logits"
  )
  arguments = parser.parse_args(argv)
  with one_paragraph():
    model, variables, spec = repjax.load(arguments.workdir)
    facts = repjax.deploy.export(
      model,
      variables,
      spec,
      arguments.to,
      format=arguments.format,
      dtype=arguments.dtype,
      platforms=arguments.platforms,
      normalize=not arguments.normalized,
      probabilities=arguments.probabilities,
    )
  print(described(spec, facts), f"saved: {arguments.to}", sep="\n")


def described(spec: repjax.ModelSpec, facts: Mapping[str, Any]) -> str:
  """What was written and how far it may be trusted, in two lines."""
  size, classes = facts["image_size"], spec.num_classes
  result = f"{facts['output']} float32 (N, {classes})"
  if facts["format"] == "onnx":
    return (
      f"{spec.name}, {facts['dtype']}, ONNX opset {facts['opset']}: {facts['input']} "
      f"(N, 3, {size}, {size}) -> {result}\n{compared(facts)}"
    )
  return (
    f"{spec.name}, {facts['dtype']}, for {' and '.join(facts['platforms'])}: {facts['input']} "
    f"(N, {size}, {size}, 3) -> {result}\n{facts['note']}"
  )


def compared(facts: Mapping[str, Any]) -> str:
  """How an ONNX file's outputs compare with JAX's."""
  found, limit = facts["checked"], TOLERANCES[facts["dtype"]]
  if not found:
    return "well-formed; not compared with JAX, since onnxruntime is not installed"
  error = found["relative_error"]
  warning = "" if error <= limit else f", MORE THAN {limit:.0e}: compare accuracies before using it"
  return (
    f"well-formed; ONNX Runtime {found['onnxruntime']} differs from JAX by {error:.1e} at batch "
    f"sizes {' and '.join(map(str, found['batch_sizes']))}{warning}"
  )
