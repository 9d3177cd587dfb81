"""Writes a model's deploy form as StableHLO, ONNX or a web page, which run without repjax.

Examples:
  repjax export --workdir runs/a0 --to exported/a0
  repjax export --workdir runs/a0 --to exported/a0-onnx --format onnx
  repjax export --workdir runs/a0 --to exported/a0-web --format web --both-forms

The ONNX checker tests an ONNX file. Where ONNX Runtime is installed, the outputs of the file are
compared with those of JAX.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import repjax
from repjax.cli import flags
from repjax.errors import InputError, one_paragraph


def main(argv: Sequence[str]) -> None:
  """Exports the model that the flags name."""
  parser = flags.parser("export", __doc__)
  flags.add(parser, "--workdir", **flags.SOURCE)
  flags.add(parser, "--to", required=True)
  parser.add_argument(
    "--format", default="stablehlo", help="stablehlo, onnx or web (default: stablehlo)"
  )
  flags.add(parser, "--dtype", "--no-verify")
  parser.add_argument(
    "--platforms",
    nargs="+",
    default=["cpu", "cuda"],
    help="platforms that StableHLO is compiled for: cpu, cuda, rocm, tpu (default: cpu cuda)",
  )
  parser.add_argument(
    "--normalized", action="store_true", help="take normalized float images instead of uint8"
  )
  parser.add_argument(
    "--probabilities", action="store_true", help="return probabilities instead of logits"
  )
  parser.add_argument(
    "--image-size",
    type=int,
    nargs="+",
    metavar="PIXELS",
    help="for segmentation, the side of the images, or their height and width (default: the size "
    "of the training crops)",
  )
  parser.add_argument(
    "--both-forms",
    action="store_true",
    help="format web: the page compares the training form with the deploy form",
  )
  parser.add_argument(
    "--web-runtime",
    type=flags.file,
    metavar="PATH",
    help="format web: the package onnxruntime-web or a folder with its files (default: the cache "
    "or the registry of npm)",
  )
  arguments = parser.parse_args(argv)
  import numpy as np

  from repjax.deploy.canvases import stretching
  from repjax.onnx.metadata import PROGRAM

  with one_paragraph():
    model, variables, spec = repjax.load(
      arguments.workdir, deploy=not arguments.both_forms, verify=arguments.verify
    )
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
      image_size=size_of(arguments.image_size),
      web_runtime=arguments.web_runtime,
    )
  print(describe(spec, facts), f"saved: {arguments.to}", sep="\n")
  if spec.task == "segmentation":
    height, width = np.broadcast_to(facts["image_size"], 2).tolist()
    if sentence := stretching(spec.create_model(), "images", (height, width)):
      print(f"note: {sentence}")
  program = arguments.to / PROGRAM
  if program.exists():
    print(f"labels without repjax: python {program} IMAGE")
  if arguments.format == "web":
    folder = shlex.quote(str(arguments.to))
    print(f"to see it: python -m http.server --directory {folder}, then http://localhost:8000")


def size_of(numbers: Sequence[int] | None) -> int | tuple[int, int] | None:
  """Returns the image size that a flag gives, or None.

  Raises:
    InputError: there are more than two numbers.
  """
  if numbers is None or len(numbers) == 1:
    return numbers[0] if numbers else None
  if len(numbers) != 2:
    raise InputError(f"--image-size takes one number, or height and width, got {len(numbers)}")
  return numbers[0], numbers[1]


def describe(spec: repjax.ModelSpec, facts: Mapping[str, Any]) -> str:
  """Returns two lines: what was written, and how far to trust the file.

  Args:
    spec: describes the model.
    facts: from `repjax.deploy.export`.
  """
  size, classes = facts["image_size"], spec.num_classes
  sides = ", ".join(map(str, [size, size] if isinstance(size, int) else size))
  maps = spec.task == "segmentation"
  result = f"{facts['output']} float32"
  if facts["format"] != "stablehlo":
    shape = f"(N, {classes}, {sides})" if maps else f"(N, {classes})"
    return (
      f"{spec.name}, {facts['dtype']}, ONNX opset {facts['opset']}: {facts['input']} "
      f"(N, 3, {sides}) -> {result} {shape}\n{describe_check(facts)}"
    )
  shape = f"(N, {sides}, {classes})" if maps else f"(N, {classes})"
  return (
    f"{spec.name}, {facts['dtype']}, for {' and '.join(facts['platforms'])}: {facts['input']} "
    f"(N, {sides}, 3) -> {result} {shape}\n{facts['note']}"
  )


def describe_check(facts: Mapping[str, Any]) -> str:
  """Returns one line: how far the outputs of an ONNX file are from those of JAX."""
  from repjax.onnx.check import TOLERANCES

  found, limit = facts["checked"], TOLERANCES[facts["dtype"]]
  if not found:
    return "well-formed; not compared with JAX, since onnxruntime is not installed"
  error = found["relative_error"]
  warning = "" if error <= limit else f", MORE THAN {limit:.0e}: compare accuracies before using it"
  return (
    f"well-formed; ONNX Runtime {found['onnxruntime']} differs from JAX by {error:.1e} at batch "
    f"sizes {' and '.join(map(str, found['batch_sizes']))}{warning}"
  )
