"""Draws what a run did, and what its branches contribute, into report.png of its folder.

repjax report --workdir runs/digits
repjax report --workdir runs/a0 --compare runs/a0-ema runs/a0-aug --output a0.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from repjax.errors import one_paragraph
from repjax.report import write_report


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(
    prog="repjax report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", required=True, type=Path, help="folder of a run or an import")
  parser.add_argument(
    "--compare", nargs="+", default=[], type=Path, metavar="DIR", help="runs to lay over it"
  )
  parser.add_argument("--output", type=Path, help="the .png (default: report.png in the workdir)")
  arguments = parser.parse_args(argv)
  with one_paragraph():
    path, notes = write_report(
      arguments.workdir, compare=arguments.compare, output=arguments.output
    )
  print("\n".join([*notes, f"saved: {path}"]))
