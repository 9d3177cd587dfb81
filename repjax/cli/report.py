"""Draws the curves of a run and the contributions of its branches into report.png of its folder.

Examples:
  repjax report --workdir runs/digits
  repjax report --workdir runs/a0 --compare runs/a0-ema runs/a0-aug --output a0.png
"""

from collections.abc import Sequence

from repjax.cli import flags
from repjax.errors import one_paragraph


def main(argv: Sequence[str]) -> None:
  """Draws the run that the flags name."""
  parser = flags.parser("report", __doc__)
  flags.add(parser, "--workdir")
  parser.add_argument(
    "--compare",
    nargs="+",
    default=[],
    type=flags.folder,
    metavar="DIR",
    help="more runs to draw into the same axes",
  )
  parser.add_argument(
    "--output",
    type=flags.file,
    metavar="FILE",
    help=".png to write (default: report.png in the workdir)",
  )
  flags.add(parser, "--no-verify")
  arguments = parser.parse_args(argv)
  from repjax.report import write_report

  with one_paragraph():
    path, notes = write_report(
      arguments.workdir,
      compare=arguments.compare,
      output=arguments.output,
      verify=arguments.verify,
    )
  print("\n".join([*notes, f"saved: {path}"]))
