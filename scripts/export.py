"""Writes a workdir's deploy form as StableHLO, which other programs run without repjax.

python scripts/export.py --workdir runs/a0 --to exported/a0
"""

import argparse
from pathlib import Path

import repjax
from repjax.deploy.export import PLATFORMS, PROMISE
from repjax.deploy.function import DTYPES
from repjax.errors import one_paragraph


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", required=True, type=Path, help="folder of a run or an import")
  parser.add_argument("--to", required=True, type=Path, help="the folder to be made")
  parser.add_argument("--dtype", choices=DTYPES, default="float32")
  parser.add_argument("--platforms", nargs="+", choices=PLATFORMS, default=["cpu", "cuda"])
  parser.add_argument(
    "--normalized", action="store_true", help="take normalized float32 images instead of uint8"
  )
  parser.add_argument(
    "--probabilities", action="store_true", help="return probabilities instead of logits"
  )
  arguments = parser.parse_args()
  with one_paragraph():
    model, variables, spec = repjax.load(arguments.workdir)
    facts = repjax.deploy.export(
      model,
      variables,
      spec,
      arguments.to,
      dtype=arguments.dtype,
      platforms=arguments.platforms,
      normalize=not arguments.normalized,
      probabilities=arguments.probabilities,
    )
  size = facts["image_size"]
  print(
    f"{spec.name}, {facts['dtype']}, for {' and '.join(facts['platforms'])}: {facts['input']} "
    f"(N, {size}, {size}, 3) -> {facts['output']} float32 (N, {spec.num_classes})\n"
    f"{PROMISE}\n"
    f"saved: {arguments.to}"
  )


if __name__ == "__main__":
  main()
