"""Re-parameterizes a run's best checkpoint into its deploy folder, if both forms agree.

python scripts/reparameterize.py --workdir runs/digits
"""

import argparse

from repjax import training
from repjax.errors import one_paragraph
from repjax.training.conversion import format_report


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", required=True, help="folder of the run")
  parser.add_argument("--tolerance", type=float, help="largest relative difference of the logits")
  arguments = parser.parse_args()
  with one_paragraph():
    config = training.read_config(arguments.workdir)
    if arguments.tolerance is not None:
      config.tolerance = arguments.tolerance
    report = training.convert(config, arguments.workdir)
  print(format_report(report) + f"\nsaved: {arguments.workdir}/deploy")


if __name__ == "__main__":
  main()
