"""Writes a workdir's model as .safetensors in the names of the authors' code, timm or mmpretrain.

The official names of ResNet and VGG are torchvision's; resnet50 has those beside RepMLP, too.

repjax export-weights --workdir runs/a0 --to repvgg_a0.safetensors --naming timm
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from repjax import weights
from repjax.errors import one_paragraph


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(
    prog="repjax export-weights",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--workdir", required=True, type=Path, help="folder of a run or an import")
  parser.add_argument("--to", required=True, type=Path, help="the .safetensors file to be made")
  parser.add_argument("--naming", default="official", help="official, timm, mmpretrain or repmlp")
  parser.add_argument(
    "--form", choices=("train", "deploy"), help="(default: train if there is one)"
  )
  arguments = parser.parse_args(argv)
  with one_paragraph():
    state = weights.export_weights(
      arguments.workdir, arguments.to, naming=arguments.naming, form=arguments.form
    )
  size = arguments.to.stat().st_size
  form = "train" if any(name.endswith("running_var") for name in state) else "deploy"
  print(
    f"{len(state)} tensors, {form} form, {arguments.naming} names, {size:,} bytes\n"
    f"saved: {arguments.to}"
  )
