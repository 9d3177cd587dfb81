"""Prints the output shapes, parameters and multiplications of a model by stage, in both forms.

The last line is the depth: the number of layers on the longest path.

Examples:
  repjax summary repvgg_a0
  repjax summary repvgg_a0 --num-classes 10 --image-size 32
  repjax summary --workdir runs/digits
"""

from collections.abc import Sequence

import repjax
from repjax.cli import flags
from repjax.errors import InputError, one_paragraph


def main(argv: Sequence[str]) -> None:
  """Prints the summary of the model that the flags name."""
  parser = flags.parser("summary", __doc__)
  parser.add_argument("name", nargs="?", metavar="MODEL", help="name of a model")
  parser.add_argument("--model", metavar="MODEL", help="name of a model, as the first argument")
  flags.add(parser, "--workdir", required=False)
  flags.add(parser, "--no-verify")
  parser.add_argument(
    "--num-classes", type=int, default=1000, metavar="N", help="with MODEL (default: 1000)"
  )
  parser.add_argument(
    "--image-size",
    type=int,
    metavar="N",
    help="side of the images in pixels (default: the usual size of the model or of the run)",
  )
  arguments = parser.parse_args(argv)
  with one_paragraph():
    given = [each for each in (arguments.name, arguments.model, arguments.workdir) if each]
    if len(given) != 1:
      raise InputError("summary takes one model: `repjax summary MODEL`, or --workdir DIR")
    if arguments.workdir:
      spec = repjax.ModelSpec.read(arguments.workdir, verify=arguments.verify)
    else:
      spec = repjax.ModelSpec.usual(arguments.name or arguments.model, arguments.num_classes)
    image_size = arguments.image_size
    if image_size is None:
      image_size = spec.preprocessing.image_size
    model = spec.create_model()
    found = repjax.analysis.summary(model, image_size)
    depth = repjax.analysis.depth(model, image_size)
  print(f"{spec.name}, {spec.num_classes} classes, one image of {image_size} px")
  print(repjax.analysis.format_summary(found))
  print(f"depth {depth}: convolutions and matrix products on the longest path through the model")
