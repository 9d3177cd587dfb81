"""Re-parameterizes a run's best checkpoint into its deploy folder, if both forms agree.

Both forms run over the run's evaluation split, over noise for imported weights, or over --dataset.

repjax convert --workdir runs/digits
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from repjax import runs, training
from repjax.errors import one_paragraph
from repjax.runs import lock
from repjax.training.conversion import format_report


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(
    prog="repjax convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", required=True, type=Path, help="folder of a run or an import")
  parser.add_argument("--dataset", help="a TFDS name instead of the run's own, or synthetic")
  parser.add_argument("--split", help="of the data set, instead of the run's own")
  parser.add_argument("--data-dir", help="where TFDS keeps the data set")
  parser.add_argument("--tolerance", type=float, help="largest relative difference of the logits")
  arguments = parser.parse_args(argv)
  with one_paragraph():
    config = training.read_config(
      arguments.workdir,
      dataset=arguments.dataset,
      eval_split=arguments.split,
      data_dir=arguments.data_dir,
    )
    if (
      arguments.dataset is None
      and arguments.split is None
      and runs.import_file(arguments.workdir).exists()
    ):
      config.dataset, config.eval_split = "synthetic", "sample"
    if arguments.tolerance is not None:
      config.tolerance = arguments.tolerance
    with lock.hold(arguments.workdir):
      report = training.convert(config, arguments.workdir)
  print(format_report(report) + f"\nsaved: {runs.deploy_folder(arguments.workdir)}")
