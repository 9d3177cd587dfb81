"""Draws what a run did, and what its branches contribute, into report.png of its folder.

python scripts/report.py --workdir runs/digits
python scripts/report.py --workdir runs/a0 --compare runs/a0-ema runs/a0-aug --output a0.png
"""

import argparse
from pathlib import Path

from repjax.errors import one_paragraph
from repjax.training.report import write_report


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", required=True, type=Path, help="folder of a run or an import")
  parser.add_argument(
    "--compare", nargs="+", default=[], type=Path, metavar="DIR", help="runs to lay over it"
  )
  parser.add_argument("--output", type=Path, help="the .png (default: report.png in the workdir)")
  arguments = parser.parse_args()
  with one_paragraph():
    path, notes = write_report(
      arguments.workdir, compare=arguments.compare, output=arguments.output
    )
  print("\n".join([*notes, f"saved: {path}"]))


if __name__ == "__main__":
  main()
