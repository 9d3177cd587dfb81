"""Writes a model's weights as .safetensors, under the tensor names of published checkpoints.

Examples:
  repjax export-weights --workdir runs/a0 --to repvgg_a0.safetensors
  repjax export-weights --workdir runs/a0 --to repvgg_a0.safetensors --naming timm

"official" are the names in the authors' code; for ResNet and VGG the names in torchvision. resnet50
also has the names in RepMLP's code, "repmlp".
"""

from collections.abc import Sequence

from repjax.cli import flags
from repjax.errors import one_paragraph


def main(argv: Sequence[str]) -> None:
  """Writes the weights that the flags name."""
  parser = flags.parser("export-weights", __doc__)
  flags.add(parser, "--workdir", "--no-verify")
  flags.add(parser, "--to", required=True, metavar="FILE", help=".safetensors file to make")
  parser.add_argument(
    "--naming",
    default="official",
    help="tensor names: official, timm, mmpretrain, repopt or repmlp (default: official)",
  )
  parser.add_argument(
    "--form",
    choices=("train", "deploy"),
    help="form to write (default: train where the folder holds the training form)",
  )
  arguments = parser.parse_args(argv)
  from repjax import weights

  with one_paragraph():
    state = weights.export_weights(
      arguments.workdir,
      arguments.to,
      naming=arguments.naming,
      form=arguments.form,
      verify=arguments.verify,
    )
    size = arguments.to.stat().st_size
  # Only the training form has batch norms, and so running variances.
  form = "train" if any(name.endswith("running_var") for name in state) else "deploy"
  print(
    f"{len(state)} tensors, {form} form, {arguments.naming} names, {size:,} bytes\n"
    f"saved: {arguments.to}"
  )
