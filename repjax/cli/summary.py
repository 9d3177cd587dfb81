"""Prints what a model costs by stage in both forms, and how deep it is.

Output shapes, parameters, multiplications; layers on the longest path.

repjax summary --model repvgg_a0
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from repjax import ModelSpec, analysis
from repjax.errors import one_paragraph


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(
    prog="repjax summary", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  what = parser.add_mutually_exclusive_group(required=True)
  what.add_argument("--model", help="a name of repjax.list_models()")
  what.add_argument("--workdir", type=Path, help="folder of a run or an import")
  parser.add_argument("--num-classes", type=int, default=1000, help="with --model")
  parser.add_argument(
    "--image-size", type=int, help="pixels (default: the model's or the folder's)"
  )
  arguments = parser.parse_args(argv)
  with one_paragraph():
    if arguments.workdir:
      spec = ModelSpec.read(arguments.workdir)
    else:
      spec = ModelSpec.usual(arguments.model, arguments.num_classes)
    image_size = arguments.image_size
    if image_size is None:
      image_size = spec.preprocessing.image_size
    model = spec.create_model()
    found, depth = analysis.summary(model, image_size), analysis.depth(model, image_size)
  print(f"{spec.name}, {spec.num_classes} classes, one image of {image_size} px")
  print(analysis.format_summary(found))
  print(f"depth {depth}: convolutions and matrix products on the longest path through the model")
